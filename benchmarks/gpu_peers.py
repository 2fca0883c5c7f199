"""How fast is attention beside SDPA's backends and FlexAttention? Forward and backward, with the outputs checked.

Where T5's bias is trained, pyfused and FlexAttention give the gradient of its table, SDPA that of a dense bias: what turns it
into the table's is not counted.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from gpu_device import DEVICE, DRY, Row, error_row, medians
from torch.nn.attention import SDPBackend, sdpa_kernel

import pyfused
from pyfused import dispatch
from pyfused.testing import judge, running


def _flex(block_mask: Any = None, buckets: torch.Tensor | None = None) -> Callable[..., torch.Tensor]:
    """FlexAttention's call, which with buckets takes T5's table and looks the bias up in it."""
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = 64  # one for each shape, variant and direction
    torch._functorch.config.donated_buffer = False  # the backward runs many times on one graph

    def plain(q, k, v):
        return flex_attention(q, k, v, block_mask=block_mask)

    def biased(q, k, v, table):
        span = buckets.shape[0] // 2

        def score_mod(score, batch, head, query, key):
            return score + table[buckets[(key - query).clamp(-span, span) + span], head]

        return flex_attention(q, k, v, score_mod=score_mod)

    call = plain if buckets is None else biased
    return call if DRY else torch.compile(call, dynamic=False)


def attention_shapes() -> tuple[tuple[int, int, int, int], ...]:
    return ((1, 1, 16, 64),) if DRY else ((8, 16, 2048, 64), (4, 16, 2048, 128))


class Variant(NamedTuple):
    name: str
    own: Callable[..., torch.Tensor]  # the calls take query, key and value, then the table, or SDPA's the dense bias
    sdpa: Callable[..., torch.Tensor]
    flex: Callable[..., torch.Tensor]
    table: torch.Tensor | None = None
    dense: torch.Tensor | None = None


class Provider(NamedTuple):
    context: Callable[[], Any]
    call: Callable[..., torch.Tensor]
    bias: torch.Tensor | None = None

    def inputs(self, heads: Sequence[torch.Tensor], trains: bool) -> list[torch.Tensor]:
        tensors = heads if self.bias is None else (*heads, self.bias)
        return [t.detach().requires_grad_(trains) for t in tensors]


def _variants(h: int, s: int) -> Iterator[Variant]:
    from torch.nn.attention.flex_attention import create_block_mask

    from pyfused.kernels.shared.buckets import distance_buckets

    causal = create_block_mask(lambda b, h, q, k: q >= k, None, None, s, s, device=DEVICE)
    table = torch.randn(32, h, device=DEVICE, dtype=torch.bfloat16)
    dense = pyfused.relative_bias(table, s, s, bidirectional=True)
    sdpa = F.scaled_dot_product_attention
    yield Variant("", pyfused.attention, sdpa, _flex())
    yield Variant(
        "T5 bias",
        lambda q, k, v, table: pyfused.attention(q, k, v, relative_bias=pyfused.RelativeBias(table, True)),
        sdpa,
        _flex(buckets=distance_buckets(True, table.shape[0], 128, table.device)),
        table,
        dense,
    )
    yield Variant("causal", partial(pyfused.attention, is_causal=True), partial(sdpa, is_causal=True), _flex(causal))


def flex(start: int, compile: str) -> Iterator[Row]:
    """Compiles FlexAttention's kernels while other items run. `peers` finds them on the disk."""
    for b, h, s, d in attention_shapes():
        q, k, v = heads(b, h, s, d)
        for variant in _variants(h, s):
            began = time.perf_counter()
            inputs = [t.requires_grad_(d == 64 and not DRY) for t in (q, k, v, variant.table) if t is not None]
            out = variant.flex(*inputs)
            if out.requires_grad:  # FlexAttention has no gradients on a CPU
                out.sum().backward()
            yield {"case": f"{d} {variant.name}".strip(), "seconds": time.perf_counter() - began}


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
            for variant in _variants(h, s):
                fused = partial(Provider, call=variant.own, bias=variant.table)
                sdpa = partial(Provider, call=variant.sdpa, bias=variant.dense)
                # gluon's backward is Triton's
                by_hand = {"pyfused gluon": partial(_gluon, True), "pyfused gluon, no turns": partial(_gluon, False)}
                providers = {
                    "pyfused": fused(contextlib.nullcontext),
                    **{f"pyfused {x}": fused(partial(running, x)) for x in ("triton", "cuda", "cudnn")},
                    **({} if backward else {name: fused(context) for name, context in by_hand.items()}),
                    **{f"sdpa {x}": sdpa(partial(sdpa_kernel, which)) for x, which in SDPA.items()},
                    "flex": Provider(contextlib.nullcontext, variant.flex, variant.table),
                }
                flops = 4 * b * h * s * s * d * (0.5 if variant.name == "causal" else 1) * (2.5 if backward else 1)
                title = f"{b}x{h}x{s}x{d} {'backward ' * backward}{variant.name}".strip()
                plain = partial(_plain, is_causal=variant.name == "causal")
                for row in _compare(providers, Provider(contextlib.nullcontext, plain, variant.dense), (q, k, v), backward):
                    if "seconds" in row:
                        row["tflops"] = flops / row["seconds"] / 1e12
                    yield {"case": title, **row}


