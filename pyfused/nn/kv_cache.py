"""Where do the keys and values of past tokens live? In buffers of fixed size, written in place, one per layer."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values of every layer, allocated once for `capacity` tokens.

    A model appends new tokens behind the first `length` and then raises `length`. Lowering `length` forgets the tokens
    behind it. Each layer has one tensor (2, B, H, capacity, D): a step writes its key and value in one copy, and attention
    reads one head's keys as one stretch of memory.

    Args:
        num_layers, batch_size, num_heads, capacity, head_size: L, B, H (of the keys), tokens per row, D.
        dtype, device: the model's.

    Attributes:
        length: tokens in every row.
        tensors: each layer's keys, then its values, (B, H, capacity, D).
        cross: each layer's keys and values (B, H, Se, D) of the encoder, once cross-attention has computed them.
        encoder_mask: (B, Se), which encoder tokens are real, or None.
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        num_heads: int,
        capacity: int,
        head_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ):
        shape = (2, batch_size, num_heads, capacity, head_size)
        self._set([torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers)])  # padding is never read
        self.length = 0
        self.positions: Tensor | None = None
        self.cross: list[tuple[Tensor, Tensor] | None] = [None] * num_layers
        self.encoder_mask: Tensor | None = None

    def _set(self, buffers: list[Tensor]) -> None:
        self._buffers = buffers
        self._layers = [_views(kv) for kv in buffers]
        self._rows = torch.arange(self.batch_size, device=buffers[0].device)
        self.tensors = [t for _, keys, values in self._layers for t in (keys, values)]

    def _layer(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """The layer's places to write to, its keys and its values. A trace makes these views from the buffer: with dynamic
        shapes torch 2.13 computes wrongly if graph inputs share memory and one of them is written."""
        return _views(self._buffers[layer]) if torch.compiler.is_compiling() else self._layers[layer]

    @property
    def capacity(self) -> int:
        """How many tokens fit into a row."""
        return self._buffers[0].shape[3]

    @property
    def batch_size(self) -> int:
        return self._buffers[0].shape[1]

    @property
    def signature(self) -> tuple[int, int, int, torch.dtype, torch.device]:
        """Layers, heads, head size, dtype, device. A model that uses this cache must have the same."""
        kv = self._buffers[0]
        return len(self._buffers), kv.shape[2], kv.shape[4], kv.dtype, kv.device

    def at_positions(self, positions: Tensor, extent: int) -> None:
        """From now on each row writes one token at its own position and reads `extent` places; the caller masks the places
        beyond its position. positions: (B,) int64 on the cache's device, which every append reads again. A CUDA graph may
        hold this tensor: it is not copied."""
        self.positions, self._extent = positions, extent

    @property
    def extent(self) -> int:
        """How many places the next token's attention reads, its own included."""
        return self.length + 1 if self.positions is None else self._extent

    def advance(self) -> None:
        """Counts one more token in every row."""
        if self.positions is None:
            self.length += 1
        else:
            self.positions += 1
            self._extent += 1

    def append(self, layer: int, key_value: Tensor) -> tuple[Tensor, Tensor]:
        """Writes key_value (B, S, 2, H, D) into a layer; returns its keys and values so far, views (B, H, Sk, D)."""
        places, keys, values = self._layer(layer)
        if self.positions is None:
            start, new = self.length, key_value.shape[1]
            end = start + new
            places.narrow(1, start, new).copy_(key_value)
        else:
            end = self._extent
            places[self._rows, self.positions] = key_value[:, 0]
        return keys.narrow(2, 0, end), values.narrow(2, 0, end)

    def grow(self, capacity: int) -> None:
        """Makes room for `capacity` tokens in each row: new memory, into which the present tokens are copied."""
        shape = (*self._buffers[0].shape[:3], capacity, self._buffers[0].shape[4])
        grown = [kv.new_empty(shape) for kv in self._buffers]
        for new, kv in zip(grown, self._buffers):
            new[:, :, :, : kv.shape[3]] = kv
        self._set(grown)

    def put(self, row: int, other: KVCache) -> None:
        """Copies the tokens of another cache's only row to the front of a row of this one."""
        for mine, its in zip(self._buffers, other._buffers):
            mine[:, row, :, : other.length] = its[:, 0, :, : other.length]

    def put_all(self, other: KVCache, length: int) -> None:
        """Copies the first `length` places of another cache's rows to the front of this one's: each row to as many as there are
        for it."""
        times = self.batch_size // other.batch_size
        for mine, its in zip(self._buffers, other._buffers):
            mine[:, :, :, :length] = its[:, :, :, :length].repeat_interleave(times, 1)

    def keys(self, layer: int) -> Tensor:
        """The keys of a layer so far, a view (B, H, length, D)."""
        return self._layer(layer)[1][:, :, : self.length]

    def values(self, layer: int) -> Tensor:
        """The values of a layer so far, a view (B, H, length, D)."""
        return self._layer(layer)[2][:, :, : self.length]

    def select(self, rows: Tensor, sources: Tensor | slice | None = None) -> None:
        """Keeps these rows, (B',) int64; a row may occur several times. This copies the cache once, about as many bytes as a
        step reads. sources: the encoder's rows to keep, if they are not `rows`; slice(None) keeps all without a copy.
        """
        self._set([kv.index_select(1, rows) for kv in self._buffers])
        if self.positions is not None:
            self.positions = self.positions[rows]
        kept = rows if sources is None else sources
        self.cross = [None if kv is None else (kv[0][kept], kv[1][kept]) for kv in self.cross]
        self.encoder_mask = None if self.encoder_mask is None else self.encoder_mask[kept]

    def reorder(self, rows: list[int], first: int) -> None:
        """Row i becomes row rows[i], in place, from token `first` on. The caller knows that the tokens before it are equal.
        Rows that stay cost nothing."""
        moved = [i for i, row in enumerate(rows) if row != i]
        end = self.length if self.positions is None else self._extent
        if not moved or first >= end:
            return
        device = self._buffers[0].device
        places = torch.tensor(moved, device=device)
        origins = torch.tensor([rows[i] for i in moved], device=device)
        for kv in self._buffers:
            part = kv[:, :, :, first:end]
            part[:, places] = part[:, origins]  # the right side is a copy, so rows may swap

    def reorder_all(self, rows: Tensor, first: int) -> None:
        """As reorder, for a CUDA graph, which must do the same work each time: rows (B,) int64 on the cache's device, and every
        place from `first` on is copied."""
        for kv in self._buffers:
            part = kv[:, :, :, first:]
            part.copy_(part.index_select(1, rows))


def _views(buffer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(2, B, H, capacity, D) -> places (B, capacity, 2, H, D), keys and values (B, H, capacity, D)."""
    return buffer.permute(1, 3, 0, 2, 4), buffer[0], buffer[1]
