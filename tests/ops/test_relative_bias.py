"""Is T5's materialised relative bias right on every backend? Buckets, values, the table's gradient, errors, opcheck."""

import dataclasses
import functools
import math

import pytest
import torch
from opchecks import check_registered, opcheck

import pyfused
from pyfused.kernels.shared.buckets import distance_buckets
from pyfused.testing import assert_close


@dataclasses.dataclass(frozen=True)
class Case:
    """A table's (num_buckets, max_distance, bidirectional); Sq, Sk and the position of the first query."""

    table: tuple[int, int, bool]
    lengths: tuple[int, int, int]

    @property
    def seldom(self):
        return self not in QUICK

    def __str__(self):
        n, most, both = self.table
        return f"{n}-{most}-{'both' if both else 'before'}-{'x'.join(map(str, self.lengths))}"


TABLES = [
    (32, 128, True),
    (32, 128, False),
    (16, 20, True),
    (7, 30, True),
    (5, 9, False),
    (2, 5, False),
    (4, 300, True),
]
LENGTHS = [(1, 1, 0), (7, 7, 0), (1, 137, 136), (3, 129, 126), (137, 2, 0), (129, 400, 271), (5, 9, -40), (2, 6, 500)]
CASES = [Case(table, lengths) for table in TABLES for lengths in LENGTHS]
QUICK = [
    Case((16, 20, True), (1, 137, 136)),
    Case((7, 30, True), (70, 150, 13)),
    Case((5, 9, False), (5, 9, -40)),
    Case((4, 300, True), (2, 6, 500)),
]

# T5's published thresholds for 32 buckets and distance 128: the first distance of each bucket.
BIDIRECTIONAL = [*range(8), 8, 12, 16, 23, 32, 46, 64, 91]
CAUSAL = [*range(16), 16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113]


def bucket_of(r, num_buckets, max_distance, bidirectional):
    """The definition for one distance, in float64."""
    side, first = num_buckets, 0
    if bidirectional:
        side //= 2
        first = side if r > 0 else 0
    distance = abs(r) if bidirectional else max(-r, 0)
    exact = side // 2
    if distance < exact:
        return first + distance
    slot = math.log(distance / exact) / math.log(max_distance / exact) * (side - exact)
    return first + min(exact + int(slot + 1e-6), side - 1)


def plain(table, sq, sk, bidirectional, max_distance, offset):
    n = table.shape[0]
    if max_distance == 0:  # DistanceBias: each distance has its own
        rows = torch.arange(sk, device=table.device) - torch.arange(sq, device=table.device)[:, None] - offset + n // 2
        return table[rows].permute(2, 0, 1)[None]
    return table[buckets_of(n, sq, sk, bidirectional, max_distance, offset).to(table.device)].permute(2, 0, 1)[None]


@functools.cache  # every dtype and backend asks for the same
def buckets_of(n, sq, sk, bidirectional, max_distance, offset):
    seen = {r: bucket_of(r, n, max_distance, bidirectional) for r in range(1 - sq - offset, sk - offset)}
    return torch.tensor([[seen[j - i - offset] for j in range(sk)] for i in range(sq)])


@pytest.mark.parametrize("firsts, bidirectional", [(BIDIRECTIONAL, True), (CAUSAL, False)], ids=["both", "causal"])
def test_published_thresholds(firsts, bidirectional):
    buckets = distance_buckets(bidirectional, 32, 128)
    span = len(buckets) // 2
    assert span == firsts[-1]
    expected = [sum(first <= d for first in firsts) - 1 for d in range(span + 1)]
    assert buckets[: span + 1].flip(0).tolist() == expected
    assert buckets[span + 1 :].tolist() == ([e + 16 for e in expected[1:]] if bidirectional else [0] * span)


@pytest.mark.parametrize("case", CASES + QUICK[1:2], ids=str)
def test_forward(each_backend, dtype, device, case):
    (n, most, bidirectional), (sq, sk, offset) = case.table, case.lengths
    table = torch.randn(n, 3, device=device).to(dtype)
    bias = pyfused.relative_bias(table, sq, sk, bidirectional=bidirectional, max_distance=most, query_offset=offset)
    assert bias.is_contiguous()
    assert torch.equal(bias, plain(table, sq, sk, bidirectional, most, offset))


@pytest.mark.parametrize("case", CASES[:32] + QUICK[1:], ids=str)
def test_backward(each_backend, dtype, device, case):
    (n, most, bidirectional), (sq, sk, offset) = case.table, case.lengths
    table = torch.randn(n, 3, device=device).to(dtype)
    cotangent = torch.randn(1, 3, sq, sk, device=device).to(dtype)
    options = {"bidirectional": bidirectional, "max_distance": most, "query_offset": offset}

    def gradient(function, wide):
        leaf = table.to(wide).requires_grad_()
        return torch.autograd.grad(function(leaf), leaf, cotangent.to(wide))[0]

    actual, again = (gradient(lambda t: pyfused.relative_bias(t, sq, sk, **options), dtype) for _ in range(2))
    assert actual.dtype == dtype
    assert torch.equal(actual, again)
    expected, truth = (
        gradient(lambda t: plain(t, sq, sk, bidirectional, most, offset), wide) for wide in (dtype, torch.float64)
    )
    assert_close(actual, expected, truth)


def test_tables_and_gradients_of_any_strides(each_backend, device):
    table = torch.randn(3, 16, device=device).T
    assert torch.equal(
        pyfused.relative_bias(table, 5, 9, bidirectional=True),
        pyfused.relative_bias(table.contiguous(), 5, 9, bidirectional=True),
    )
    leaf = table.contiguous().requires_grad_()
    grads = []
    for cotangent in (torch.ones(1, device=device).expand(1, 3, 5, 9), torch.ones(1, 3, 5, 9, device=device)):
        grads += torch.autograd.grad(pyfused.relative_bias(leaf, 5, 9, bidirectional=True), leaf, cotangent)
    assert torch.equal(*grads)


def test_opcheck(each_backend, device):
    table = torch.randn(8, 2, device=device, requires_grad=True)
    check_registered("relative_bias", (table, 3, 5, True, 20, 2))
    grad = torch.randn(1, 2, 3, 5, device=device)
    opcheck(torch.ops.pyfused.relative_bias_backward, (grad, 8, True, 20, 2))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"table": [1.0]}, TypeError, "table is a list"),
        ({"table": torch.ones(8, 2, dtype=torch.int32)}, TypeError, "table is int32"),
        ({"table": torch.ones(8)}, ValueError, r"table has shape \(8,\)"),
        ({"table": torch.ones(3, 2)}, ValueError, "table has 3 buckets; a bidirectional bias takes at least 4"),
        ({"table": torch.ones(1, 2), "bidirectional": False}, ValueError, "table has 1 buckets"),
        ({"bidirectional": 1}, TypeError, "bidirectional is an int"),
        ({"max_distance": 12.5}, TypeError, "max_distance is a float"),
        ({"max_distance": 2}, ValueError, "max_distance is 2; it takes more than 2"),
        ({"query_length": -1}, ValueError, "query_length is -1"),
        ({"key_length": -1}, ValueError, "key_length is -1"),
        ({"key_length": 2.0}, TypeError, "key_length is a float"),
        ({"query_offset": None}, TypeError, "query_offset is a NoneType"),
    ],
)
def test_bad_input_names_the_argument(change, error, message):
    arguments = {"table": torch.ones(8, 2), "query_length": 3, "key_length": 5, "bidirectional": True, **change}
    with pytest.raises(error, match=message):
        pyfused.relative_bias(**arguments)
