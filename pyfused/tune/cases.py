"""Which calls does `pyfused tune --device cuda` measure? The operators', most valuable first, and the same in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .. import dispatch, ops
from ..arguments import AttentionForward

Tensors = dict[str, torch.Tensor]
New = Callable[..., torch.Tensor]


class Problem(NamedTuple):
    """One call of an operator.

    Attributes:
        tensors: its tensors by name.
        bind: tensors -> the arguments of the forward kernels.
        plain: tensors -> the results in plain PyTorch.
        backward: (forward arguments, forward outputs, gradients of the results) -> the arguments of the backward kernels.
        wants: the tensors whose gradients the backward returns, in its order.
    """

    tensors: Tensors
    bind: Callable[[Tensors], tuple[Any, ...]]
    plain: Callable[[Tensors], tuple[torch.Tensor, ...]]
    backward: Callable[..., tuple[Any, ...]] | None = None
    wants: tuple[str, ...] = ()


class Case(NamedTuple):
    """A problem that `make(new)` creates when it is measured; new(*shape) gives random numbers."""

    operator: str
    function: str
    name: str
    make: Callable[[New], Problem]


def saving(args: tuple[Any, ...], position: int) -> tuple[Any, ...]:
    """The arguments of a forward, with `save` (at this position) on: it keeps the tensors that its backward needs."""
    return (*args[:position], True, *args[position + 1 :])


def attention(b: int, h: int, hkv: int, sq: int, sk: int, d: int, relative: bool) -> Callable[[New], Problem]:
    """Attention (B, H, S, D), with T5's relative bias or without. Plain PyTorch is SDPA with the bias as a dense tensor."""

    def make(new: New) -> Problem:
        # (B, S, H, D) in memory, as a projection writes them
        shapes = {"query": (b, sq, h, d), "key": (b, sk, hkv, d), "value": (b, sk, hkv, d)}
        tensors = {name: new(*shape).transpose(1, 2) for name, shape in shapes.items()}
        if relative:
            tensors["table"] = new(32, h)

        def bind(t: Tensors) -> tuple[Any, ...]:
            bias = ops.RelativeBias(t["table"], True, 128) if relative else None
            return ops.MODULES["attention"].bind(t["query"], t["key"], t["value"], relative_bias=bias)

        def plain(t: Tensors) -> tuple[torch.Tensor, ...]:
            bias = dense(t["table"], sq, sk) if relative else None
            return (F.scaled_dot_product_attention(t["query"], t["key"], t["value"], bias, enable_gqa=h != hkv),)

        def backward(bound: tuple[Any, ...], outputs: Any, grads: Any) -> tuple[Any, ...]:
            return AttentionForward(*bound).backward(
                grads[0], outputs[0], outputs[1], wants_bias=False, wants_table=relative
            )

        return Problem(tensors, bind, plain, backward, (*shapes, *(("table",) if relative else ())))

    return make


def dense(table: torch.Tensor, query_length: int, key_length: int) -> torch.Tensor:
    """T5's bias as a dense tensor, for queries at the end of the keys."""
    reference: Any = dispatch.kernel("reference", "relative_bias")
    return reference.forward(table, query_length, key_length, True, 128, key_length - query_length)[0]


def norm(operator: str, rows: int, n: int, residual: bool) -> Callable[[New], Problem]:
    """layer_norm or rms_norm of (rows, n), with a residual added first or without."""
    centred = operator == "layer_norm"

    def make(new: New) -> Problem:
        tensors = {"x": new(rows, n), "weight": new(n)}
        tensors |= {"bias": new(n)} if centred else {}
        tensors |= {"residual": new(rows, n)} if residual else {}

        def bind(t: Tensors) -> tuple[Any, ...]:
            return ops.MODULES[operator].bind(**t)

        def plain(t: Tensors) -> tuple[torch.Tensor, ...]:
            total = t["x"] + t["residual"] if residual else t["x"]
            if centred:
                y = F.layer_norm(total, (n,), t["weight"], t["bias"], 1e-5)
            else:
                y = F.rms_norm(total, (n,), t["weight"], 1e-6)
            return (y, total) if residual else (y,)

        def backward(bound: tuple[Any, ...], outputs: Any, grads: Any) -> tuple[Any, ...]:
            statistics = [t for t in outputs[2:] if t is not None]
            of_total = grads[1] if residual else None
            normalised = outputs[1] if residual else bound[0]
            return (grads[0], of_total, normalised, bound[1], *statistics, *((True,) if centred else ()))

        return Problem(tensors, bind, plain, backward, ("x", "weight", *(("bias",) if centred else ())))

    return make


