"""How does a weight file become a module's tensors without a second copy of the weights in memory?

The readers of every format only parse headers. They give one `Entry` for each tensor: the place of its bytes. The bytes are
then read slice by slice into the parameter, transposed and cast on the way. They are read and not mapped: a mapped file
that shrinks ends the process.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# What a header may hold. The largest models here have about a thousand tensors; their names have 60 characters
MOST_TENSORS = 20_000
LONGEST_NAME = 512

_SLICE_BYTES = 1 << 20  # in memory twice at any time; it fits a processor's cache, and larger slices load no faster


class Stamp(NamedTuple):
    """What shows that a file is not the one whose header was read, or was written since."""

    size: int
    modified: int
    inode: int
    device: int


def stamp_of(path: Path | int) -> Stamp:
    """The stamp of a file by its path or descriptor. Raises OSError if there is no file."""
    found = os.stat(path)
    return Stamp(found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev)


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: little-endian, ``offset`` bytes from the file's start.

    by_columns: the file holds a matrix column after column, as PyTorch pickles a transposed one. Else it is row-major.
    stamp: the file's, from before its header was read.
    """

    name: str
    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    by_columns: bool = False
    stamp: Stamp | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.file}: tensor {self.name!r}"


class OpenFile:
    """A weight file, open for reading. Raises ValueError if it cannot be read or is not the one with ``stamp``."""

    def __init__(self, path: Path, stamp: Stamp | None = None) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise ValueError(f"{path}: cannot be read: {error}") from error
        self._stamp = stamp or stamp_of(self._descriptor)
        self.size = self._stamp.size

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def check_unchanged(self) -> None:
        """Raises ValueError if the file was written or replaced since its header was read."""
        if stamp_of(self._descriptor) != self._stamp:
            raise ValueError(f"{self.path}: has changed since its header was read; open the checkpoint again")

    def slice(self, entry: Entry, start: int, stop: int) -> torch.Tensor:
        """Elements ``start`` to ``stop`` of the tensor, flat and in the file's order. Raises ValueError if they are gone."""
        item = entry.dtype.itemsize
        raw = torch.empty((stop - start) * item, dtype=torch.uint8, device="cpu")
        view, place = memoryview(raw.numpy().data), entry.offset + start * item
        try:
            while view:
                count = os.preadv(self._descriptor, [view], place)
                if not count:
                    raise ValueError(f"{entry} is no longer in the file, which has changed since its header was read")
                view, place = view[count:], place + count
        except OSError as error:
            raise ValueError(f"{entry} cannot be read: {error}") from error
        return raw.view(entry.dtype)


def check_inside(entry: Entry, file_size: int) -> None:
    """Raises ValueError when the tensor's bytes are not all in the file."""
    if entry.offset < 0 or entry.offset + entry.nbytes > file_size:
        raise ValueError(
            f"{entry} ends at byte {entry.offset + entry.nbytes}, but the file has {file_size} bytes: it is truncated; "
            f"download it again"
        )


def open_files(entries: list[Entry]) -> dict[Path, OpenFile]:
    """Opens the entries' files. Raises ValueError if one is not the file whose header was read, or lacks an entry's bytes."""
    files: dict[Path, OpenFile] = {}
    for entry in entries:
        if entry.file not in files:
            files[entry.file] = OpenFile(entry.file, entry.stamp)
            files[entry.file].check_unchanged()
        check_inside(entry, files[entry.file].size)
    return files


def copy_tensor(target: torch.Tensor, entry: Entry, source: OpenFile, *, transposed: bool = False) -> None:
    """Copies one stored tensor into ``target``, casting to its dtype and moving to its device.

    target: contiguous, with the same number of elements.
    transposed: the target is (out, in) and the file holds (in, out), where one side may be split into dimensions.
    """
    if not transposed:
        flat = target.view(-1)
        step = _SLICE_BYTES // entry.dtype.itemsize
        for start in range(0, entry.numel, step):
            stop = min(start + step, entry.numel)
            flat[start:stop].copy_(source.slice(entry, start, stop))
        return
    columns, rows = target.shape
    step = max(1, _SLICE_BYTES // (entry.dtype.itemsize * columns))
    for row in range(0, rows, step):
        last = min(row + step, rows)
        part = source.slice(entry, row * columns, last * columns).view(last - row, columns)
        target[:, row:last].copy_(part.t())


def slice_rows(
    entry: Entry, source: OpenFile, columns: int, first: int, end: int
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Rows ``first`` to ``end`` of a stored matrix of so many columns, slice by slice: (its first row, its end, the slice)."""
    step = max(1, _SLICE_BYTES // (entry.dtype.itemsize * columns))
    for start in range(first, end, step):
        stop = min(start + step, end)
        yield start, stop, source.slice(entry, start * columns, stop * columns).view(stop - start, columns)


def same_values(first: Entry, second: Entry) -> bool:
    """Whether two stored tensors are equal element by element (a NaN equals nothing). Compares slice by slice."""
    if first.shape != second.shape:
        return False
    files = open_files([first, second])
    if first.by_columns != second.by_columns:  # rare: one of two tied matrices was transposed
        whole = [files[entry.file].slice(entry, 0, entry.numel).double() for entry in (first, second)]
        shapes = [entry.shape[:: -1 if entry.by_columns else 1] for entry in (first, second)]
        return torch.equal(whole[0].view(shapes[0]), whole[1].view(shapes[1]).t())
    step = _SLICE_BYTES // max(first.dtype.itemsize, second.dtype.itemsize)
    for start in range(0, first.numel, step):
        stop = min(start + step, first.numel)
        equal = torch.equal(
            files[first.file].slice(first, start, stop).double(), files[second.file].slice(second, start, stop).double()
        )
        if not equal:
            return False
    return True
