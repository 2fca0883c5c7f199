"""In which order are the rows of a packed projection if each head's rows must be together?

A projection to queries, keys and values has the rows of all queries first: (parts * H * d, ...). By heads it is
(H, parts * d, ...): head by head, the rows of its query, then its key's, then its value's.
"""

from __future__ import annotations

from torch import Tensor


def by_heads(packed: Tensor, parts: int, heads: int) -> Tensor:
    """(parts * H * d, ...) -> (H, parts * d, ...)."""
    return packed.unflatten(0, (parts, heads, -1)).transpose(0, 1).flatten(1, 2)


def from_heads(rows: Tensor, parts: int, heads: int) -> Tensor:
    """The inverse of by_heads. With one part nothing was moved."""
    return rows if parts == 1 else rows.unflatten(1, (parts, -1)).transpose(0, 1).flatten(0, 2)
