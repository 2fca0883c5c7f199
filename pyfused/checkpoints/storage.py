"""How does a weight file become a module's tensors without a second copy of the weights in memory?

The readers of both formats only parse headers. They give one `Entry` for each tensor: the place of its bytes. The file is then
mapped and copied slice by slice into the parameter, transposed and cast on the way. Touched pages of a mapped file count as
resident memory, so each slice's pages are released before the next slice.
"""

from __future__ import annotations

import math
import mmap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_SLICE_BYTES = 4 << 20  # in memory twice at any time; larger slices load no faster


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: little-endian, row-major, ``offset`` bytes from the file's start."""

    name: str
    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.file}: tensor {self.name!r}"


class MappedFile:
    """A weight file mapped read-only. Slices share its memory; do not use one after `forget` has released it."""

    def __init__(self, path: Path) -> None:
        try:
            with open(path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: cannot be mapped: {error}") from error
        with warnings.catch_warnings():
            # torch warns that the buffer is read-only; nothing here writes to it
            warnings.simplefilter("ignore", UserWarning)
            self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self.size = len(self._map)

    def slice(self, entry: Entry, start: int, stop: int) -> torch.Tensor:
        """Elements ``start`` to ``stop`` of the tensor, flat."""
        item = entry.dtype.itemsize
        raw = self._bytes[entry.offset + start * item : entry.offset + stop * item]
        # safetensors does not promise alignment, and torch requires it
        return (raw if raw.storage_offset() % item == 0 else raw.clone()).view(entry.dtype)

    def forget(self, entry: Entry, start: int, stop: int) -> None:
        """Releases the memory pages of these elements. A later slice reads them from the file again."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        item = entry.dtype.itemsize
        first = (entry.offset + start * item) // mmap.PAGESIZE * mmap.PAGESIZE
        self._map.madvise(mmap.MADV_DONTNEED, first, min(entry.offset + stop * item, self.size) - first)


def check_inside(entry: Entry, file_size: int) -> None:
    """Raises ValueError when the tensor's bytes are not all in the file."""
    if entry.offset < 0 or entry.offset + entry.nbytes > file_size:
        raise ValueError(
            f"{entry} ends at byte {entry.offset + entry.nbytes}, but the file has {file_size} bytes: it is truncated; "
            f"download it again"
        )


def open_files(entries: list[Entry]) -> dict[Path, MappedFile]:
    """Maps the entries' files. Checks again that the entries lie inside: a file may have shrunk since its header was read."""
    files = {path: MappedFile(path) for path in dict.fromkeys(entry.file for entry in entries)}
    for entry in entries:
        check_inside(entry, files[entry.file].size)
    return files


def copy_tensor(target: torch.Tensor, entry: Entry, source: MappedFile, *, transposed: bool = False) -> None:
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
            source.forget(entry, start, stop)
        return
    columns, rows = target.shape
    step = max(1, _SLICE_BYTES // (entry.dtype.itemsize * columns))
    for row in range(0, rows, step):
        last = min(row + step, rows)
        part = source.slice(entry, row * columns, last * columns).view(last - row, columns)
        target[:, row:last].copy_(part.t())
        source.forget(entry, row * columns, last * columns)


def slice_rows(
    entry: Entry, source: MappedFile, columns: int, first: int, end: int
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Rows ``first`` to ``end`` of a stored matrix of so many columns, a slice at a time: (its first row, its end, the slice).
    Each is released before the next; only the pages that the caller touched have been read."""
    step = max(1, _SLICE_BYTES // (entry.dtype.itemsize * columns))
    for start in range(first, end, step):
        stop = min(start + step, end)
        yield start, stop, source.slice(entry, start * columns, stop * columns).view(stop - start, columns)
        source.forget(entry, start * columns, stop * columns)


def same_values(first: Entry, second: Entry) -> bool:
    """Whether two stored tensors are equal element by element (a NaN equals nothing). Compares slice by slice."""
    if first.shape != second.shape:
        return False
    files = open_files([first, second])
    step = _SLICE_BYTES // max(first.dtype.itemsize, second.dtype.itemsize)
    for start in range(0, first.numel, step):
        stop = min(start + step, first.numel)
        equal = torch.equal(
            files[first.file].slice(first, start, stop).double(), files[second.file].slice(second, start, stop).double()
        )
        for entry in (first, second):
            files[entry.file].forget(entry, start, stop)
        if not equal:
            return False
    return True
