"""Does Triton's attention read T5's bias at the right distances, and sum its gradient over every pair once?"""

import pytest
import torch

from pyfused import dispatch, tiles
from pyfused.kernels.reference import attention as reference
from pyfused.kernels.shared.buckets import EACH, distance_buckets
from pyfused.testing import assert_close, available

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from pyfused.kernels.triton._attention_grad_table import corners, parts, visits  # noqa: E402
from pyfused.kernels.triton._attention_relative import (  # noqa: E402
    COPIES,
    center,
    relative_tile,
    spread_kernel,
    spread_row,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif("triton" not in available(DEVICE), reason="Triton cannot run here")
ENCODER, DECODER = (32, 128, True), (32, 128, False)


@triton.jit
def tiles_kernel(
    spread_ptr, corners_ptr, out_ptr, head, center,
    FIRST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FRAGMENTS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = spread_row(spread_ptr, head, center, FIRST)
    tile = relative_tile(row, tl.load(corners_ptr + program), center, ROWS, COLUMNS, FRAGMENTS)
    place = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(out_ptr + program * ROWS * COLUMNS + place, tile)


@pytest.mark.parametrize("rows, columns", [(32, 64), (64, 16)])
@pytest.mark.parametrize("kind", [ENCODER, DECODER, (13, EACH, True)], ids=str)
def test_a_tile_of_the_bias(kind, rows, columns):
    """At every corner, odd and even, near and far beyond the last bucket, for both orders of the scores."""
    num_buckets, max_distance, bidirectional = kind
    table = torch.randn(3, num_buckets, device=DEVICE).t()
    buckets = distance_buckets(bidirectional, num_buckets, max_distance, table.device)
    span = len(buckets) // 2
    middle = center(span, rows, columns)
    spread = torch.full((3, COPIES.value, 2 * middle), torch.nan, device=DEVICE)
    grid = 3 * COPIES.value, triton.cdiv(2 * middle, 128)
    spread_kernel[grid](table, buckets, spread, 2.0, span, middle, *table.stride(), BLOCK=128)
    at = torch.tensor([-5000, -span - columns, -span, -8, -3, 0, 1, 2, 7, span + rows, 4000], dtype=torch.int32)
    i, j = torch.arange(rows)[:, None], torch.arange(columns)
    for first, sign in ((0, 1), (2, -1)):
        distance = sign * (at[:, None, None] + j - i).long()
        expected = 2 * table.cpu()[:, 1][buckets.cpu().long()[distance.clamp(-span, span) + span]]
        for fragments in (True, False):
            out = torch.empty(len(at), rows, columns, device=DEVICE)
            tiles_kernel[(len(at),)](spread, at.to(DEVICE), out, 1, middle, first, rows, columns, fragments)
            assert torch.equal(out.cpu(), expected)


@pytest.mark.parametrize("block_m, block_n", [(32, 64), (64, 32), (16, 16)])
@pytest.mark.parametrize(
    "sq, sk, causal", [(1, 1, False), (1, 500, True), (137, 137, True), (70, 333, False), (90, 20, True)]
)
@pytest.mark.parametrize("span", [0, 91, 600])
def test_every_near_tile_has_one_program(sq, sk, causal, span, block_m, block_n):
    """The tiles that grad_query_kernel leaves to grad_table_kernel are those of its corners, each with one visit."""
    shift, step, batch = sk - sq, min(block_m, block_n), 3
    first, count = corners(sq, sk, span, causal, False, block_m, block_n)
    if not count:
        return
    each, number = max(1, block_n // block_m), visits(batch, sq, None, block_m, block_n)
    shares, chunk = parts(4, count, number)
    assert (shares - 1) * chunk < number <= shares * chunk
    visited = []
    per_sequence = triton.cdiv(triton.cdiv(sq, block_m), each)
    for corner in range(first, first + count):
        for n in range(number):
            tile = n % per_sequence * each + -corner % each
            start = tile * block_m + corner * step
            if tile * block_m < sq and 0 <= start < sk:
                visited.append((n // per_sequence, tile * block_m, start))
    near = []
    for entry in range(batch):
        for query in range(0, sq, block_m):
            for key in range(0, sk, block_n):
                corner = key - query - shift
                seen = not causal or corner - (block_m - 1) <= 0
                if seen and corner + block_n - 1 > -span and corner - (block_m - 1) < span:
                    near.append((entry, query, key))
    assert set(near) <= set(visited)
    assert len(set(visited)) == len(visited)
    beyond = [key - query - shift for _, query, key in set(visited) - set(near)]
    assert all(causal and corner > block_m - 1 for corner in beyond)  # nothing is seen there


def biased(b, h, hkv, sq, sk, d, table, is_causal=False, pad=None, dtype=torch.float32):
    """The tensors, the options and the table of a call of the kernels."""
    query, key, value = (
        torch.randn(b, s, n, d, device=DEVICE).to(dtype).transpose(1, 2) for s, n in ((sq, h), (sk, hkv), (sk, hkv))
    )
    mask = None if pad is None else torch.arange(sk, device=DEVICE)[None] < torch.tensor(pad, device=DEVICE)[:, None]
    num_buckets, max_distance, bidirectional = table
    weights = torch.randn(num_buckets, h, device=DEVICE).to(dtype)
    return (query, key, value), (is_causal, mask, None, 0.3, 0.0, None), (weights, bidirectional, max_distance)


SMALL = (8, 12, True)
CASES = {
    "beyond the buckets": ((1, 2, 1, 71, 71, 8, SMALL), {"pad": [59]}),
    "a cached prefix": ((1, 2, 2, 21, 90, 8, (7, 6, False)), {"is_causal": True}),
    "more queries than keys": ((1, 1, 1, 61, 37, 8, SMALL), {}),
    "each distance": ((3, 1, 1, 33, 33, 8, (65, EACH, True)), {"is_causal": True}),
}
WIDE = {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
TILES = {"wide": WIDE, "high": {**WIDE, "BLOCK_M": 32, "BLOCK_N": 16}}


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("case", CASES)
def test_the_table_s_gradient(case, tile):
    """For tiles that are wide and high, and bitwise repeatable."""
    kernel = dispatch.kernel("triton", "attention")
    sizes, options = CASES[case]
    qkv, rest, relative = biased(*sizes, **options)
    with tiles.trying("attention_grad_query", TILES[tile]):
        out, lse = kernel.forward(*qkv, *rest, True, *relative)
        grad_out = torch.randn_like(out)
        behind = (False, *relative, True)
        first, again = (kernel.backward(grad_out, *qkv, out, lse, *rest, *behind)[4] for _ in range(2))
    assert torch.equal(first, again)
    wide, table = [t.double() for t in qkv], relative[0].double()
    true_out, true_lse = reference.forward(*wide, *rest, True, table, *relative[1:])
    plain_out, plain_lse = reference.forward(*qkv, *rest, True, *relative)
    truth = reference.backward(grad_out.double(), *wide, true_out, true_lse, *rest, False, table, *relative[1:], True)[
        4
    ]
    plain = reference.backward(grad_out, *qkv, plain_out, plain_lse, *rest, *behind)[4]
    assert_close(first, plain, truth, "table")
