"""attention on the CPU: launches csrc/cpu/attention.cpp and attention_backward.cpp."""

from array import array

import torch

from pyfused.extensions import DTYPE_CODES, cpu
from pyfused.kernels.shared.buckets import distance_buckets
from pyfused.kernels.shared.prepared import CPU, launched, maker


def _layout(query, key, value, attn_bias, table, buckets, cu_seqlens, max_seqlen, *more):
    """Sizes and strides, in the order of csrc/cpu/kernels.h; keep the array alive while the kernel runs."""
    b, h, sq, d = query.shape
    if cu_seqlens is None:
        _, hkv, sk, _ = key.shape
        sizes = [b, h, hkv, sq, sk, d, sq, *query.stride()[:3], *key.stride()[:3], *value.stride()[:3]]
    else:
        sizes = [cu_seqlens.shape[0] - 1, h, key.shape[1], sq, sq, d, max_seqlen]
        for t in (query, key, value):
            sizes += (0, *t.stride()[1:3])
    sizes += attn_bias.stride() if attn_bias is not None else (0, 0, 0, 0)
    if table is None:
        sizes += (0, 0, 0, 0)
    else:
        sizes += (buckets.shape[0] // 2, *table.stride(), table.dtype == torch.float32)
    for t in more:
        sizes += t.stride()[:3] if cu_seqlens is None else (0, *t.stride()[1:3])
    return array("q", sizes)


def _address(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def _like(query):
    """Shape and strides of a (B, H, S, D) tensor stored as (B, S, H, D)."""
    b, h, s, d = query.shape
    return (b, h, s, d), (s * h * d, d, h * d, 1)


def _empty_like(query):
    return torch.empty_strided(*_like(query), dtype=query.dtype, device=CPU)


@launched
def forward(
    query, key, value, is_causal, padding_mask, attn_bias, scale, dropout_p, seed, save,
    bias_table=None, bidirectional=True, max_distance=128, cu_seqlens=None, max_seqlen=0,
):  # fmt: skip
    (shape, strides), dtype = _like(query), query.dtype
    buckets = None if bias_table is None else distance_buckets(bidirectional, bias_table.shape[0], max_distance)
    layout = _layout(query, key, value, attn_bias, bias_table, buckets, cu_seqlens, max_seqlen)
    options = bool(is_causal), scale, dropout_p, DTYPE_CODES[dtype]
    kernel, new_out = cpu().attention_forward, maker(shape, dtype, strides)
    new_lse = maker(shape[:3], torch.float32) if save else None

    def launch(
        query, key, value, _causal, padding_mask, attn_bias, _scale, _dropout, seed, _save,
        bias_table=None, _bidirectional=True, _max_distance=128, cu_seqlens=None, _max_seqlen=0, out=None,
    ):  # fmt: skip
        out, lse = new_out() if out is None else out, new_lse() if save else None
        kernel(
            *(query, key, value, padding_mask, attn_bias, bias_table, buckets, seed, cu_seqlens, out, lse),
            *(layout.buffer_info()[0], *options),
        )
        return out, lse

    return launch


def declined_backward(
    grad_out, query, key, value, out, lse, is_causal, padding_mask, attn_bias, scale, dropout_p, seed, wants_bias,
    bias_table=None, bidirectional=True, max_distance=128, wants_table=False, cu_seqlens=None, max_seqlen=0,
):  # fmt: skip
    """Few float32 queries: plain PyTorch keeps nothing of size S x S there either, and its gradients are closer."""
    if query.dtype == torch.float32 and (query.shape[2] if cu_seqlens is None else max_seqlen) <= 8:
        # Against softmax, of 360 random gradients 27 exceeded the tolerance rule here (up to 2.3 times the bound), none there.
        return "up to 8 float32 queries: plain PyTorch does not go through a rounded log-sum-exp"
    return None


def backward(
    grad_out, query, key, value, out, lse, is_causal, padding_mask, attn_bias, scale, dropout_p, seed, wants_bias,
    bias_table=None, bidirectional=True, max_distance=128, wants_table=False, cu_seqlens=None, max_seqlen=0,
):  # fmt: skip
    grad_query, grad_key, grad_value = (_empty_like(t) for t in (query, key, value))
    # Zeros: tiles that causality or padding hides are skipped.
    grad_bias = torch.zeros(attn_bias.shape, dtype=query.dtype) if wants_bias else None
    grad_table = torch.zeros(bias_table.shape, dtype=torch.float32) if wants_table else None
    buckets = None if bias_table is None else distance_buckets(bidirectional, bias_table.shape[0], max_distance)
    layout = _layout(query, key, value, attn_bias, bias_table, buckets, cu_seqlens, max_seqlen, out, grad_out)
    cpu().attention_backward(
        grad_out.data_ptr(),
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        out.data_ptr(),
        lse.data_ptr(),
        _address(padding_mask),
        _address(attn_bias),
        _address(bias_table),
        _address(buckets),
        _address(seed),
        _address(cu_seqlens),
        grad_query.data_ptr(),
        grad_key.data_ptr(),
        grad_value.data_ptr(),
        _address(grad_bias),
        _address(grad_table),
        layout.buffer_info()[0],
        is_causal,
        scale,
        dropout_p,
        DTYPE_CODES[query.dtype],
    )
    if wants_table:
        grad_table = grad_table.to(bias_table.dtype)
    return grad_query, grad_key, grad_value, grad_bias, grad_table
