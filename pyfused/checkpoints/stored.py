"""Which tensors does a weight file hold for pyfused's, and in which files do they go? The same for both formats.

A plan says how stored tensors make up pyfused's; here it is read backwards. Values are made block by block, cast and transposed
on the way, so that writing takes a few MB beside the model.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pyfused.checkpoints.plan import Plan

_BLOCK_BYTES = 4 << 20
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class Stored:
    """One tensor of a weight file: rows ``first`` to ``last`` of the pyfused tensor that ``read`` returns."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    transposed: bool
    first: int
    last: int
    read: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def renamed(self, name: str) -> Stored:
        """The same under another name."""
        return replace(self, name=name)

    def blocks(self) -> Iterator[torch.Tensor]:
        """The values in the file's order: matrices of a few MB on the CPU, contiguous, in ``dtype``."""
        part = self.read().detach()[self.first : self.last]
        matrix = part.t() if self.transposed else part.reshape(part.shape[0], -1)
        step = max(1, _BLOCK_BYTES // (matrix.shape[1] * self.dtype.itemsize))
        for row in range(0, matrix.shape[0], step):
            yield matrix[row : row + step].to("cpu", self.dtype).contiguous()


def stored_tensors(plan: Plan, read: Callable[[str], torch.Tensor], dtype: torch.dtype) -> list[Stored]:
    """What a file holds for the plan's tensors.

    read: returns a pyfused tensor by its name. dtype: of all tensors for which the plan does not say another.
    """
    found = []
    for ours, target in plan.items():
        row, width = 0, math.prod(target.shape[1:])
        for piece in target.pieces:
            end = row + math.prod(piece.shape) // width
            kind = piece.dtype or dtype
            found.append(Stored(piece.name, piece.shape, kind, piece.transposed, row, end, partial(read, ours)))
            row = end
    return found


def shard_bytes(size: int | str) -> int:
    """The bytes of ``max_shard_size``: an int of at least 1, or a str such as "10GB", "500MB" or "2GiB".

    Raises TypeError or ValueError for anything else.
    """
    takes = 'it takes a number of bytes, or a str such as "10GB", "500MB" or "2GiB"'
    if isinstance(size, bool) or not isinstance(size, int | str):
        raise TypeError(f"max_shard_size is of type {type(size).__name__}; {takes}")
    if isinstance(size, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]i?B)", size, re.IGNORECASE)
        if match is None:
            raise ValueError(f"max_shard_size is {size!r}; {takes}")
        size = int(float(match[1]) * _UNITS[match[2].upper()])
    if size < 1:
        raise ValueError(f"max_shard_size is {size}; {takes}")
    return size


def shards(tensors: list[Stored], most: int) -> list[list[Stored]]:
    """The tensors in order, in groups of at most ``most`` bytes. A tensor that is larger gets a group of its own."""
    groups: list[list[Stored]] = []
    filled = 0
    for tensor in tensors:
        if not groups or filled + tensor.nbytes > most:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.nbytes
    return groups


def raw_bytes(block: torch.Tensor) -> Any:
    """The bytes of a contiguous CPU tensor, not copied."""
    return block.reshape(-1).view(torch.uint8).numpy()


def write_file(path: Path, content: bytes) -> None:
    """Writes a small file."""
    with open(path, "wb", opener=_opener) as file:
        file.write(content)


def _opener(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_EXCL, 0o666)  # every file of a checkpoint is written once