def linear(rows: int, n: int, m: int) -> Callable[[New], Problem]:
    """A linear layer with bias, (rows, n) to (rows, m)."""

    def make(new: New) -> Problem:
        tensors = {"x": new(rows, n), "weight": new(m, n) / n**0.5, "bias": new(m)}

        def bind(t: Tensors) -> tuple[Any, ...]:
            return ops.MODULES["linear"].bind(**t)

        return Problem(tensors, bind, lambda t: (F.linear(t["x"], t["weight"], t["bias"]),))

    return make


def linear_int8(rows: int, n: int, m: int, dynamic: bool = False) -> Callable[[New], Problem]:
    """The same with int8 weights. dynamic: x is a multiple of its own step, so that rounding its rows changes nothing. Plain
    PyTorch widens the weights to x's dtype at each call."""

    def make(new: New) -> Problem:
        weight = (new(m, n).float() * 40.0).round().clamp(-127, 127).to(torch.int8)
        x = new(rows, n)
        dtype = x.dtype
        if dynamic:
            x = (x.float() * 40.0).round().clamp(-127, 127)
            x[:, 0] = 127.0
            x = (x / 64.0).to(dtype)
        tensors = {"x": x, "weight": weight, "scale": new(m).float().abs() / 40.0 / n**0.5, "bias": new(m)}

        def bind(t: Tensors) -> tuple[Any, ...]:
            return ops.MODULES["linear"].bind(t["x"], t["weight"], t["bias"], scale=t["scale"], dynamic=dynamic)

        def plain(t: Tensors) -> tuple[torch.Tensor, ...]:
            weight = (t["weight"].to(t["scale"].dtype) * t["scale"][:, None]).to(t["x"].dtype)
            return (F.linear(t["x"], weight, t["bias"]),)

        return Problem(tensors, bind, plain)

    return make


def ffn(rows: int, n: int, f: int) -> Callable[[New], Problem]:
    """GPT-2's feed-forward network of (rows, n): inner width f, tanh GELU, biases."""

    def make(new: New) -> Problem:
        tensors = {"x": new(rows, n), "w_in": new(f, n) / n**0.5, "b_in": new(f)}
        tensors |= {"w_out": new(n, f) / f**0.5, "b_out": new(n)}

        def bind(t: Tensors) -> tuple[Any, ...]:
            return ops.MODULES["ffn"].bind(**t, activation="gelu_tanh")

        def plain(t: Tensors) -> tuple[torch.Tensor, ...]:
            inner = F.gelu(F.linear(t["x"], t["w_in"], t["b_in"]), approximate="tanh")
            return (F.linear(inner, t["w_out"], t["b_out"]),)

        def backward(bound: tuple[Any, ...], outputs: Any, grads: Any) -> tuple[Any, ...]:
            return (grads[0], bound[0], bound[1], bound[3], outputs[1], bound[5], *[True] * 5)

        return Problem(tensors, bind, plain, backward, tuple(tensors))

    return make


def gated_ffn(rows: int, n: int, f: int) -> Callable[[New], Problem]:
    """T5 1.1's gated feed-forward network of (rows, n): inner width f, tanh GELU on the gate, no biases."""

    def make(new: New) -> Problem:
        tensors = {"x": new(rows, n), "w_gate": new(f, n) / n**0.5, "w_up": new(f, n) / n**0.5}
        tensors |= {"w_out": new(n, f) / f**0.5}

        def bind(t: Tensors) -> tuple[Any, ...]:
            return ops.MODULES["gated_ffn"].bind(**t, activation="gelu_tanh")

        def plain(t: Tensors) -> tuple[torch.Tensor, ...]:
            gate = F.gelu(F.linear(t["x"], t["w_gate"]), approximate="tanh")
            return (F.linear(gate * F.linear(t["x"], t["w_up"]), t["w_out"]),)

        def backward(bound: tuple[Any, ...], outputs: Any, grads: Any) -> tuple[Any, ...]:
            return (grads[0], *bound[:4], *outputs[1:3], bound[4], *[True] * 4)

        return Problem(tensors, bind, plain, backward, tuple(tensors))

    return make


