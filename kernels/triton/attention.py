"""attention in Triton: launches the kernels of _attention_*.py with the tiles and warps of pyfused.tiles."""

import math

import torch
import triton

from pyfused import tiles
from pyfused.arguments import AttentionBackward, AttentionForward, backward_launch, forward_launch, taking
from pyfused.kernels.shared.attention_layout import buckets, by_rows, span
from pyfused.kernels.shared.prepared import maker, prepares_launch

from ._attention_configs import block_d, config
from ._attention_forward import combine_kernel, forward_kernel
from ._attention_grad_key_value import grad_key_value_kernel
from ._attention_grad_query import grad_query_kernel
from ._attention_grad_table import corners, grad_table_kernel, parts, visits
from ._attention_relative import COPIES, center, spread_kernel
from ._attention_tiles import MASKED_STAGES
from ._launch import starter

_LOG2E = math.log2(math.e)
_PACK_ROWS = 16  # heads that share a key head share one query tile while it has at most this many rows
_MOST_CHUNKS = 64  # the most chunks combine_kernel adds up
_MOST_BUCKETS = 512  # of a table with a gradient: each program sums into all of them
_FEW_KEYS = 32  # with more keys, delta from an output in half precision is as good as the rest of a gradient
least_scale = 1e-3  # a bias is divided by it


def _dropout(a):
    """(keep_scale, threshold): the threshold is the one of kernels/reference/_philox, as the bits of an int32."""
    if a.seed is None:
        return 1.0, 0
    threshold = min(round(a.dropout_p * 2**32), 2**32 - 1)
    return 1.0 / (1.0 - a.dropout_p), threshold - 2**32 if threshold >= 2**31 else threshold


def in_units(scale, dtype):
    """The factor that turns query key^T into the units of _attention_tiles.in_units."""
    return scale if dtype == torch.float32 else scale * _LOG2E


def _row_strides(*tensors):
    return [stride for t in tensors for stride in t.stride()[:3]]


def _bias_strides(attn_bias):
    return (0, 0, 0, 0) if attn_bias is None else attn_bias.stride()


def _starts_at_bias(a):
    """Whether the kernels' products of query and key start at T5's bias, divided by the scale. Float32 products run
    in pieces."""
    return a.bias_table is not None and a.query.dtype != torch.float32 and a.scale >= least_scale


def spread(a, *blocks):
    """(center, of): of(table) is the bias of each head by distance, as _attention_relative.py describes it, for kernels
    with these BLOCK_M and BLOCK_N. (0, None) without a table."""
    if a.bias_table is None:
        return 0, None
    table, device = a.bias_table, a.query.device
    heads = table.shape[1]
    middle = max(center(span(a), each["BLOCK_M"], each["BLOCK_N"]) for each in blocks)
    unit = 1.0 if a.query.dtype == torch.float32 else 1.0 / a.scale if _starts_at_bias(a) else _LOG2E
    options = tiles.find("attention_spread", device).options
    grid = heads * COPIES.value, triton.cdiv(2 * middle, options["BLOCK"])
    start = starter(spread_kernel, grid, device, unit, span(a), middle, *table.stride(), **options)
    new = maker((heads, COPIES.value, 2 * middle), torch.float32, None, device)
    of_distances = buckets(a)

    def of(table):
        out = new()
        start(table, of_distances, out)
        return out

    return middle, of


def _sequences(cu_seqlens: torch.Tensor | None) -> int | None:
    return None if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _tiles(batch: int, length: int, block: int, cu_seqlens: torch.Tensor | None) -> int:
    """How many tiles of `block` rows one head has. Packed sequences: see _attention_tiles.sequence_tile."""
    return batch * triton.cdiv(length, block) if cu_seqlens is None else length // block + cu_seqlens.shape[0] - 1


def _kind(a) -> tuple[int, bool]:
    """extras and relative of config()."""
    return (a.attn_bias is not None) + (a.seed is not None), a.bias_table is not None


