"""Which stored tensors make up each pyfused tensor, and do the files hold exactly those?"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from pyfused.checkpoints.storage import FLOATS, Entry, OpenFile, copy_tensor


@dataclass(frozen=True)
class Piece:
    """One stored tensor: its name and shape in the file; ``transposed`` when the file holds (in, out).

    dtype: what the file must hold; None is any dtype of weights.
    """

    name: str
    shape: tuple[int, ...]
    transposed: bool = False
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Target:
    """One pyfused tensor: the pieces that fill it, stacked along its first dimension."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype that the tensor must have; None if it may be any dtype of weights."""
        return self.pieces[0].dtype


Plan = dict[str, Target]


def whole(shape: tuple[int, ...], name: str) -> Target:
    """A tensor that is stored unchanged."""
    return Target(shape, (Piece(name, shape),))


def transposed(shape: tuple[int, int], name: str) -> Target:
    """A matrix (out, in) stored as (in, out)."""
    return Target(shape, (Piece(name, shape[::-1], True),))


def missing_from(plan: Plan, entries: Mapping[str, Entry]) -> list[str]:
    """The stored names that the plan needs and the files lack."""
    return [piece.name for target in plan.values() for piece in target.pieces if piece.name not in entries]


def check_plan(plan: Plan, entries: Mapping[str, Entry], files: Iterable[Path], where: Path) -> None:
    """Raises ValueError if the headers lack a name, shape or dtype of the plan, or hold more. Reads no weights.

    files, where: the weight files and the configuration, for the messages.
    """
    wanted = {piece.name: piece for target in plan.values() for piece in target.pieces}
    if missing := missing_from(plan, entries):
        raise ValueError(
            f"{', '.join(map(str, files))}: tensor {missing[0]!r} of shape {wanted[missing[0]].shape} is missing, which "
            f"{where} calls for{_more(missing)}"
        )
    for name, piece in wanted.items():
        entry = entries[name]
        if piece.dtype is not None and entry.dtype != piece.dtype:
            raise ValueError(f"{entry} has dtype {entry.dtype}, but {where} calls for {piece.dtype}")
        if piece.dtype is None and entry.dtype not in FLOATS:
            kind = "quantised, or not a weight" if entry.dtype.itemsize == 1 else "not a weight"
            raise ValueError(
                f"{entry} has dtype {entry.dtype}, so it is {kind}; weights are {', '.join(map(str, FLOATS))}"
            )
        if entry.shape != piece.shape:
            raise ValueError(f"{entry} has shape {entry.shape}, but {where} calls for {piece.shape}")
    extra = [entry for name, entry in entries.items() if name not in wanted]
    if extra:
        more = _more([entry.name for entry in extra])
        raise ValueError(f"{extra[0]}{more} is not part of the model that {where} describes{_reason(extra[0].name)}")


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more: {names[1:6]})" if len(names) > 1 else ""


def _reason(name: str) -> str:
    """The end of an error message: what the unexpected tensor says about the model."""
    if re.search(r"block\.[1-9]\d*\..*relative_attention_bias", name):
        return ": UMT5 has a table of position biases in every layer; pyfused supports T5, where all layers share one table"
    return ""


def fill(target: torch.Tensor, plan: Target, entries: Mapping[str, Entry], files: Mapping[Path, OpenFile]) -> None:
    """Copies the pieces into ``target`` of the planned shape. Raises ValueError if a file changes meanwhile."""
    width = math.prod(plan.shape[1:])
    row = 0
    for piece in plan.pieces:
        rows = math.prod(piece.shape) // width
        entry = entries[piece.name]
        source = files[entry.file]
        copy_tensor(target[row : row + rows], entry, source, transposed=piece.transposed != entry.by_columns)
        source.check_unchanged()
        row += rows
