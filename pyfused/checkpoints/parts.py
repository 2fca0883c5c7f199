"""Which part of a stored tensor does this rank hold, and how is that part alone copied into its memory?

A DTensor holds some rows and some columns of the whole. Here they are lists of indices, so any placement and any order of the
rows is one case: sharded by parallelize_module, by fully_shard, by both, and packed projections spread by heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from pyfused.checkpoints.plan import Target
from pyfused.checkpoints.storage import Entry, OpenFile, slice_rows
from pyfused.nn.packed_heads import by_heads

Run = tuple[int, int, int]  # (local, whole, count): the indices from `whole` on are the local ones from `local` on


def whole_shape(tensor: torch.Tensor, packed: tuple[int, int]) -> tuple[int, ...]:
    """The shape of the stored tensor. packed: the parts and heads of a projection spread by heads, or (1, 1)."""
    shape = tuple(tensor.shape)
    return shape if packed[0] == 1 else (shape[0] * shape[1], *shape[2:])


def fill_part(
    tensor: Any, packed: tuple[int, int], plan: Target, entries: Mapping[str, Entry], files: Mapping[Path, OpenFile]
) -> None:
    """Copies this rank's part of the planned pieces into a DTensor's local memory. ValueError if a file changes meanwhile."""
    rows, columns = _indices(tensor, packed, plan.shape)
    local = tensor.to_local()
    if local.numel() != len(rows) * len(columns):
        raise ValueError(
            f"module: a tensor with placements {tensor.placements} on {tensor.device_mesh}; they are not supported"
        )
    target = local.view(len(rows), len(columns))
    width, begin = math.prod(plan.shape[1:]), 0
    across = list(_runs(columns))
    for piece in plan.pieces:
        end = begin + math.prod(piece.shape) // width
        inside = ((rows >= begin) & (rows < end)).nonzero()[:, 0]
        entry = entries[piece.name]
        source = files[entry.file]
        transposed = piece.transposed != entry.by_columns
        for down in _runs(rows[inside] - begin, inside):
            for run in across:
                _copy(target, entry, source, down, run, (end - begin, width), transposed)
        source.check_unchanged()
        begin = end


def _indices(tensor: Any, packed: tuple[int, int], shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """The stored rows and columns that the local tensor has, in its order. A vector has one column."""
    parts, heads = packed
    rows = torch.arange(shape[0], device="cpu")
    lead = 1 if parts == 1 else 2  # dimensions that hold rows
    rows = rows if parts == 1 else by_heads(rows, parts, heads)
    for dim in range(lead):
        rows = _kept(rows, dim, tensor, dim)
    columns = torch.arange(math.prod(shape[1:]), device="cpu")
    if len(shape) > 1:
        columns = _kept(columns, 0, tensor, lead)
    return rows.flatten(), columns


def _kept(index: torch.Tensor, dim: int, tensor: Any, of_tensor: int) -> torch.Tensor:
    """What the placements of the tensor's dimension `of_tensor` leave of the index along `dim`.

    fully_shard on top of a mesh divides what parallelize_module left, though its dimension of the mesh comes first. Its
    placement, which has a split_factor, is therefore applied last.
    """
    coordinate = tensor.device_mesh.get_coordinate()
    found = [
        (hasattr(p, "split_factor"), i) for i, p in enumerate(tensor.placements) if getattr(p, "dim", None) == of_tensor
    ]
    for _, i in sorted(found):
        size = -(-index.shape[dim] // tensor.device_mesh.size(i))
        start = min(coordinate[i] * size, index.shape[dim])
        index = index.narrow(dim, start, min(size, index.shape[dim] - start))
    return index


def _runs(index: torch.Tensor, local: torch.Tensor | None = None) -> Iterator[Run]:
    """The stretches in which index and local both count on by 1. local: 0, 1, ... if None."""
    local = torch.arange(len(index), device="cpu") if local is None else local
    breaks = ((index.diff() != 1) | (local.diff() != 1)).nonzero()[:, 0] + 1
    edges = [0, *breaks.tolist(), len(index)]
    for begin, end in pairwise(edges):
        if end > begin:
            yield int(local[begin]), int(index[begin]), end - begin


def _copy(
    target: torch.Tensor,
    entry: Entry,
    source: OpenFile,
    rows: Run,
    columns: Run,
    size: tuple[int, int],
    transposed: bool,
) -> None:
    """Copies a rectangle of one stored matrix. rows, columns, size: of the target; the file may hold the transpose."""
    part = target.narrow(0, rows[0], rows[2]).narrow(1, columns[0], columns[2])
    if transposed:
        part, rows, columns, size = part.t(), columns, rows, size[::-1]
    for start, stop, stored in slice_rows(entry, source, size[1], rows[1], rows[1] + rows[2]):
        part[start - rows[1] : stop - rows[1]].copy_(stored[:, columns[1] : columns[1] + columns[2]])
