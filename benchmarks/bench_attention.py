"""attention beside scaled_dot_product_attention: plain, causal, padded, packed, biased, one query on a cache, and training.

pyfused computes T5's bias inside its kernel. PyTorch needs a dense tensor: inference gets it ready-made, training computes it
in every step.
"""

from functools import partial

import torch
import torch.nn.functional as F

import pyfused
from pyfused.bench import Calls, Case, training
from pyfused.bench.peers import backends, flex, sdpa, sdpa_by_name

CPU = (1, 12, 128, 64), (1, 12, 512, 64), (2, 16, 1024, 64), (1, 12, 512, 80)
GPU = (16, 12, 2048, 64), (4, 16, 2048, 128), (64, 12, 512, 64)
SMALL = [(2, 2, 9, 8)]
QUERY = (1, 12, 160, 64), (1, 12, 1024, 64), (8, 12, 1024, 64)
TRAIN = (8, 4, 256, 40), (1, 12, 512, 64)
LENGTHS = 128, 96, 64, 32, 112, 40, 24, 16
VARIANTS = "", " causal", " dense bias", " T5 bias", " half padding"


def cases(setup):
    for dtype in setup.dtypes:
        for shape in setup.pick(CPU, GPU, SMALL):
            for variant in VARIANTS:
                yield Case("x".join(map(str, shape)) + variant, dtype, partial(forward, setup, shape, variant, dtype))
        for heads, size, lengths in setup.pick([(12, 64, LENGTHS)], [(12, 64, range(16, 513, 16))], [(2, 8, (3, 5))]):
            name = (
                f"packed {len(lengths)} texts, {sum(lengths)} of {len(lengths) * max(lengths)} tokens, {heads}x{size}"
            )
            yield Case(name, dtype, partial(packed, setup, heads, size, tuple(lengths), dtype))
        for shape in setup.pick(QUERY, [(1, 12, 1000, 64), (16, 12, 1000, 64)], [(1, 2, 9, 8)]):
            yield Case(f"one query {'x'.join(map(str, shape))}", dtype, partial(one_query, setup, shape, dtype))
        for shape in setup.pick(TRAIN, GPU, SMALL):
            for variant in ("", " causal", " T5 bias"):
                name = f"train {'x'.join(map(str, shape))}{variant}"
                yield Case(name, dtype, partial(train, setup, shape, variant, dtype))


def heads_of(setup, shape, dtype, count=3):
    """(B, H, S, D) tensors stored as (B, S, H, D), as projections write them."""
    b, h, s, d = shape
    return [setup.randn(b, s, h, d, dtype=dtype).transpose(1, 2) for _ in range(count)]


def forward(setup, shape, variant, dtype):
    b, h, s, _ = shape
    more, own, other = (), {}, {}
    if variant == " causal":
        own = other = {"is_causal": True}
    elif variant == " dense bias":
        more = (setup.randn(1, h, s, s, dtype=dtype),)
        own = {"attn_bias": more[0]}
    elif variant == " T5 bias":
        table = setup.randn(32, h, dtype=dtype)
        own = {"relative_bias": pyfused.RelativeBias(table, True)}
        more = (pyfused.relative_bias(table, s, s, bidirectional=True),)
    elif variant == " half padding":
        keep = torch.ones(b, s, dtype=torch.bool, device=setup.device)
        keep[:, s // 2 :] = False
        own, more = {"padding_mask": keep}, (keep[:, None, None, :],)

    def fused(query, key, value, *_):
        return pyfused.attention(query, key, value, **own)

    plain = sdpa(**other)
    peers = {**backends(fused), **sdpa_by_name(plain)}
    if (shape == CPU[1] or setup.device == "cuda") and variant in ("", " causal", " T5 bias"):
        peers.update(flex(variant, shape, own.get("relative_bias"), setup.device))
    return Calls(fused, plain, (*heads_of(setup, shape, dtype), *more), peers=peers, baseline="sdpa")


def packed(setup, h, d, lengths, dtype):
    """Packed sequences beside the padded batch with a mask; half of the padded batch is padding."""
    b, s = len(lengths), max(lengths)
    real = torch.arange(s, device=setup.device) < torch.tensor(lengths, device=setup.device)[:, None]
    ends = torch.tensor([0, *lengths], device=setup.device, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    inputs = tuple(heads_of(setup, (b, h, s, d), dtype))
    query, key, value = (t.transpose(1, 2)[real].transpose(0, 1)[None] for t in inputs)

    def fused(*_):
        return pyfused.attention(query, key, value, cu_seqlens=ends, max_seqlen=s)[0].transpose(0, 1)

    def plain(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None]).transpose(1, 2)[real]

    return Calls(fused, plain, inputs, peers=backends(fused), baseline="sdpa")


def one_query(setup, shape, dtype):
    """One query against the first rows of a longer cache, as in generation."""
    b, h, s, d = shape
    query = setup.randn(b, 1, h, d, dtype=dtype).transpose(1, 2)
    key, value = (setup.randn(b, h, s + 64, d, dtype=dtype)[:, :, :s] for _ in range(2))

    def fused(query, key, value):
        return pyfused.attention(query, key, value, is_causal=True)

    peers = {**backends(fused), **sdpa_by_name(sdpa())}
    return Calls(fused, sdpa(), (query, key, value), peers=peers, baseline="sdpa")


def train(setup, shape, variant, dtype):
    _, h, s, _ = shape
    leaves = [t.detach().requires_grad_() for t in heads_of(setup, shape, dtype)]
    grad = heads_of(setup, shape, dtype, 1)
    causal = {"is_causal": variant == " causal"}
    if variant == " T5 bias":
        leaves.append(setup.randn(32, h, dtype=dtype).requires_grad_())

        def fused(query, key, value, table):
            return pyfused.attention(query, key, value, relative_bias=pyfused.RelativeBias(table, True))

        def plain(query, key, value, table):
            dense = pyfused.relative_bias(table, s, s, bidirectional=True)
            return F.scaled_dot_product_attention(query, key, value, attn_mask=dense)

    else:

        def fused(query, key, value):
            return pyfused.attention(query, key, value, **causal)

        plain = sdpa(**causal)
    own, other = training(fused), training(plain)
    peers = {**backends(own), **sdpa_by_name(other)}
    return Calls(own, other, (*leaves, *grad), peers=peers, baseline="sdpa", trains=True)
