"""How does a layer keep its weight as integers? QuantizedLinear and QuantizedEmbedding hold them in int8 or int4, with scales.

pyfused/weight_format.py says what weight and scale are. Both are buffers, so state dicts, copies and moves to a device take
them along. The dtype of the results is the attribute `dtype`. It follows .half() and .to(dtype); the buffers keep theirs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import linear
from ..rules import FLAG, check
from ..weight_format import FORMATS, WeightFormat, dequantized, format_of, wide


class Scheme(NamedTuple):
    """How a quantised layer computes. name: its weight's format, "int8" or "int4"; dynamic: as pyfused.linear's."""

    name: str
    dynamic: bool = False

    @classmethod
    def of(cls, module: _Quantized) -> Scheme:
        """A module's."""
        return cls(module.format.name, module.dynamic)

    def check(self) -> None:
        """Raises ValueError or TypeError unless layers can have it."""
        if self.name not in list(FORMATS):  # a list compares; a dict would hash a name that is no string
            raise ValueError(f"scheme is {self.name!r}; it takes {' or '.join(map(repr, FORMATS))}")
        check(FLAG, dynamic=self.dynamic)
        if self.dynamic and self.name != "int8":
            raise ValueError(f"dynamic is True; with scheme {self.name!r} it takes False")


def _in_save_pretrained() -> bool:
    """Whether transformers asks for the state dict, to write files whose readers know no scales. Of a model with adapters it
    writes these alone. A state dict that the caller made passes by."""
    frame = sys._getframe()
    while frame is not None:
        module = frame.f_globals.get("__name__") or ""
        if frame.f_code.co_name == "save_pretrained" and module.startswith("transformers."):
            return not getattr(frame.f_locals.get("self"), "_hf_peft_config_loaded", False)
        frame = frame.f_back  # type: ignore[assignment]
    return False


class _Quantized(nn.Module):
    """What both classes share: the two buffers, and the dtype of the results."""

    weight: Tensor
    scale: Tensor
    dtype: torch.dtype
    dynamic: bool

    def _hold(self, rows: int, columns: int, scheme: Scheme, device: Any, dtype: torch.dtype | None) -> None:
        scheme.check()
        form = FORMATS[scheme.name]
        if misfit := form.misfit(columns):
            raise ValueError(f"scheme is {scheme.name!r} and {misfit}")
        self.register_buffer("weight", torch.zeros(form.shape(rows, columns), dtype=torch.int8, device=device))
        self.register_buffer(
            "scale", torch.ones(form.scale_shape(rows, columns), dtype=form.scale_dtype, device=device)
        )
        self.dynamic = scheme.dynamic
        self.dtype = torch.get_default_dtype() if dtype is None else dtype

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if _in_save_pretrained():
            raise ValueError(
                f"save_pretrained: {prefix.rstrip('.') or 'the model'} has {self.format.name} weights, and from_pretrained "
                "would take the integers for the weights; keep model.state_dict(), or call pyfused.unquantize_(model) first"
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)

    @property
    def format(self) -> WeightFormat:
        """How the weight is stored."""
        found = format_of(self.scale)
        assert found is not None
        return found

    def dequantized(self) -> Tensor:
        """The weight (N, K) in `dtype`."""
        return dequantized(self.weight, self.scale, self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Module.to, half and the others. They may move the buffers, and change only `dtype`."""
        before = dict(self._buffers)
        found = super()._apply(fn, recurse)
        for name, was in before.items():
            moved = self._buffers[name]
            if moved is not None and was is not None and moved.dtype != was.dtype:
                self._buffers[name] = was.to(moved.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        return found

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Refuses another weight than its own format's. copy_ would cut floats to integers, and take the other's integers."""
        form = self.format
        for name, dtype in (("weight", torch.int8), ("scale", form.scale_dtype)):
            given = state_dict.get(f"{prefix}{name}")
            if given is not None and given.dtype != dtype:
                takes = f"this layer is quantised and takes {form.name}, whose {name} is {dtype}"
                args[4].append(f"{prefix}{name} is {given.dtype}; {takes}")
                return
        super()._load_from_state_dict(state_dict, prefix, *args)


class QuantizedLinear(_Quantized):
    """torch.nn.Linear with a weight of integers, plus a residual that is added in the same pass.

    Args:
        in_features, out_features: K and N. The buffers are weight and scale, for int8 (N, K) int8 and (N,) float32, for int4
            (N, K / 2) int8 and (N, K / 32) bfloat16. The parameter is bias (N,) or None. A new weight is all zeros: load a
            state dict, or let pyfused.quantize_ make the module.
        scheme: "int8" or "int4", which takes multiples of 32 for K.
        dynamic: as pyfused.linear's; False for int4.
        dtype: of the bias and the results; torch's default dtype if None.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        scheme: str = "int8",
        dynamic: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self._hold(out_features, in_features, Scheme(scheme, dynamic), device, dtype)
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
        n, k = self.weight.shape[0], self.format.columns(self.weight)
        sizes = f"in_features={k}, out_features={n}, bias={self.bias is not None}"
        return f"{sizes}, {self.format.name}, dtype={self.dtype}, dynamic={self.dynamic}"


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
        self._hold(num_embeddings, embedding_dim, Scheme("int8", dynamic), device, dtype)
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
