"""Which calls of an operator are checked and measured, and what is the same in plain PyTorch?

`pyfused tune` measures them, benchmarks/gpu_correct.py checks them on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .. import ops
from ..kernels.reference import relative_bias as reference

Tensors = dict[str, Any]
Call = Callable[[Tensors], Any]


@dataclass(frozen=True)
class Problem:
    """One call of an operator.

    Args:
        name: such as "17x1000 residual".
        shapes: shapes of the inputs by name. Matrices whose names start with "w" are scaled like a layer's weights.
        own: the call.
        plain: the same in plain PyTorch. A second way, if there is one, sets the scale for gradients.
        gradients: whether the gradients of all inputs are checked too.
        prepare: changes the random inputs, such as to integers.
    """

    name: str
    shapes: dict[str, tuple[int, ...]]
    own: Call
    plain: tuple[Call, ...]
    gradients: bool = True
    prepare: Callable[[Tensors], Tensors] = lambda tensors: tensors

    def inputs(self, dtype: torch.dtype, device: Any, generator: torch.Generator | None = None) -> Tensors:
        """Normal numbers."""
        found = {}
        for name, shape in self.shapes.items():
            scale = shape[-1] ** -0.5 if name.startswith("w") and len(shape) == 2 else 1.0
            t = (torch.randn(shape, device=device, generator=generator) * scale).to(dtype)
            if name in ("query", "key", "value"):  # (B, S, H, D) in memory, as a projection writes them
                t = t.transpose(1, 2).contiguous().transpose(1, 2)
            found[name] = t
        return self.prepare(found)


def outputs_of(result: Any) -> tuple[torch.Tensor, ...]:
    """A call's result, one tensor or several."""
    return result if isinstance(result, tuple) else (result,)


def norm(operator: str, rows: int, n: int, residual: bool) -> Problem:
    """layer_norm or rms_norm of (rows, n)."""
    shapes = {"x": (rows, n), "weight": (n,), **({"bias": (n,)} if operator == "layer_norm" else {})}
    shapes |= {"residual": (rows, n)} if residual else {}

    def plain(t: Tensors) -> Any:
        total = t["x"] + t["residual"] if residual else t["x"]
        if operator == "rms_norm":
            y = F.rms_norm(total, (n,), t["weight"], 1e-6)
        else:
            y = F.layer_norm(total, (n,), t["weight"], t["bias"])
        return (y, total) if residual else y

    return Problem(f"{rows}x{n}{' residual' * residual}", shapes, lambda t: getattr(ops, operator)(**t), (plain,))


def _added(y: torch.Tensor, t: Tensors) -> torch.Tensor:
    return y + t["residual"] if "residual" in t else y


def linear(rows: int, n: int, m: int, residual: bool = True) -> Problem:
    """A linear layer with bias, (rows, n) to (rows, m)."""
    shapes = {"x": (rows, n), "weight": (m, n), "bias": (m,)}
    shapes |= {"residual": (rows, m)} if residual else {}

    def plain(t: Tensors) -> Any:
        return _added(F.linear(t["x"], t["weight"], t["bias"]), t)

    return Problem(f"{rows}x{n}x{m}", shapes, lambda t: ops.linear(**t), (plain,))


def ffn(rows: int, n: int, f: int, activation: str = "gelu", residual: bool = True) -> Problem:
    """A feed-forward network of (rows, n): inner width f, GELU, biases."""
    shapes = {"x": (rows, n), "w_in": (f, n), "b_in": (f,), "w_out": (n, f), "b_out": (n,)}
    shapes |= {"residual": (rows, n)} if residual else {}
    formula = "tanh" if activation == "gelu_tanh" else "none"

    def plain(t: Tensors) -> Any:
        hidden = F.gelu(F.linear(t["x"], t["w_in"], t["b_in"]), approximate=formula)
        return _added(F.linear(hidden, t["w_out"], t["b_out"]), t)

    return Problem(f"{rows}x{n}x{f}", shapes, lambda t: ops.ffn(**t, activation=activation), (plain,))


