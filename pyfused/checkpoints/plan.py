"""Which stored tensors make up each pyfused tensor, and do the files hold exactly those?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from pyfused.checkpoints.storage import FLOATS, Entry, MappedFile, copy_tensor


@dataclass(frozen=True)
class Piece:
    """One stored tensor: its name and shape in the file; ``transposed`` when the file holds (in, out)."""

    name: str
    shape: tuple[int, ...]
    transposed: bool = False


@dataclass(frozen=True)
class Target:
    """One pyfused tensor: the pieces that fill it, stacked along its first dimension."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


Plan = dict[str, Target]


def whole(shape: tuple[int, ...], name: str) -> Target:
    """A tensor stored as it is."""
    return Target(shape, (Piece(name, shape),))


def transposed(shape: tuple[int, int], name: str, stored: tuple[int, ...] | None = None) -> Target:
    """A matrix (out, in) stored as (in, out), or as ``stored`` where one side is split."""
    return Target(shape, (Piece(name, stored or shape[::-1], True),))


def check_plan(plan: Plan, entries: Mapping[str, Entry], files: Iterable[Path], where: Path) -> None:
    """Names, shapes and dtypes of the plan against the headers: raises ValueError before a byte of weights is read.

    ``files`` are the weight files, for the message about a missing tensor; ``where`` the configuration that wants it.
    """
    wanted = {piece.name: piece for target in plan.values() for piece in target.pieces}
    listed = ", ".join(str(path) for path in files)
    for name, piece in wanted.items():
        entry = entries.get(name)
        if entry is None:
            raise ValueError(f"{listed}: tensor {name!r} of shape {piece.shape} is missing, which {where} calls for")
        if entry.shape != piece.shape:
            raise ValueError(f"{entry} has shape {entry.shape}, but {where} calls for {piece.shape}")
        if entry.dtype not in FLOATS:
            raise ValueError(f"{entry} has dtype {entry.dtype}; weights are {', '.join(map(str, FLOATS))}")
    extra = [entry for name, entry in entries.items() if name not in wanted]
    if extra:
        more = f" (and {len(extra) - 1} more: {[entry.name for entry in extra[1:6]]})" if len(extra) > 1 else ""
        raise ValueError(f"{extra[0]}{more} is not part of the model that {where} describes")


def fill(target: torch.Tensor, plan: Target, entries: Mapping[str, Entry], files: Mapping[Path, MappedFile]) -> None:
    """Copies the pieces into ``target`` of the planned shape."""
    width = math.prod(plan.shape[1:])
    row = 0
    for piece in plan.pieces:
        rows = math.prod(piece.shape) // width
        entry = entries[piece.name]
        copy_tensor(target[row : row + rows], entry, files[entry.file], transposed=piece.transposed)
        row += rows
