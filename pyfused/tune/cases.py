"""Which calls does `pyfused tune --device cuda` measure? The operators', most valuable first, and the same in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .. import ops
from ..testing import problems
from ..testing.problems import Problem, Tensors, dense, fourier_mix, norm, relative_bias

linear = partial(problems.linear, residual=False)
ffn = partial(problems.ffn, activation="gelu_tanh", residual=False)
gated_ffn = partial(problems.gated_ffn, residual=False)


class Case(NamedTuple):
    """A problem, and the function of its operator that is measured: "forward" or "backward"."""

    operator: str
    function: str
    name: str
    problem: Problem


def _sdpa(t: Tensors, options: dict[str, Any]) -> torch.Tensor:
    query, key, bias = t["query"], t["key"], t.get("attn_bias")
    return F.scaled_dot_product_attention(query, key, t["value"], bias, enable_gqa=query.shape[1] != key.shape[1])


_BIASES = {"": "", "table": " relative bias", "bias": " dense bias"}


def attention(b: int, h: int, hkv: int, sq: int, sk: int, d: int, bias: str) -> Problem:
    """Attention with a bias of _BIASES. Plain PyTorch is SDPA with the bias as a dense tensor."""
    return problems.attention(b, h, hkv, sq, sk, d, bias, ways=(_sdpa,), dense=dense)


def linear_int8(rows: int, n: int, m: int, dynamic: bool = False) -> Problem:
    """A linear layer with int8 weights. dynamic: x is a multiple of its own step, so that rounding its rows changes nothing.
    Plain PyTorch widens the weights to x's dtype at each call."""

    def integers(t: torch.Tensor) -> torch.Tensor:
        return (t.float() * 40.0).round().clamp(-127, 127)

    def prepare(t: Tensors) -> Tensors:
        x = t["x"]
        if dynamic:
            rounded = integers(x)
            rounded[:, 0] = 127.0
            x = (rounded / 64.0).to(x.dtype)
        scale = t["scale"].float().abs() / 40.0 / n**0.5
        return {"x": x, "weight": integers(t["integers"]).to(torch.int8), "scale": scale, "bias": t["bias"]}

    def own(t: Tensors) -> Any:
        return ops.linear(t["x"], t["weight"], t["bias"], scale=t["scale"], dynamic=dynamic)

    def plain(t: Tensors) -> torch.Tensor:
        weight = (t["weight"].to(t["scale"].dtype) * t["scale"][:, None]).to(t["x"].dtype)
        return F.linear(t["x"], weight, t["bias"])

    shapes = {"x": (rows, n), "integers": (m, n), "scale": (m,), "bias": (m,)}
    return Problem(f"{rows}x{n}x{m}", shapes, own, (plain,), prepare=prepare)


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
            for kind, said in _BIASES.items():
                name = f"attention {function} D {d}{said}"
                yield Case("attention", function, name, attention(b, h, h, s, s, d, kind))
                if not quick and not tiny:
                    yield Case("attention", function, f"{name}, short", attention(8, 12, 12, 512, 512, d, kind))
                    yield Case("attention", function, f"{name}, one text", attention(1, 12, 12, 128, 128, d, kind))

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
        for kind in "", "table":
            make = attention(b, h, h, 1, few, d, kind)
            yield Case("attention", "forward", f"attention few queries D {d}{_BIASES[kind]}", make)
    yield from norms("forward")
    yield from norms("backward")
    for r in (1, 16) if quick or tiny else (1, 4, 16):
        yield Case("linear", "forward", f"linear {r} rows", linear(r, width, inner))
        if not tiny:
            yield Case("linear", "forward", f"linear {r} rows, a vocabulary", linear(r, 768, 50257))
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
        bias = relative_bias(h, s // 2, s // 2, buckets=4 if tiny else 32, dense=dense)
        yield Case("relative_bias", function, f"relative_bias {function}", bias)
