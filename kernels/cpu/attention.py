"""attention on the CPU: launches csrc/cpu/attention.cpp and attention_backward.cpp."""

import torch

from pyfused.arguments import AttentionBackward, AttentionForward, backward_launch, forward_launch, taking
from pyfused.extensions import DTYPE_CODES, cpu
from pyfused.kernels.shared.attention_layout import AttentionLayout, buckets, by_rows
from pyfused.kernels.shared.prepared import CPU, maker, prepares_launch


@prepares_launch
@taking(AttentionForward)
def forward(a):
    (shape, strides), dtype, save = by_rows(a.query), a.query.dtype, a.save
    layout, of_distances = AttentionLayout.of(a, strides), buckets(a)
    address, code, kernel = layout.address, DTYPE_CODES[dtype], cpu().attention_forward
    new_out, new_lse = maker(shape, dtype, strides), maker(shape[:3], torch.float32)

    @forward_launch
    def launch(query, key, value, mask, bias, seed, table, cu_seqlens):
        out, lse = new_out(), new_lse() if save else None
        kernel(query, key, value, mask, bias, table, of_distances, seed, cu_seqlens, out, lse, address, code)
        return out, lse

    launch.layout = layout
    return launch


@taking(AttentionBackward)
def declined_backward(a):
    """Declines few float32 queries: plain PyTorch's gradients are closer there, and it keeps nothing of size S x S either."""
    if a.query.dtype == torch.float32 and (a.query.shape[2] if a.cu_seqlens is None else a.max_seqlen) <= 8:
        # 27 of 360 random gradients exceeded the tolerance rule with this kernel (up to 2.3 times), none with plain PyTorch.
        return "up to 8 float32 queries: plain PyTorch does not go through a rounded log-sum-exp"
    return None


@prepares_launch
@taking(AttentionBackward)
def backward(a):
    dtype, of_query, of_key, of_distances = a.query.dtype, by_rows(a.query), by_rows(a.key), buckets(a)
    layout = AttentionLayout.of(a, a.out.stride(), grad_out=a.grad_out.stride())
    address, code, kernel = layout.address, DTYPE_CODES[dtype], cpu().attention_backward
    new_query, new_key = maker(of_query[0], dtype, of_query[1]), maker(of_key[0], dtype, of_key[1])
    of_bias = a.attn_bias.shape if a.wants_bias else None
    of_table = (a.bias_table.shape, a.bias_table.dtype) if a.wants_table else None

    @backward_launch
    def launch(grad_out, query, key, value, out, lse, mask, bias, seed, table, cu_seqlens):
        grads = new_query(), new_key(), new_key()
        # The kernel skips tiles that causality or padding hides, so the gradients start as zeros.
        grad_bias = torch.zeros(of_bias, dtype=dtype, device=CPU) if of_bias else None
        grad_table = torch.zeros(of_table[0], dtype=torch.float32, device=CPU) if of_table else None
        inputs = grad_out, query, key, value, out, lse, mask, bias, table, of_distances, seed, cu_seqlens
        kernel(*inputs, *grads, grad_bias, grad_table, address, code)
        return *grads, grad_bias, grad_table.to(of_table[1]) if of_table else None

    launch.layout = layout
    return launch
