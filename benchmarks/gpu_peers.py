"""How fast is attention beside SDPA's backends and FlexAttention? Forward and backward, with the outputs checked."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu_device import DEVICE, DRY, Row, error_row, medians
from torch.nn.attention import SDPBackend, sdpa_kernel

import pyfused
from pyfused.testing import judge, running


def _score_mod(table: torch.Tensor) -> Callable[..., torch.Tensor]:
    """T5's bias for FlexAttention, looked up in the table by bucket."""
    from pyfused.kernels.shared.buckets import distance_buckets

    buckets = distance_buckets(True, table.shape[0], 128, table.device)
    span = buckets.shape[0] // 2

    def score_mod(score, batch, head, query, key):
        return score + table[buckets[(key - query).clamp(-span, span) + span], head]

    return score_mod


def _flex(score_mod: Any, block_mask: Any) -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = 64  # one for each shape, variant and direction
    torch._functorch.config.donated_buffer = False  # the backward runs many times on one graph
    call: Any = flex_attention if DRY else torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: call(q, k, v, score_mod=score_mod, block_mask=block_mask)


def attention_shapes() -> tuple[tuple[int, int, int, int], ...]:
    return ((1, 1, 16, 64),) if DRY else ((8, 16, 2048, 64), (4, 16, 2048, 128))


def _variants(h: int, s: int) -> Iterator[tuple[str, dict[str, Any], dict[str, Any], Callable[..., Any]]]:
    """(name, options for pyfused, for SDPA, FlexAttention's call)."""
    from torch.nn.attention.flex_attention import create_block_mask

    causal = create_block_mask(lambda b, h, q, k: q >= k, None, None, s, s, device=DEVICE)
    table = torch.randn(32, h, device=DEVICE, dtype=torch.bfloat16)
    dense = pyfused.relative_bias(table, s, s, bidirectional=True)
    yield "", {}, {}, _flex(None, None)
    yield (
        "T5 bias",
        {"relative_bias": pyfused.RelativeBias(table, True)},
        {"attn_mask": dense},
        _flex(_score_mod(table), None),
    )
    yield "causal", {"is_causal": True}, {"is_causal": True}, _flex(None, causal)


def flex(start: int, compile: str) -> Iterator[Row]:
    """Compiles FlexAttention's kernels while other items run. `peers` finds them on the disk."""
    for b, h, s, d in attention_shapes():
        q, k, v = heads(b, h, s, d)
        for name, _, _, call in _variants(h, s):
            began = time.perf_counter()
            for t in (q, k, v):
                t.requires_grad_(d == 64 and not DRY)
            out = call(q, k, v)
            if out.requires_grad:  # FlexAttention has no gradients on a CPU
                out.sum().backward()
            yield {"case": f"{d} {name}".strip(), "seconds": time.perf_counter() - began}


def heads(b: int, h: int, s: int, d: int) -> list[torch.Tensor]:
    return [torch.randn(b, s, h, d, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3)]


SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def peers(start: int) -> Iterator[Row]:
    """Attention beside each of SDPA's backends and FlexAttention: milliseconds and TFLOP/s, with each output checked."""
    for b, h, s, d in attention_shapes():
        q, k, v = heads(b, h, s, d)
        for backward in (False, True) if d == 64 or DRY else (False,):
            for name, own, options, by_flex in _variants(h, s):

                def fused(q, k, v, own=own):
                    return pyfused.attention(q, k, v, **own)

                def sdpa(q, k, v, options=options):
                    return F.scaled_dot_product_attention(q, k, v, **options)

                providers = {
                    "pyfused": (contextlib.nullcontext, fused),
                    **{f"pyfused {x}": (partial(running, x), fused) for x in ("triton", "cuda", "cudnn")},
                    **({} if backward else {"pyfused gluon": (partial(running, "gluon"), fused)}),  # its backward is Triton's
                    **{f"sdpa {x}": (partial(sdpa_kernel, which), sdpa) for x, which in SDPA.items()},
                    "flex": (contextlib.nullcontext, by_flex),
                }
                flops = 4 * b * h * s * s * d * (0.5 if name == "causal" else 1) * (2.5 if backward else 1)
                title = f"{b}x{h}x{s}x{d} {'backward ' * backward}{name}".strip()
                for row in _compare(providers, options, (q, k, v), backward):
                    if "seconds" in row:
                        row["tflops"] = flops / row["seconds"] / 1e12
                    yield {"case": title, **row}


def _compare(providers: dict[str, Any], options: Row, inputs: Any, backward: bool) -> Iterator[Row]:
    """Times the providers, name -> (context, call), in turn. A provider that fails or is wrong gets a row that says so."""

    def result(call: Callable[..., Any], tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        if not backward:
            with torch.no_grad():
                return call(*tensors)
        leaves = [t.detach().requires_grad_() for t in tensors]
        return torch.autograd.grad(call(*leaves).square().sum() / 2, leaves[1])[0]

    def some(t: torch.Tensor) -> torch.Tensor:
        """Four heads of the first batch entry. All are computed alike, and the tolerance rule runs on the CPU."""
        return t[:1, :4]

    first = [t[:1] for t in inputs]
    truth = some(result(lambda q, k, v: _plain(q, k, v, **options), [t.double() for t in first]))
    plain = some(result(lambda q, k, v: _plain(q, k, v, **options), first))
    to_time: dict[str, Callable[[], Any]] = {}
    ratios: dict[str, float] = {}
    for name, (context, call) in providers.items():
        try:
            with context():
                ratios[name] = judge(some(result(call, inputs)), plain, truth).ratio
        except Exception as error:
            yield {"provider": name, "missing": error_row(error)["error"][:200]}
            continue
        if ratios[name] > 1 and name.startswith("pyfused"):
            yield {"provider": name, "ok": False, "error": f"{ratios[name]:.2f} of what the tolerance rule allows"}
        else:
            to_time[name] = _call_to_time(context, call, inputs, backward)
    with torch.set_grad_enabled(backward):
        for name, seconds in medians(to_time).items():
            yield {"provider": name, "seconds": seconds, "ms": seconds * 1e3, "of_allowed": ratios[name]}


def _call_to_time(context: Any, call: Callable[..., Any], inputs: Any, backward: bool) -> Callable[[], Any]:
    """The forward, or only the backward of a forward that runs here. Each chooses its backend, so both run in the context."""
    if not backward:

        def forward():
            with context():
                return call(*inputs)

        return forward
    leaves = [t.detach().requires_grad_() for t in inputs]
    with context():
        out = call(*leaves)
    grad = torch.randn_like(out)

    def gradients():
        with context():
            return torch.autograd.grad(out, leaves, grad, retain_graph=True)

    return gradients


def _plain(q, k, v, attn_mask=None, is_causal=False):
    s = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    s = s if attn_mask is None else s + attn_mask.to(s.dtype)
    if is_causal:
        s = s.masked_fill(torch.ones(s.shape[-2:], device=s.device, dtype=torch.bool).triu(1), -torch.inf)
    return torch.softmax(s, -1) @ v
