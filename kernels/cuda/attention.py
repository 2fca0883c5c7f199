"""attention on CUDA, the forward: launches csrc/cuda/attention.cu (many queries), attention_decode.cu (few) and
attention_packed.cu (packed sequences)."""

from array import array

import torch

from pyfused.extensions import DTYPE_CODES, cuda
from pyfused.kernels.shared.buckets import distance_buckets
from pyfused.kernels.shared.prepared import launched, maker

from ._launch import multiprocessors, pointers, shared_memory, where

_ROWS = 16  # of a decode block: queries of the heads that share a key head
_TILE = 64  # a multiple of the keys in every kernel's tile
_CHUNK = 256  # keys a block should at least have before the keys of its queries are split over several
_MAX_CHUNKS = 64
_MAX_SPAN = 255  # distances of a relative bias that a block keeps, for up to 16 heads
_TILES = 84 * 1024  # bytes of shared memory beside those distances, at most, where heads share a block


def unsupported_forward(
    query, key, value, is_causal, padding_mask, attn_bias, scale, dropout_p, seed, save,
    bias_table=None, bidirectional=True, max_distance=128, cu_seqlens=None, max_seqlen=0,
):  # fmt: skip
    # Rows and keys are counted in 32 bits, with a tile to spare.
    if max(query.shape[2] * (query.shape[1] // key.shape[1]), key.shape[2]) > 2**31 - 2**10:
        return "more than 2^31 queries or keys"
    if _most_blocks(query, cu_seqlens) > 2**31 - 1:
        return "more than 2^31 tiles of queries"
    # The span is at most max_distance, which costs nothing to look at.
    far = bias_table is not None and max_distance > _MAX_SPAN
    if far and _buckets(bias_table, bidirectional, max_distance).shape[0] // 2 > _MAX_SPAN:
        return f"a relative bias that tells more than {_MAX_SPAN} distances apart"
    group = query.shape[1] // key.shape[1]
    if bias_table is not None and group > 1 and group * query.shape[2] <= _ROWS:
        distances = _buckets(bias_table, bidirectional, max_distance).shape[0]
        if _TILES + group * distances * 4 > shared_memory(query.device):
            return f"a relative bias of {group} heads that share a key head does not fit in a block's shared memory"
    return None


def _chunks(blocks: int, key_length: int, processors: int) -> tuple[int, int]:
    """(chunks, keys per chunk): enough blocks to fill the chip when a few queries look at many keys."""
    chunks = max(1, min(-(-2 * processors // blocks), key_length // _CHUNK, _MAX_CHUNKS))
    size = -(-key_length // (chunks * _TILE)) * _TILE
    return -(-key_length // size), size


def _buckets(table, bidirectional, max_distance):
    return distance_buckets(bidirectional, table.shape[0], max_distance, table.device)


def _most_blocks(query, cu_seqlens):
    """With the smallest tile: csrc/cuda/attention.cuh's tiles_of."""
    b, h, sq = query.shape[:3]
    return h * (b * (sq // _ROWS + 1) if cu_seqlens is None else sq // _ROWS + cu_seqlens.shape[0] - 1)


def _layout(query, key, value, out_strides, attn_bias, table, buckets, chunk_stride=0, sequences=0):
    """Sizes and strides, in the order of csrc/cuda/attention.cuh; the array must live until the launch has returned."""
    b, h, sq, d = query.shape
    sizes = [sequences or b, h, key.shape[1], sq, key.shape[2], d]
    for batch, head, row in (query.stride()[:3], key.stride()[:3], value.stride()[:3], out_strides):
        sizes += (row if sequences else batch, head, row)
    sizes += attn_bias.stride() if attn_bias is not None else (0, 0, 0, 0)
    relative = (0, 0, 0, 0)
    if table is not None:
        relative = (*table.stride(), buckets.shape[0] // 2, int(table.dtype == torch.float32))
    return array("q", [*sizes, chunk_stride, *relative])


@launched
def forward(
    query, key, value, is_causal, padding_mask, attn_bias, scale, dropout_p, seed, save,
    bias_table=None, bidirectional=True, max_distance=128, cu_seqlens=None, max_seqlen=0,
):  # fmt: skip
    (b, h, sq, d), (hkv, sk), dtype, device = query.shape, key.shape[1:3], query.dtype, query.device
    strides = sq * h * d, d, h * d, 1
    buckets = None if bias_table is None else _buckets(bias_table, bidirectional, max_distance)
    tensors, more = (query, key, value, strides[:3]), (attn_bias, bias_table, buckets)
    processors, code, place = multiprocessors(device), DTYPE_CODES[dtype], where(device)
    options = is_causal, scale, dropout_p
    chunks = 1
    if cu_seqlens is not None:  # max_seqlen is of no use: the grid follows from how many rows and sequences there are
        layout = _layout(*tensors, *more, sequences=cu_seqlens.shape[0] - 1)
        kernel, numbers = cuda().attention_packed_forward, (*options, processors, code)
    elif h // hkv * sq > _ROWS:
        layout = _layout(*tensors, *more)
        kernel, numbers = cuda().attention_forward, (*options, processors, code)
    else:
        chunks, chunk = _chunks(b * hkv, sk, processors)
        layout = _layout(*tensors, *more)
        kernel, numbers = cuda().attention_decode_forward, (*options, chunk, code)
    new_out, new_lse = maker((b, h, sq, d), dtype, strides, device), maker((b, h, sq), torch.float32, None, device)
    if chunks > 1:
        of_chunk = h * sq * d, sq * d, d
        parts = _layout(query, key, value, of_chunk, *more, b * h * sq * d)
        combine = cuda().attention_combine
        new_part = maker((chunks, b, h, sq, d), torch.float32, None, device)
        new_part_lse = maker((chunks, b, h, sq), torch.float32, None, device)
    relative = bias_table is not None

    def launch(
        query, key, value, _causal, padding_mask, attn_bias, _scale, _dropout_p, seed, _save,
        bias_table=None, _bidirectional=True, _max_distance=128, cu_seqlens=None, _max_seqlen=0, out=None,
    ):  # fmt: skip
        out, lse = new_out() if out is None else out, new_lse() if save else None
        buckets = _buckets(bias_table, bidirectional, max_distance) if relative else None
        masks = (padding_mask, attn_bias) if cu_seqlens is None else (cu_seqlens,)
        inputs = query, key, value, *masks, bias_table, buckets, seed
        if chunks == 1:
            kernel(*pointers(*inputs, out, lse), layout.buffer_info()[0], *numbers, *place())
            return out, lse
        part, part_lse = new_part(), new_part_lse()
        kernel(*pointers(*inputs, part, part_lse), parts.buffer_info()[0], *numbers, *place())
        combine(*pointers(part, part_lse, out, lse), layout.buffer_info()[0], chunks, code, *place())
        return out, lse

    return launch
