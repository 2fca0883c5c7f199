"""relative_bias: T5's bias of a score: table[bucket of (key position - query position), head] (Raffel et al. 2020).

attention takes the same table as `relative_bias=RelativeBias(...)` and computes this inside its kernel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..kernels.shared.buckets import EACH, exact_buckets
from ..rules import its_kind
from .checks import check_floating
from .cost import Cost, size
from .registration import Operator


class RelativeBias(NamedTuple):
    """T5's relative position bias, as attention takes it.

    Attributes:
        table: (num_buckets, H): a bias for each bucket of distances and each head.
        bidirectional: True gives half of the buckets to keys after the query (an encoder). With False all such keys share
            the bucket of distance 0 (a decoder, where causality hides them).
        max_distance: distances from here on share the last bucket.
    """

    table: torch.Tensor
    bidirectional: bool
    max_distance: int = 128


class DistanceBias(NamedTuple):
    """A bias that depends on the head and on how far the key is from the query, as attention takes it: ALiBi, or learned.

    Attributes:
        table: (H, 2 L - 1): column L - 1 + r is the bias of a key r positions after its query. L is at least the number of
            queries and of keys. Finite: a number such as -1e4 hides a key; -inf may give NaN on a GPU.
    """

    table: torch.Tensor


def by_distance(bias: DistanceBias) -> RelativeBias:
    """The same table as the kernels read it: (2 L - 1, H), with a bucket for each distance."""
    return RelativeBias(bias.table.t(), True, EACH)


def relative_bias(
    table: torch.Tensor,
    query_length: int,
    key_length: int,
    *,
    bidirectional: bool,
    max_distance: int = 128,
    query_offset: int = 0,
) -> torch.Tensor:
    """T5's relative position bias as a tensor. torch.autocast does not change its dtype.

    Args:
        table: (num_buckets, H), float32, float16, bfloat16 (float64 runs on the reference); num_buckets is at least 2, or
            4 if bidirectional. A bidirectional bias does not use the last bucket of an odd number.
        query_length, key_length: Sq and Sk, at least 0.
        bidirectional, max_distance: as in RelativeBias. max_distance exceeds the number of distances with a bucket of
            their own, which is num_buckets // 2, or // 4 if bidirectional.
        query_offset: the position of the first query; keys start at 0. With a cache, the number of cached tokens.

    Returns:
        (1, H, Sq, Sk) of table's dtype, contiguous.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    given = table, query_length, key_length, bidirectional, max_distance, query_offset
    outputs = _RELATIVE_BIAS.call_prepared(given)
    if outputs is None:
        bound = bind(
            table,
            query_length,
            key_length,
            bidirectional=bidirectional,
            max_distance=max_distance,
            query_offset=query_offset,
        )
        outputs = _RELATIVE_BIAS.call_checked(given, bound)
    return outputs[0]


def bind(table, query_length, key_length, *, bidirectional, max_distance=128, query_offset=0) -> tuple[Any, ...]:
    """Checks the arguments and puts them in the registered operator's order."""
    check_floating(table, "table")
    check_buckets(table, bidirectional, max_distance)
    for name, length in (("query_length", query_length), ("key_length", key_length)):
        if not _is_int(length):
            raise TypeError(f"{name} is {its_kind(length)}; it takes an int")
        if length < 0:
            raise ValueError(f"{name} is {length}; it takes at least 0")
    if not _is_int(query_offset):
        raise TypeError(f"query_offset is {its_kind(query_offset)}; it takes an int")
    return table, query_length, key_length, bidirectional, max_distance, query_offset


def check_buckets(table: torch.Tensor, bidirectional: bool, max_distance: int, prefix: str = "") -> None:
    """Raises unless the buckets' formula fits this table. `prefix` goes before the arguments' names."""
    if not isinstance(bidirectional, bool):
        raise TypeError(f"{prefix}bidirectional is {its_kind(bidirectional)}; it takes a bool")
    if not _is_int(max_distance):
        raise TypeError(f"{prefix}max_distance is {its_kind(max_distance)}; it takes an int")
    if table.dim() != 2:
        raise ValueError(f"{prefix}table has shape {tuple(table.shape)}; it takes (num_buckets, H)")
    least = 4 if bidirectional else 2
    if table.shape[0] < least:
        side = "bidirectional" if bidirectional else "one-sided"
        raise ValueError(f"{prefix}table has {table.shape[0]} buckets; a {side} bias takes at least {least}")
    exact = exact_buckets(bidirectional, table.shape[0])
    if max_distance <= exact:
        raise ValueError(
            f"{prefix}max_distance is {max_distance}; it takes more than {exact}, the distances that {table.shape[0]} "
            "buckets tell apart exactly"
        )


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def _fake(table, query_length, key_length, bidirectional, max_distance, query_offset):
    return table.new_empty((1, table.shape[1], query_length, key_length))


def _setup_context(ctx, inputs, output):
    table, _, _, *ctx.options = inputs
    ctx.num_buckets = table.shape[0]


def _backward(ctx, grad_out):
    (grad_table,) = _RELATIVE_BIAS_BACKWARD(grad_out, ctx.num_buckets, *ctx.options)
    return grad_table, None, None, None, None, None


def _backward_fake(grad_out, num_buckets, bidirectional, max_distance, query_offset):
    return grad_out.new_empty((num_buckets, grad_out.shape[1]))


def _cost(table, query_length, key_length, bidirectional, max_distance, query_offset):
    """Memory only: each result is copied from the table."""
    return Cost(size(table) + table.shape[1] * query_length * key_length * table.element_size(), 0)


def _backward_cost(grad_out, num_buckets, bidirectional, max_distance, query_offset):
    return Cost(size(grad_out) + num_buckets * grad_out.shape[1] * grad_out.element_size(), grad_out.numel())


_RELATIVE_BIAS = Operator(
    "relative_bias",
    "(Tensor table, SymInt query_length, SymInt key_length, bool bidirectional, int max_distance, SymInt query_offset)"
    " -> Tensor bias",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    cost=_cost,
)
_RELATIVE_BIAS_BACKWARD = Operator(
    "relative_bias_backward",
    "(Tensor grad_out, SymInt num_buckets, bool bidirectional, int max_distance, SymInt query_offset) -> Tensor grad_table",
    fake=_backward_fake,
    cost=_backward_cost,
)
