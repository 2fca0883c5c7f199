"""attention beside scaled_dot_product_attention: plain, causal, padded, packed, biased, decoding, and training.

T5's bias is computed in pyfused's kernel, and given to PyTorch as the dense tensor that it needs, made beforehand.

4 B H Sq Sk D float operations forward (half of that where causal), and 3 Sq Sk exponentials a head do not count.
"""

import torch
import torch.nn.functional as F

import pyfused
from pyfused.bench import Case

from .peers import beside, in_double, sdpa


def cases(device):
    if device == "cuda":
        yield from on_gpu(device)
        return
    for b, h, s, d in [(1, 12, 128, 64), (1, 12, 512, 64), (2, 16, 1024, 64), (1, 12, 512, 80)]:
        q, k, v = (torch.randn(b, s, h, d, device=device).transpose(1, 2) for _ in range(3))
        bias = torch.randn(1, h, s, s, device=device)
        relative = pyfused.RelativeBias(torch.randn(32, h, device=device), True)
        t5 = pyfused.relative_bias(relative.table, s, s, bidirectional=True)
        keep = torch.ones(b, s, dtype=torch.bool, device=device)
        keep[:, s // 2 :] = False
        name, flops = f"{b}x{h}x{s}x{d}", 4 * b * h * s * s * d
        variants = {
            "": ({}, {}, 1.0),
            " causal": ({"is_causal": True}, {"is_causal": True}, 0.5),
            " dense bias": ({"attn_bias": bias}, {"attn_mask": bias}, 1.0),
            " T5 bias": ({"relative_bias": relative}, {"attn_mask": t5}, 1.0),
            " half padding": ({"padding_mask": keep}, {"attn_mask": keep[:, None, None, :]}, 0.5),
        }
        for label, (own, other, share) in variants.items():
            with torch.no_grad():
                providers = {"pyfused": lambda own=own: pyfused.attention(q, k, v, **own)}
                providers.update(sdpa(device, q, k, v, **other))
                yield Case(name + label, providers, exact_sdpa(q, k, v, **other), flops=share * flops)
    with torch.no_grad():
        yield packed_case(device, torch.float32, 12, 64, (128, 96, 64, 32, 112, 40, 24, 16))
    for b, h, s, d in [(1, 12, 160, 64), (1, 12, 1024, 64), (8, 12, 1024, 64)]:
        q = torch.randn(b, 1, h, d, device=device).transpose(1, 2)
        k, v = (torch.randn(b, h, 1024, d, device=device)[:, :, :s] for _ in range(2))
        with torch.no_grad():
            yield Case(
                f"decode {b}x{h}x{s}x{d}",
                {
                    "pyfused": lambda: pyfused.attention(q, k, v, is_causal=True),
                    "torch": lambda: F.scaled_dot_product_attention(q, k, v),
                },
                exact_sdpa(q, k, v),
                bytes=2 * b * h * s * d * 4,
            )
    for b, h, s, d in [(8, 4, 256, 40), (1, 12, 512, 64)]:
        q, k, v = (torch.randn(b, s, h, d, device=device).transpose(1, 2).requires_grad_() for _ in range(3))
        g = torch.randn(b, s, h, d, device=device).transpose(1, 2)

        def train(call, q=q, k=k, v=v, g=g):
            return torch.autograd.grad(call(q, k, v, is_causal=True), (q, k, v), g)

        def plain(q=q, k=k, v=v, g=g):
            return train(F.scaled_dot_product_attention, q, k, v, g)

        yield Case(
            f"train {b}x{h}x{s}x{d} causal",
            {
                "pyfused": lambda: train(pyfused.attention),
                "torch": plain,
            },
            in_double(plain),
            flops=14 * b * h * s * s * d / 2,
        )
    for b, h, s, d in [(1, 12, 512, 64)]:
        q, k, v = (torch.randn(b, s, h, d, device=device).transpose(1, 2).requires_grad_() for _ in range(3))
        g = torch.randn(b, s, h, d, device=device).transpose(1, 2)
        table = torch.randn(32, h, device=device, requires_grad=True)

        def fused(q, k, v, table):
            return pyfused.attention(q, k, v, relative_bias=pyfused.RelativeBias(table, True))

        def dense(q, k, v, table):
            bias = pyfused.relative_bias(table, q.shape[2], k.shape[2], bidirectional=True)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

        def train_biased(call, q=q, k=k, v=v, table=table, g=g):
            return torch.autograd.grad(call(q, k, v, table), (q, k, v, table), g)

        def plain_biased(q=q, k=k, v=v, table=table, g=g):
            return train_biased(dense, q, k, v, table, g)

        yield Case(
            f"train {b}x{h}x{s}x{d} T5 bias",
            {"pyfused": lambda: train_biased(fused), "torch": plain_biased},
            in_double(plain_biased),
            flops=14 * b * h * s * s * d,
        )


def exact_sdpa(query, key, value, attn_mask=None, is_causal=False):
    def plain(query=query, key=key, value=value, attn_mask=attn_mask):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, is_causal=is_causal)

    return in_double(plain)


