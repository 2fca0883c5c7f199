"""How does a batch leave out its padding? It puts the real tokens one after the other, and later back into rows."""

from __future__ import annotations

import torch
from torch import Tensor

from ..tracing import tracing


class Packing:
    """Where the real tokens of a padded batch are.

    Projections, norms and feed-forward networks work token by token and take the packed rows as they are. Attention also
    takes cu_seqlens and max_seqlen, which keep its sequences apart.

    Args:
        mask: (B, S) bool, True at a real token. On a GPU, reading it synchronises.

    Attributes:
        shape: (B, S). rows: (T,) int64, the real tokens' places in the flattened batch, ascending.
        cu_seqlens: (B + 1,) int32. max_seqlen: the most real tokens in a row. Rows may be empty.
    """

    def __init__(self, mask: Tensor):
        self.shape = (mask.shape[0], mask.shape[1])
        self.rows = mask.flatten().nonzero().squeeze(1)
        lengths = mask.sum(1, dtype=torch.int32)
        self.cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        self.max_seqlen = int(lengths.max())

    def pack(self, x: Tensor) -> Tensor:
        """(B, S, ...) -> (1, T, ...), without the padding."""
        return x.flatten(0, 1).index_select(0, self.rows)[None]

    def unpack(self, x: Tensor) -> Tensor:
        """(1, T, ...) -> (B, S, ...), with zeros at the padding."""
        b, s = self.shape
        return x.new_zeros((b * s, *x.shape[2:])).index_copy(0, self.rows, x[0]).view(b, s, *x.shape[2:])

    def at(self, x: Tensor, places: Tensor) -> Tensor:
        """(1, T, ...) -> (B, ...): each row's real token at places (B,)."""
        flat = torch.arange(self.shape[0], device=places.device) * self.shape[1] + places
        return x[0, torch.searchsorted(self.rows, flat)]


def packing_of(mask: Tensor, *, unbroken: bool = False) -> Packing | None:
    """The packing of a batch with this mask, or None where padding cannot be left out.

    It cannot if no token is real, or in a trace, whose shapes cannot depend on values. With `unbroken` it also cannot if a
    row has padding between its real tokens: packing would bring them closer together.
    """
    if tracing() or type(mask) is not Tensor or not mask.numel():
        return None
    if unbroken and bool((mask[:, 1:] & ~mask[:, :-1]).sum(1).add(mask[:, 0]).gt(1).any()):
        return None
    found = Packing(mask)
    return found if found.max_seqlen else None


def without_padding(x: Tensor, mask: Tensor) -> Tensor:
    """(B, S, ...) with zeros at the padding; mask (B, S)."""
    return x.masked_fill(~mask.view(*mask.shape, *(1,) * (x.dim() - 2)), 0.0)
