"""attention in Triton: which tiles and how many warps, and the launches of the kernels in _attention_*.py."""

import math

import torch
import triton

from pyfused import tiles
from pyfused.kernels.buckets import distance_buckets

from ._attention_configs import block_d, config
from ._attention_forward import combine_kernel, forward_kernel
from ._attention_grad_key_value import grad_key_value_kernel
from ._attention_grad_query import grad_query_kernel
from ._launch import launch

_LOG2E = math.log2(math.e)
_PACK_ROWS = 16  # query rows of a group of heads that share a key head are packed into one tile up to this many
_MOST_CHUNKS = 64  # that combine_kernel adds up


def _like(tensor):
    """A new (B, H, S, D) tensor stored as (B, S, H, D)."""
    b, h, s, d = tensor.shape
    return torch.empty((b, s, h, d), dtype=tensor.dtype, device=tensor.device).transpose(1, 2)


def _dropout(dropout_p, seed):
    """keep_scale, and the threshold of kernels/reference/_philox as the bits of an int32."""
    if seed is None:
        return 1.0, 0
    threshold = min(round(dropout_p * 2**32), 2**32 - 1)
    return 1.0 / (1.0 - dropout_p), threshold - 2**32 if threshold >= 2**31 else threshold


def _in_units(scale, dtype):
    """The factor that takes query key^T to the units of _attention_tiles.in_units."""
    return scale if dtype == torch.float32 else scale * _LOG2E


def _bias_strides(attn_bias):
    return (0, 0, 0, 0) if attn_bias is None else attn_bias.stride()


def _by_distance(table, bidirectional, max_distance):
    """The biases of a head by distance, (H, 2 * span + 1), their buckets, and span; None, None, 0 without a table."""
    if table is None:
        return None, None, 0
    buckets = distance_buckets(bidirectional, table.shape[0], max_distance, table.device)
    return table.t().index_select(1, buckets), buckets, buckets.shape[0] // 2


def _tiles(batch: int, length: int, block: int, cu_seqlens: torch.Tensor | None) -> int:
    """How many tiles of `block` rows the programs of one head have: see _attention_tiles.sequence_tile."""
    return batch * triton.cdiv(length, block) if cu_seqlens is None else length // block + cu_seqlens.shape[0] - 1