def packed_case(device, dtype, h, d, lengths):
    """Sequences without their padding, beside the padded batch with a mask; half of the padded batch is padding."""
    b, s, total = len(lengths), max(lengths), sum(lengths)
    padded = [torch.randn(b, s, h, d, device=device, dtype=dtype).transpose(1, 2) for _ in range(3)]
    real = torch.arange(s, device=device) < torch.tensor(lengths, device=device)[:, None]
    q, k, v = (t.transpose(1, 2)[real].transpose(0, 1)[None] for t in padded)
    ends = torch.tensor([0, *lengths], device=device, dtype=torch.int32).cumsum(0, dtype=torch.int32)

    def fused():
        return pyfused.attention(q, k, v, cu_seqlens=ends, max_seqlen=s)[0].transpose(0, 1)

    def plain(q=padded[0], k=padded[1], v=padded[2]):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None]).transpose(1, 2)[real]

    flops = 4 * h * d * sum(n * n for n in lengths)
    name = f"packed {b} sequences, {total} of {b * s} tokens, {h}x{d}"
    return Case(name, beside(device, fused, plain), in_double(plain), flops=flops)


def on_gpu(device, shapes=((16, 12, 2048, 64), (4, 16, 2048, 128), (64, 12, 512, 64)), decoding=(1, 16)):
    """bfloat16, beside every backend of scaled_dot_product_attention by name."""
    for b, h, s, d in shapes:
        new = [torch.randn(b, s, h, d, device=device, dtype=torch.bfloat16).transpose(1, 2) for _ in range(4)]
        q, k, v, g = new
        bias = torch.randn(1, h, s, s, device=device, dtype=torch.bfloat16)
        keep = torch.ones(b, s, dtype=torch.bool, device=device)
        keep[:, s // 2 :] = False
        name, flops = f"{b}x{h}x{s}x{d} bfloat16", 4 * b * h * s * s * d
        variants = {
            "": ({}, {}, 1.0),
            " causal": ({"is_causal": True}, {"is_causal": True}, 0.5),
            " dense bias": ({"attn_bias": bias}, {"attn_mask": bias}, 1.0),
            " half padding": ({"padding_mask": keep}, {"attn_mask": keep[:, None, None, :]}, 0.5),
        }
        for label, (own, other, share) in variants.items():
            with torch.no_grad():
                providers = beside(device, lambda own=own: pyfused.attention(q, k, v, **own), lambda: None)
                providers.update(sdpa(device, q, k, v, **other))
                yield Case(name + label, providers, exact_sdpa(q, k, v, **other), flops=share * flops)
    with torch.no_grad():
        yield packed_case(device, torch.bfloat16, 12, 64, tuple(range(16, 513, 16)))

        table = torch.randn(32, h, device=device, dtype=torch.bfloat16)
        relative = pyfused.RelativeBias(table, True)
        with torch.no_grad():  # the peers are given the bias in memory, ready made
            dense = pyfused.relative_bias(table, s, s, bidirectional=True)
            providers = beside(device, lambda: pyfused.attention(q, k, v, relative_bias=relative), lambda: None)
            providers.update(sdpa(device, q, k, v, attn_mask=dense))
            yield Case(f"{name} T5 bias", providers, exact_sdpa(q, k, v, dense), flops=flops)

        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        for is_causal in (False, True):

            def train(call, q=leaves[0], k=leaves[1], v=leaves[2], g=g, is_causal=is_causal):
                return torch.autograd.grad(call(q, k, v, is_causal=is_causal), (q, k, v), g)

            def plain(q=leaves[0], k=leaves[1], v=leaves[2], g=g, train=train):
                return train(F.scaled_dot_product_attention, q, k, v, g)

            yield Case(
                f"train {name}{' causal' if is_causal else ''}",
                {"pyfused": lambda train=train: train(pyfused.attention), "torch": plain},
                in_double(plain),
                flops=14 * b * h * s * s * d * (0.5 if is_causal else 1.0),
            )
    for b in decoding:
        q = torch.randn(b, 12, 1, 64, device=device, dtype=torch.bfloat16)
        k, v = (torch.randn(b, 12, 2048, 64, device=device, dtype=torch.bfloat16)[:, :, :1000] for _ in range(2))
        with torch.no_grad():
            providers = beside(device, lambda q=q, k=k, v=v: pyfused.attention(q, k, v, is_causal=True), lambda: None)
            providers.update(sdpa(device, q, k, v))
            yield Case(f"decode {b}x12x1000x64 bfloat16", providers, exact_sdpa(q, k, v), bytes=4 * b * 12 * 1000 * 64)