def fourier_mix(b: int, s: int, n: int) -> Callable[[New], Problem]:
    """FNet's Fourier mixing of (B, S, N). torch.fft takes half precision only for powers of two, so plain PyTorch widens."""

    def plain(t: Tensors) -> tuple[torch.Tensor, ...]:
        x = t["x"]
        wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
        return (torch.fft.fft2(wide).real.to(x.dtype),)

    return lambda new: Problem({"x": new(b, s, n)}, lambda t: ops.MODULES["fourier_mix"].bind(**t), plain)


def relative_bias(h: int, sq: int, sk: int, buckets: int = 32) -> Callable[[New], Problem]:
    """T5's bias (1, H, Sq, Sk) from its table (buckets, H), for queries at the end of the keys."""

    def bind(t: Tensors) -> tuple[Any, ...]:
        options = {"bidirectional": True, "max_distance": 128, "query_offset": sk - sq}
        return ops.MODULES["relative_bias"].bind(t["table"], sq, sk, **options)

    def backward(bound: tuple[Any, ...], outputs: Any, grads: Any) -> tuple[Any, ...]:
        return (grads[0], bound[0].shape[0], *bound[3:])

    return lambda new: Problem(
        {"table": new(buckets, h)}, bind, lambda t: (dense(t["table"], sq, sk),), backward, ("table",)
    )


def cases(quick: bool = False, tiny: bool = False) -> Iterator[Case]:
    """The calls to measure, most valuable first.

    Args:
        quick: one size for each class of shapes.
        tiny: sizes for a dry run in Triton's interpreter.
    """
    s, few, rows, width, inner = (8, 16, 4, 16, 32) if tiny else (2048, 1024, 16384, 1024, 4096)
    b, h, many = (1, 2, 20) if tiny else (4, 16, 4096)
    heads = (64,) if tiny else (64, 128)

    def attend(function: str) -> Iterator[Case]:
        for d in heads:
            for relative in (False, True):
                name = f"attention {function} D {d}{' relative bias' * relative}"
                yield Case("attention", function, name, attention(b, h, h, s, s, d, relative))
                if not quick and not tiny:
                    yield Case("attention", function, f"{name}, short", attention(8, 12, 12, 512, 512, d, relative))
                    yield Case("attention", function, f"{name}, one text", attention(1, 12, 12, 128, 128, d, relative))

    def norms(function: str) -> Iterator[Case]:
        for operator in ("layer_norm", "rms_norm"):
            for residual in (True,) if quick else (True, False):
                for r, n in (
                    ((rows, width),) if quick or tiny else ((rows, width), (rows, 768), (4096, 4096), (16, width))
                ):
                    name = f"{operator} {function} {r}x{n}{' residual' * residual}"
                    yield Case(operator, function, name, norm(operator, r, n, residual))

    yield from attend("forward")
    yield from attend("backward")
    for d in heads:
        for relative in (False, True):
            make = attention(b, h, h, 1, few, d, relative)
            yield Case("attention", "forward", f"attention few queries D {d}{' relative bias' * relative}", make)
    yield from norms("forward")
    yield from norms("backward")
    for r in (1, 16) if quick or tiny else (1, 4, 16):
        yield Case("linear", "forward", f"linear {r} rows", linear(r, width, inner))
        yield Case("linear", "forward", f"linear int8 {r} rows", linear_int8(r, width, inner))
        yield Case("ffn", "forward", f"ffn {r} rows", ffn(r, width, inner))
        yield Case("gated_ffn", "forward", f"gated_ffn {r} rows", gated_ffn(r, width, inner))
    for function in ("forward", "backward"):
        yield Case("gated_ffn", function, f"gated_ffn {function} {many} rows", gated_ffn(many, width, inner))
        yield Case("ffn", function, f"ffn {function} {many} rows", ffn(many, width, inner))
    yield Case("linear", "forward", f"linear {many} rows", linear(many, width, inner))
    for dynamic in (False, True):
        name = f"linear int8 {many} rows{' dynamic' * dynamic}"
        yield Case("linear", "forward", name, linear_int8(many, width, inner, dynamic))
    yield Case("fourier_mix", "forward", "fourier_mix", fourier_mix(2, 7, 12) if tiny else fourier_mix(64, 512, 768))
    for function in ("forward", "backward"):
        yield Case(
            "relative_bias", function, f"relative_bias {function}", relative_bias(h, s // 2, s // 2, 4 if tiny else 32)
        )