def gated_ffn(rows: int, n: int, f: int, residual: bool = True) -> Problem:
    """T5 1.1's gated feed-forward network of (rows, n): inner width f, tanh GELU on the gate, no biases."""
    shapes: dict[str, tuple[int, ...]] = {"x": (rows, n), "w_gate": (f, n), "w_up": (f, n), "w_out": (n, f)}
    shapes |= {"residual": (rows, n)} if residual else {}

    def plain(t: Tensors) -> Any:
        gate = F.gelu(F.linear(t["x"], t["w_gate"]), approximate="tanh")
        return _added(F.linear(gate * F.linear(t["x"], t["w_up"]), t["w_out"]), t)

    return Problem(f"{rows}x{n}x{f}", shapes, lambda t: ops.gated_ffn(**t, activation="gelu_tanh"), (plain,))


def fourier_mix(*shape: int) -> Problem:
    """(B, S, N). torch.fft takes half precision only for powers of two, so plain PyTorch widens."""

    def plain(t: Tensors) -> Any:
        x = t["x"]
        return torch.fft.fft2(x if x.dtype == torch.float64 else x.float()).real.to(x.dtype)

    return Problem("x".join(map(str, shape)), {"x": shape}, lambda t: ops.fourier_mix(t["x"]), (plain,))


def dense(table: torch.Tensor, sq: int, sk: int, bidirectional: bool = True) -> torch.Tensor:
    """T5's bias as a tensor, for queries at the end of the keys."""
    return reference.forward(table, sq, sk, bidirectional, 128, sk - sq)[0]


def gathered(table: torch.Tensor, sq: int, sk: int, bidirectional: bool = True) -> torch.Tensor:
    """The same. Its gradient is a sum over all pairs, so it is computed at least in float32 to set a sensible scale."""
    return dense(table if table.dtype == torch.float64 else table.float(), sq, sk, bidirectional).to(table.dtype)


def relative_bias(
    heads: int, sq: int, sk: int, bidirectional: bool = True, buckets: int = 32, dense: Any = gathered
) -> Problem:
    """T5's bias (1, H, Sq, Sk) from its table (buckets, H), for queries at the end of the keys."""

    def own(t: Tensors) -> Any:
        return ops.relative_bias(t["table"], sq, sk, bidirectional=bidirectional, query_offset=sk - sq)

    def plain(t: Tensors) -> Any:
        return dense(t["table"], sq, sk, bidirectional)

    name = f"{heads}x{sq}x{sk}{'' if bidirectional else ' causal'}"
    return Problem(name, {"table": (buckets, heads)}, own, (plain,))


def attention(
    b: int,
    h: int,
    hkv: int,
    sq: int,
    sk: int,
    d: int,
    *options: str,
    ways: tuple[Callable[[Tensors, dict[str, Any]], Any], ...],
    gradients: bool = True,
    dense: Any = gathered,
) -> Problem:
    """Attention.

    options: "causal", "padding", "bias" (dense), "table" (T5's). ways: plain PyTorch's functions. They take the tensors, with
    attn_bias in place of a table, and a dict of is_causal, scale and, with "padding", padding_mask.
    """
    shapes: dict[str, tuple[int, ...]] = {"query": (b, h, sq, d), "key": (b, hkv, sk, d), "value": (b, hkv, sk, d)}
    shapes |= {"attn_bias": (1, h, sq, sk)} if "bias" in options else {}
    shapes |= {"table": (32, h)} if "table" in options else {}

    def shared(t: Tensors) -> dict[str, Any]:
        given: dict[str, Any] = {"is_causal": "causal" in options, "scale": None}
        if "padding" in options:  # lengths from half of sk to sk
            lengths = torch.linspace((sk + 1) // 2, sk, b, device=t["query"].device).long()
            given["padding_mask"] = torch.arange(sk, device=lengths.device) < lengths[:, None]
        return given

    def own(t: Tensors) -> Any:
        given: dict[str, Any] = {**t, **shared(t)}
        if "table" in t:
            given["relative_bias"] = ops.RelativeBias(given.pop("table"), True)
        return ops.attention(**given)

    def plainly(way: Any) -> Call:
        def plain(t: Tensors) -> Any:
            inputs = dict(t)
            if "table" in t:
                inputs["attn_bias"] = dense(inputs.pop("table"), sq, sk)
            return way(inputs, shared(t))

        return plain

    name = " ".join([f"{b}x{h}/{hkv}x{sq}/{sk}x{d}", *options])
    return Problem(name, shapes, own, tuple(map(plainly, ways)), gradients)
