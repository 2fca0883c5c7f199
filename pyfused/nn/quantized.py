"""How does a layer keep its weight in int8? QuantizedLinear and QuantizedEmbedding, with a scale for each row of the weight.

Row j of the weight stands for scale[j] times its integers. Both are buffers, so state dicts, copies and moves to a device take
them along. The dtype of the results is the attribute `dtype`. It follows .half() and .to(dtype); the buffers keep theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.shared.int8 import dequantized, wide
from ..ops import linear

_KEPT = {"weight": torch.int8, "scale": torch.float32}


def int8_of(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A floating-point matrix (N, K) as int8 (N, K) and scale (N,) float32: 127 steps of the largest value in each row. A row
    of zeros has scale 1."""
    rows = weight.detach().float()
    scale = rows.abs().amax(1) / 127.0
    scale = torch.where(scale > 0, scale, 1.0)
    return (rows / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8).contiguous(), scale


class _Quantized(nn.Module):
    """What both classes share: the two buffers, and the dtype of the results."""

    weight: Tensor
    scale: Tensor
    dtype: torch.dtype
    dynamic: bool

    def _hold(self, rows: int, columns: int, dynamic: bool, device: Any, dtype: torch.dtype | None) -> None:
        self.register_buffer("weight", torch.zeros(rows, columns, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.ones(rows, dtype=torch.float32, device=device))
        self.dynamic = dynamic
        self.dtype = torch.get_default_dtype() if dtype is None else dtype

    def dequantized(self) -> Tensor:
        """The weight (N, K) in `dtype`."""
        return dequantized(self.weight, self.scale, self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Module.to, half and the others. They may move the buffers, and change only `dtype`."""
        before = dict(self._buffers)
        found = super()._apply(fn, recurse)
        for name, dtype in _KEPT.items():
            moved, was = self._buffers[name], before[name]
            if moved is not None and was is not None and moved.dtype != dtype:
                self._buffers[name] = was.to(moved.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        return found


    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Refuses a weight in floating point, which copy_ would cut to integers."""
        given = state_dict.get(f"{prefix}weight")
        if given is not None and given.dtype != torch.int8:
            args[4].append(f"{prefix}weight is {given.dtype}; this layer is quantised and takes int8 with a scale")
            return
        super()._load_from_state_dict(state_dict, prefix, *args)


class QuantizedLinear(_Quantized):
    """torch.nn.Linear with an int8 weight, plus a residual that is added in the same pass.

    Args:
        in_features, out_features: K and N. The buffers are weight (N, K) int8 and scale (N,) float32; the parameter is bias
            (N,) or None. A new weight is all zeros: load a state dict, or let pyfused.quantize_ make the module.
        dynamic: as pyfused.linear's.
        dtype: of the bias and the results; torch's default dtype if None.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        dynamic: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self._hold(out_features, in_features, dynamic, device, dtype)
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=self.dtype)) if bias else None

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """input (..., K), residual (..., N) or None -> (..., N) of the module's dtype. An input of another dtype is cast first:
        transformers' T5 gives float16 to `wo`, which it keeps in float32. Raises as pyfused.linear does."""
        bias, dtype = self.bias, self.dtype
        if input.dtype is not dtype and input.is_floating_point():
            input = input.to(dtype)
        return linear(input, self.weight, bias, residual=residual, scale=self.scale, dynamic=self.dynamic)

    def wide(self, hidden: Tensor, residual: Tensor | None = None) -> Tensor:
        """The same in float32, for values that float16 cannot hold: hidden (..., K), residual (..., N) of float32 or float16 ->
        (..., N) float32."""
        bias = None if self.bias is None else self.bias.float()
        residual = None if residual is None else residual.float()
        return linear(hidden.float(), self.weight, bias, residual=residual, scale=self.scale, dynamic=self.dynamic)

    def extra_repr(self) -> str:
        n, k = self.weight.shape
        return f"in_features={k}, out_features={n}, bias={self.bias is not None}, dtype={self.dtype}, dynamic={self.dynamic}"


class QuantizedEmbedding(_Quantized):
    """An embedding with an int8 table that also projects back to the vocabulary, as ReversibleEmbedding does.

    Args:
        num_embeddings, embedding_dim: V and D. The buffers are weight (V, D) int8 and scale (V,) float32.
        tie_weights: False gives the projection a matrix of its own, the buffers of the child `reverse`.
        dynamic: as pyfused.linear's, for the projection.
        dtype: of the embeddings; torch's default dtype if None.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        tie_weights: bool = True,
        *,
        dynamic: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.tie_weights = num_embeddings, embedding_dim, tie_weights
        self._hold(num_embeddings, embedding_dim, dynamic, device, dtype)
        if not tie_weights:
            sizes = embedding_dim, num_embeddings
            self.reverse = QuantizedLinear(*sizes, False, dynamic=dynamic, device=device, dtype=dtype)

    def forward(self, input: Tensor, reverse: bool = False) -> Tensor:
        """ids (...) -> (..., D); with reverse=True, hidden states (..., D) -> logits (..., V)."""
        if not reverse:
            integers, scale = F.embedding(input, self.weight), F.embedding(input, self.scale[:, None])
            return (integers.to(wide(self.dtype)) * scale).to(self.dtype)
        if (own := self._modules.get("reverse")) is not None:
            logits: Tensor = own(input)
            return logits
        return linear(input, self.weight, scale=self.scale, dynamic=self.dynamic)

    def extra_repr(self) -> str:
        v, d = self.weight.shape
        return f"{v}, {d}, dtype={self.dtype}, dynamic={self.dynamic}"


def dtype_of(module: Any) -> torch.dtype:
    """The dtype in which a linear layer or an embedding computes, quantised or not."""
    found: torch.dtype = module.dtype if isinstance(module, _Quantized) else module.weight.dtype
    return found
