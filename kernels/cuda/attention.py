"""attention's forward on CUDA: launches csrc/cuda/attention.cu (many queries), attention_decode.cu (few queries) and
attention_packed.cu (packed sequences)."""

import torch

from pyfused.arguments import AttentionForward, forward_launch, taking
from pyfused.extensions import DTYPE_CODES, cuda
from pyfused.kernels.shared.attention_layout import AttentionLayout, buckets, by_rows, span
from pyfused.kernels.shared.buckets import EACH
from pyfused.kernels.shared.prepared import maker, prepares_launch

from ._launch import multiprocessors, shared_memory, where

_ROWS = 16  # rows of a decode block: the queries of the heads that share a key head
_TILE = 64  # a multiple of the keys in every kernel's tile
_CHUNK = 256  # keys are split over several blocks only if each block gets at least this many
_MAX_CHUNKS = 64
_MAX_SPAN = 255  # a block keeps this many distances of a relative bias on one side, for up to 16 heads
_TILES = 84 * 1024  # bytes of shared memory for everything but those distances, at most, where heads share a block


@taking(AttentionForward)
def unsupported_forward(a):
    (_, h, sq, _), (hkv, sk) = a.query.shape, a.key.shape[1:3]
    group = h // hkv
    # Rows and keys are counted in 32 bits, with a tile to spare.
    if max(sq * group, sk) > 2**31 - 2**10:
        return "more than 2^31 queries or keys"
    if _most_blocks(a.query, a.cu_seqlens) > 2**31 - 1:
        return "more than 2^31 tiles of queries"
    if a.bias_table is None:
        return None
    # T5's span is at most max_distance, and max_distance costs nothing to read.
    if (a.max_distance > _MAX_SPAN or a.max_distance == EACH) and span(a) > _MAX_SPAN:
        return f"a relative bias that tells more than {_MAX_SPAN} distances apart"
    if group > 1 and group * sq <= _ROWS and _TILES + group * (2 * span(a) + 1) * 4 > shared_memory(a.query.device):
        return f"a relative bias of {group} heads that share a key head does not fit in a block's shared memory"
    return None


def _chunks(blocks: int, key_length: int, processors: int) -> tuple[int, int]:
    """(chunks, keys per chunk): enough blocks to fill the chip when a few queries look at many keys."""
    chunks = max(1, min(-(-2 * processors // blocks), key_length // _CHUNK, _MAX_CHUNKS))
    size = -(-key_length // (chunks * _TILE)) * _TILE
    return -(-key_length // size), size


def _most_blocks(query, cu_seqlens):
    """The number of blocks with the smallest tile: tiles_of() of csrc/cuda/attention.cuh."""
    b, h, sq = query.shape[:3]
    return h * (b * (sq // _ROWS + 1) if cu_seqlens is None else sq // _ROWS + cu_seqlens.shape[0] - 1)


@prepares_launch
@taking(AttentionForward)
def forward(a):
    (b, h, sq, d), (hkv, sk), dtype, device = a.query.shape, a.key.shape[1:3], a.query.dtype, a.query.device
    shape, strides = by_rows(a.query)
    layout, chunks, work = AttentionLayout.of(a, strides), 1, multiprocessors(device)
    if a.cu_seqlens is not None:  # the grid depends on the numbers of rows and sequences, not on max_seqlen
        kernel = cuda().attention_packed_forward
    elif h // hkv * sq > _ROWS:
        kernel = cuda().attention_forward
    else:
        kernel = cuda().attention_decode_forward
        chunks, work = _chunks(b * hkv, sk, work)
    new_out, new_lse = maker(shape, dtype, strides, device), maker((b, h, sq), torch.float32, None, device)
    parts = layout
    if chunks > 1:
        parts = AttentionLayout.of(a, (h * sq * d, sq * d, d), chunk=b * h * sq * d)
        combine = cuda().attention_combine
        new_part = maker((chunks, b, h, sq, d), torch.float32, None, device)
        new_part_lse = maker((chunks, b, h, sq), torch.float32, None, device)
    whole, by_part, code, place, save = layout.address, parts.address, DTYPE_CODES[dtype], where(device), a.save
    of_distances = buckets(a)

    @forward_launch
    def launch(query, key, value, mask, bias, seed, table, cu_seqlens):
        out, lse = new_out(), new_lse() if save else None
        inputs = query, key, value, mask, bias, table, of_distances, seed, cu_seqlens
        if chunks == 1:
            kernel(*inputs, out, lse, whole, work, code, *place())
            return out, lse
        part, part_lse = new_part(), new_part_lse()
        kernel(*inputs, part, part_lse, by_part, work, code, *place())
        combine(part, part_lse, out, lse, whole, chunks, code, *place())
        return out, lse

    launch.layouts = layout, parts
    return launch