@contextlib.contextmanager
def _gluon(turns: bool) -> Iterator[None]:
    """Inside the block the kernel for Hopper runs, whose warpgroups take turns or not."""
    kernel: Any = dispatch.kernel("gluon", "attention")
    before, kernel.TURNS = kernel.TURNS, turns
    try:
        with running("gluon"):
            yield
    finally:
        kernel.TURNS = before


def _compare(providers: dict[str, Provider], plain: Provider, heads: Sequence[torch.Tensor], backward: bool) -> Iterator[Row]:
    """Times the providers in turn. One that fails or is wrong gets a row that says so."""

    def result(provider: Provider, heads: Sequence[torch.Tensor]) -> torch.Tensor:
        """Four heads of the first batch entry: the output, or the keys' gradient. All are computed alike, and the tolerance
        rule runs on the CPU."""
        inputs = provider.inputs(heads, backward)
        with provider.context(), torch.set_grad_enabled(backward):
            out = provider.call(*inputs)
            found = torch.autograd.grad(out.square().sum() / 2, inputs[1])[0] if backward else out
        return found[:1, :4]

    first = [t[:1] for t in heads]
    truth, rounded = result(plain, [t.double() for t in first]), result(plain, first)
    to_time: dict[str, Callable[[], Any]] = {}
    ratios: dict[str, float] = {}
    for name, provider in providers.items():
        try:
            ratios[name] = judge(result(provider, heads), rounded, truth).ratio
            if ratios[name] > 1 and name.startswith("pyfused"):
                yield {"provider": name, "ok": False, "error": f"{ratios[name]:.2f} of what the tolerance rule allows"}
            else:
                to_time[name] = _call_to_time(provider, heads, backward)
        except Exception as error:
            yield {"provider": name, "missing": error_row(error)["error"][:200]}
    with torch.set_grad_enabled(backward):
        for name, seconds in medians(to_time).items():
            yield {"provider": name, "seconds": seconds, "ms": seconds * 1e3, "of_allowed": ratios[name]}


def _call_to_time(provider: Provider, heads: Sequence[torch.Tensor], backward: bool) -> Callable[[], Any]:
    """The forward, or only the backward of a forward that runs here. Each chooses its backend, so both run in the context."""
    inputs = provider.inputs(heads, backward)
    if not backward:

        def forward():
            with provider.context():
                return provider.call(*inputs)

        return forward
    with provider.context():
        out = provider.call(*inputs)
    grad = torch.randn_like(out)

    def gradients():
        with provider.context():
            return torch.autograd.grad(out, inputs, grad, retain_graph=True)

    return gradients


def _plain(q, k, v, attn_mask=None, is_causal=False):
    s = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    s = s if attn_mask is None else s + attn_mask.to(s.dtype)
    if is_causal:
        s = s.masked_fill(torch.ones(s.shape[-2:], device=s.device, dtype=torch.bool).triu(1), -torch.inf)
    return torch.softmax(s, -1) @ v