def _chunks(programs: int, key_length: int, c: tiles.Tile) -> tuple[int, int]:
    """(chunks, keys per chunk): enough programs to fill the chip when a few queries look at many keys."""
    chunks = max(1, min(triton.cdiv(c.programs, programs), key_length // c.least_keys, _MOST_CHUNKS))
    block_n = c.options["BLOCK_N"]
    size = triton.cdiv(triton.cdiv(key_length, chunks), block_n) * block_n
    return triton.cdiv(key_length, size), size


def forward(
    query, key, value, is_causal, padding_mask, attn_bias, scale, dropout_p, seed, save,
    bias_table=None, bidirectional=True, max_distance=128, cu_seqlens=None, max_seqlen=0,
):  # fmt: skip
    b, h, sq, d = query.shape
    hkv, sk = key.shape[1:3]
    out = _like(query)
    lse = torch.empty((b, h, sq), dtype=torch.float32, device=query.device) if save else None
    if b == 0:
        return out, lse
    group = h // hkv
    packed = group * sq <= _PACK_ROWS and cu_seqlens is None
    sequences = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    by_distance, _, span = _by_distance(bias_table, bidirectional, max_distance)
    extras = (attn_bias is not None) + (seed is not None)
    c = config("decode" if packed else "forward", d, query.dtype, query.device, extras, bias_table is not None)
    programs = b * hkv if packed else h * _tiles(b, sq, c.options["BLOCK_M"], cu_seqlens)
    chunks, chunk = _chunks(programs, sk, c) if packed else (1, sk)
    if chunks > 1:
        part = torch.empty((chunks, b, h, sq, d), dtype=torch.float32, device=query.device)
        part_lse = torch.empty((chunks, b, h, sq), dtype=torch.float32, device=query.device)
        target, target_lse, out_strides = part, part_lse, part.stride()[:4]
    else:
        target, target_lse, out_strides = out, lse, (0, *out.stride()[:3])
    keep_scale, threshold = _dropout(dropout_p, seed)
    launch(
        forward_kernel,
        (programs, chunks),
        query,
        key,
        value,
        target,
        target_lse,
        padding_mask,
        attn_bias,
        by_distance,
        seed,
        cu_seqlens,
        _in_units(scale, query.dtype),
        keep_scale,
        threshold,
        span,
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        *out_strides,
        *_bias_strides(attn_bias),
        b * h * sq,
        h,
        sq,
        sk,
        sequences,
        chunk,
        D=d,
        BLOCK_D=block_d(d),
        GROUP=group,
        IS_CAUSAL=is_causal,
        SCALE_FIRST=attn_bias is not None or bias_table is not None or not scale > 0,
        PACKED=packed,
        **c.options,
    )
    if chunks > 1:
        launch(
            combine_kernel,
            (b * h * sq,),
            part,
            part_lse,
            out,
            lse,
            *out.stride()[:3],
            b * h * sq,
            h,
            sq,
            chunks,
            D=d,
            BLOCK_D=block_d(d),
            BLOCK_C=triton.next_power_of_2(chunks),
            **tiles.find("attention_combine", query.device).options,
        )
    return out, lse


def backward(
    grad_out, query, key, value, out, lse, is_causal, padding_mask, attn_bias, scale, dropout_p, seed, wants_bias,
    bias_table=None, bidirectional=True, max_distance=128, wants_table=False, cu_seqlens=None, max_seqlen=0,
):  # fmt: skip
    b, h, sq, d = query.shape
    hkv, sk = key.shape[1:3]
    # out comes from forward, but the registered operator may be called with any.
    out = out if out.transpose(1, 2).is_contiguous() else out.transpose(1, 2).contiguous().transpose(1, 2)
    lse = lse.contiguous()
    grad_query, grad_key, grad_value = _like(query), _like(key), _like(value)
    grad_bias = None
    if wants_bias:
        # Tiles that no query may see are skipped, so their zeros must be there already.
        skips = is_causal or padding_mask is not None
        grad_bias = (torch.zeros if skips else torch.empty)((b, h, sq, sk), dtype=query.dtype, device=query.device)
    grad_table = torch.zeros(bias_table.shape, dtype=bias_table.dtype, device=query.device) if wants_table else None
    if b == 0:
        return grad_query, grad_key, grad_value, grad_bias, grad_table
    delta = torch.empty((b, h, sq), dtype=torch.float32, device=query.device)
    correction = torch.empty_like(delta) if query.dtype == torch.float32 else None
    sequences = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    keep_scale, threshold = _dropout(dropout_p, seed)
    # A softmax over one key is constant: its gradient is zero, exactly, and not the rounding error of dP - delta.
    constant = sk == 1
    by_distance, buckets, span = _by_distance(bias_table, bidirectional, max_distance)
    scalars = (0.0 if constant else scale, _in_units(scale, query.dtype), keep_scale, threshold, span)
    inputs = (*grad_out.stride()[:3], *query.stride()[:3], *key.stride()[:3], *value.stride()[:3])
    shared = {"D": d, "BLOCK_D": block_d(d), "GROUP": h // hkv, "IS_CAUSAL": is_causal}

    extras = (attn_bias is not None) + (seed is not None)
    relative = bias_table is not None
    c = config("grad_query", d, query.dtype, query.device, extras, relative)
    query_tiles = _tiles(b, sq, c.options["BLOCK_M"], cu_seqlens)
    table_sums = None
    if wants_table and not constant:
        num_buckets = triton.next_power_of_2(bias_table.shape[0])
        # A sequence's last slot may have no tile, and then no program that writes.
        new = torch.empty if cu_seqlens is None else torch.zeros
        table_sums = new((b, h, query_tiles // b, num_buckets), dtype=torch.float32, device=query.device)
    launch(
        grad_query_kernel,
        (h * query_tiles,),
        grad_out,
        query,
        key,
        value,
        out,
        lse,
        padding_mask,
        attn_bias,
        by_distance,
        None if table_sums is None else buckets,
        seed,
        cu_seqlens,
        grad_query,
        delta,
        correction,
        grad_bias,
        table_sums,
        *scalars,
        *inputs,
        *out.stride()[:3],
        *_bias_strides(attn_bias),
        h,
        sq,
        sk,
        sequences,
        BUCKETS=1 if table_sums is None else table_sums.shape[3],
        **shared,
        **c.options,
    )
    if table_sums is not None:
        grad_table.copy_(table_sums.sum((0, 2))[:, : bias_table.shape[0]].t())
    if grad_bias is not None:
        if constant:
            grad_bias.zero_()
        elif correction is not None:
            grad_bias *= correction[..., None]
    c = config("grad_key_value", d, query.dtype, query.device, extras, relative)
    launch(
        grad_key_value_kernel,
        (hkv * _tiles(b, sk, c.options["BLOCK_N"], cu_seqlens),),
        grad_out,
        query,
        key,
        value,
        lse,
        delta,
        correction,
        padding_mask,
        attn_bias,
        by_distance,
        seed,
        cu_seqlens,
        grad_key,
        grad_value,
        *scalars,
        *inputs,
        *grad_key.stride()[:3],
        *_bias_strides(attn_bias),
        hkv,
        sq,
        sk,
        sequences,
        **shared,
        **c.options,
    )
    return grad_query, grad_key, grad_value, grad_bias, grad_table