def _few(a, c: tiles.Tile, extras: int) -> tiles.Tile | None:
    """The tile for a grid that leaves multiprocessors idle with the tile `c`. None if none is idle, or if no row serves.
    Asked for only then, so that `pyfused tune` tries it in no other call."""
    b, h, sq, d = a.query.shape
    if h * _tiles(b, sq, c.options["BLOCK_M"], a.cu_seqlens) >= tiles.multiprocessors(a.query.device):
        return None
    return config("few", d, a.query.dtype, a.query.device, extras, a.bias_table is not None)


def _chunks(wanted: int, key_length: int, c: tiles.Tile) -> tuple[int, int]:
    """(chunks, keys per chunk): enough programs to fill the chip when a few queries look at many keys."""
    chunks = max(1, min(wanted, key_length // c.least_keys, _MOST_CHUNKS))
    block_n = c.options["BLOCK_N"]
    size = triton.cdiv(triton.cdiv(key_length, chunks), block_n) * block_n
    return triton.cdiv(key_length, size), size


def block_c(chunks: int) -> int:
    """BLOCK_C of combine_kernel, 16 or 64. With only two values, a growing text does not compile a new kernel for 2, 4, 8, ...
    chunks. Rows without a chunk are masked and not read. 64 rows of D = 256 on four warps take 128 registers a thread."""
    return 16 if chunks <= 16 else 64


@prepares_launch
@taking(AttentionForward)
def forward(a):
    (b, h, sq, d), (hkv, sk), dtype, device = a.query.shape, a.key.shape[1:3], a.query.dtype, a.query.device
    shape, strides = by_rows(a.query)
    group = h // hkv
    packed = group * sq <= _PACK_ROWS and a.cu_seqlens is None
    extras, relative = _kind(a)
    c = config("decode" if packed else "forward", d, dtype, device, extras, relative)
    few = None if packed else _few(a, c, extras)
    c = few or c
    programs = b * hkv if packed else h * _tiles(b, sq, c.options["BLOCK_M"], a.cu_seqlens)
    chunks, chunk = 1, sk
    if packed:
        chunks, chunk = _chunks(triton.cdiv(c.programs, programs), sk, c)
    elif few and a.cu_seqlens is None:  # adding up the chunks is a launch: not for a chip that is more than half full
        chunks, chunk = _chunks(c.programs // programs, sk, c)
    middle, by_distance = spread(a, c.options)
    out_strides = (0, *strides[:3]) if chunks == 1 else (b * h * sq * d, h * sq * d, sq * d, d)
    attend = starter(
        forward_kernel, (programs, chunks), device,
        in_units(a.scale, dtype), *_dropout(a), span(a), middle,
        *_row_strides(a.query, a.key, a.value), *out_strides, *_bias_strides(a.attn_bias), b * h * sq,
        h, sq, sk, _sequences(a.cu_seqlens), chunk,
        D=d, BLOCK_D=block_d(d), GROUP=group, IS_CAUSAL=a.is_causal,
        SCALE_FIRST=a.attn_bias is not None or not a.scale > 0, PACKED=packed, START_AT_BIAS=_starts_at_bias(a),
        MASKED_STAGES=c.options["num_stages"] if few else MASKED_STAGES.value, **c.options,
    )  # fmt: skip
    new_out, new_lse = maker(shape, dtype, strides, device), maker((b, h, sq), torch.float32, None, device)
    if chunks > 1:
        combine = starter(
            combine_kernel, (b * h * sq,), device, *strides[:3], b * h * sq, h, sq, chunks,
            D=d, BLOCK_D=block_d(d), BLOCK_C=block_c(chunks), **tiles.find("attention_combine", device).options,
        )  # fmt: skip
        new_part = maker((chunks, b, h, sq, d), torch.float32, None, device)
        new_part_lse = maker((chunks, b, h, sq), torch.float32, None, device)

    save = a.save

    @forward_launch
    def launch(query, key, value, mask, bias, seed, table, cu_seqlens):
        out, lse = new_out(), new_lse() if save else None
        inputs = mask, bias, None if by_distance is None else by_distance(table), seed, cu_seqlens
        if chunks == 1:
            attend(query, key, value, out, lse, *inputs)
            return out, lse
        part, part_lse = new_part(), new_part_lse()
        attend(query, key, value, part, part_lse, *inputs)
        combine(part, part_lse, out, lse)
        return out, lse

    return launch


@taking(AttentionBackward)
def unsupported_backward(a):
    if a.wants_table and a.bias_table.shape[0] > _MOST_BUCKETS:
        return f"the gradient of a table of more than {_MOST_BUCKETS} distances"
    return None


def few_keys(a) -> int:
    """FEW of grad_query_kernel. At D = 128 the sums of the table's gradient leave it no registers."""
    any_few = a.is_causal or a.padding_mask is not None or a.cu_seqlens is not None or a.key.shape[2] <= _FEW_KEYS
    fits = a.query.dtype != torch.float32 and not (a.wants_table and a.query.shape[3] > 64)
    return _FEW_KEYS if any_few and fits else 0


@prepares_launch
@taking(AttentionBackward)
def backward(a):
    return prepare_backward(a)


def prepare_backward(a, key_value=None, *key_value_blocks):
    """The launch of a backward. key_value(stats, center, by_distance) returns the gradients of key and value in the place of
    this file's kernel; it reads the bias by distance with BLOCK_M and BLOCK_N of key_value_blocks."""
    (b, h, sq, d), (hkv, sk), dtype, device = a.query.shape, a.key.shape[1:3], a.query.dtype, a.query.device
    sequences = _sequences(a.cu_seqlens)
    # A softmax over one key is constant, so its gradient is exactly zero. dP - delta would leave a rounding error.
    constant = sk == 1
    grad_scale, scalars = 0.0 if constant else a.scale, (in_units(a.scale, dtype), *_dropout(a), span(a))
    inputs = _row_strides(a.grad_out, a.query, a.key, a.value)
    shared = {"D": d, "BLOCK_D": block_d(d), "GROUP": h // hkv, "IS_CAUSAL": a.is_causal}
    shared["START_AT_BIAS"] = _starts_at_bias(a)
    extras, relative = _kind(a)
    query_tile, key_tile = (
        config(f"grad_{kernel}", d, dtype, device, extras, relative) for kernel in ("query", "key_value")
    )
    middle, new_bias_by_distance = spread(a, query_tile.options, key_tile.options, *key_value_blocks)
    block_m, block_n = query_tile.options["BLOCK_M"], query_tile.options["BLOCK_N"]
    tiles_of_head = _tiles(b, sq, block_m, a.cu_seqlens)
    # Room for the last tile of queries, wherever a packed sequence begins.
    of_key = key_tile.options["BLOCK_M"]
    rows = (triton.cdiv(sq, of_key) + (sequences is not None)) * of_key
    # The registered operator may be called with an `out` of any strides. launch() copies it to these.
    out_by_rows = a.out.transpose(1, 2).is_contiguous()
    out_like, (key_shape, key_strides) = by_rows(a.query), by_rows(a.key)
    wants_bias, wants_table = a.wants_bias, a.wants_table
    sums_table, table_rows, by_corner = wants_table and not constant, 0, None
    num_buckets = triton.next_power_of_2(a.bias_table.shape[0]) if sums_table else 1
    if sums_table:
        first, count = corners(sq, sk, span(a), a.is_causal, a.cu_seqlens is not None, block_m, block_n)
        all_visits = visits(b, sq, sequences, block_m, block_n)
        shares, chunk = parts(h, max(count, 1), all_visits)
        table_rows = tiles_of_head + shares * count
    if sums_table and count:
        by_corner = starter(
            grad_table_kernel, (shares * count * h,), device,
            *scalars, middle, table_rows, tiles_of_head, first, count, shares, chunk, all_visits,
            rows, *inputs, *_bias_strides(a.attn_bias), h, sq, sk, sequences,
            BUCKETS=num_buckets, **shared, **query_tile.options,
        )  # fmt: skip
        new_tiles = maker((shares * count * h, block_m, block_n), torch.float32, None, device)

    by_query = starter(
        grad_query_kernel, (h * tiles_of_head,), device,
        grad_scale, *scalars, middle, table_rows,
        rows, *inputs, *out_like[1][:3], *_bias_strides(a.attn_bias), h, sq, sk, sequences,
        BUCKETS=num_buckets, **shared, FEW=few_keys(a), **query_tile.options,
    )  # fmt: skip
    by_key = starter(
        grad_key_value_kernel, (hkv * _tiles(b, sk, key_tile.options["BLOCK_N"], a.cu_seqlens),), device,
        grad_scale, *scalars, middle,
        rows, *inputs, *key_strides[:3], *_bias_strides(a.attn_bias), hkv, sq, sk, sequences,
        **shared, **key_tile.options,
    )  # fmt: skip
    new_query, new_key = maker(out_like[0], dtype, out_like[1], device), maker(key_shape, dtype, key_strides, device)
    new_stats = maker((b, h, rows, 2), torch.float32, None, device)
    new_correction = maker((b, h, sq), torch.float32, None, device)
    # The kernels skip tiles that no query may see, so grad_bias must start as zeros there. With cu_seqlens, spare slots have
    # no tile and write nothing, so the sums must start as zeros too.
    new_bias = torch.zeros if a.is_causal or a.padding_mask is not None else torch.empty
    sums = (h, table_rows, num_buckets), torch.float32, None, device
    new_sums = maker(*sums) if a.cu_seqlens is None else lambda: torch.zeros(sums[0], dtype=sums[1], device=device)
    of_distances = buckets(a) if sums_table else None
    if wants_table:
        new_table = maker(a.bias_table.shape, a.bias_table.dtype, None, device)

    @backward_launch
    def launch(grad_out, query, key, value, out, lse, mask, bias, seed, table, cu_seqlens):
        out = out if out_by_rows else out.transpose(1, 2).contiguous().transpose(1, 2)
        lse = lse.contiguous()
        grad_query, stats = new_query(), new_stats()
        grad_key, grad_value = (new_key(), new_key()) if key_value is None else (None, None)
        correction = new_correction() if dtype == torch.float32 else None
        grad_bias = new_bias((b, h, sq, sk), dtype=dtype, device=device) if wants_bias else None
        by_distance = new_bias_by_distance(table) if relative else None
        table_sums = new_sums() if sums_table else None
        extra = mask, bias, by_distance
        gradients = grad_query, stats, correction, grad_bias, table_sums
        by_query(grad_out, query, key, value, out, lse, *extra, of_distances, seed, cu_seqlens, *gradients)
        if by_corner is not None:
            behind = *extra, of_distances, seed, cu_seqlens, new_tiles(), table_sums
            by_corner(grad_out, query, key, value, stats, correction, *behind)
        grad_table = new_table() if wants_table else None
        if sums_table:
            grad_table.copy_(table_sums.sum(1)[:, : table.shape[0]].t())
        elif wants_table:
            grad_table.zero_()
        if grad_bias is not None:
            if constant:
                grad_bias.zero_()
            elif correction is not None:
                grad_bias *= correction[..., None]
        if key_value is None:
            by_key(grad_out, query, key, value, stats, correction, *extra, seed, cu_seqlens, grad_key, grad_value)
        else:
            grad_key, grad_value = key_value(stats, middle, by_distance)
        return grad_query, grad_key, grad_value, grad_bias, grad_table

    return launch
