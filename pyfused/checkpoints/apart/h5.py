"""Where in an h5 file is each variable? The part that h5py, and with it the HDF5 library, reads.

h5py only parses the structure. Each variable's values must be one contiguous block. Links, external or virtual data and
compression are refused: Keras does not use them. This file runs in a child process and imports nothing of pyfused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_DTYPES = {"<f4": "float32", "<f2": "float16", "<f8": "float64"}
# Counters and seeds. If the model needs such a variable as a weight, its dtype is refused later
_INTEGERS = {1: "int8", 2: "int16", 4: "int32", 8: "int64"}
_MAX_DEPTH = 16  # of nested groups; a backbone has 5

Row = tuple[str, int, str, list[int], bool]


class Refused(Exception):
    """A reason of this file's own, complete but for the file's name."""


def prepare() -> None:
    """Imports what takes memory and time of its own. Raises ImportError without h5py."""
    import h5py  # noqa: F401


def entries(path: str, most: int, longest: int) -> list[Row]:
    """(name, offset, dtype, shape, whether by columns) of each variable, in the file's order.

    most, longest: how many variables there may be, and characters in a name.
    Raises `Refused`, and whatever h5py raises.
    """
    import h5py

    rows: list[Row] = []
    with h5py.File(path, "r", locking=False) as file:
        for row in _walk(h5py, file, "", {h5py.h5o.get_info(file.id).addr}, 0, longest):
            rows.append(row)
            if len(rows) > most:
                raise Refused(f"holds more than {most} variables")
    return rows


def _walk(h5py: Any, group: Any, prefix: str, seen: set[int], depth: int, longest: int) -> Iterator[Row]:
    if depth > _MAX_DEPTH:
        raise Refused(f"group {prefix!r} lies more than {_MAX_DEPTH} groups deep")
    for key in group:
        name = f"{prefix}{key}"
        if len(name) > longest:
            raise Refused(f"tensor {name[:60]!r}... has a name of {len(name)} characters; at most {longest} are read")
        link = group.get(key, getlink=True)
        if not isinstance(link, h5py.HardLink):
            raise Refused(f"tensor {name!r} is an HDF5 {type(link).__name__}; links are not followed")
        child = group[key]
        address = h5py.h5o.get_info(child.id).addr
        if address in seen:
            raise Refused(f"tensor {name!r} is an object that the file also holds under another name")
        seen.add(address)
        if isinstance(child, h5py.Group):
            yield from _walk(h5py, child, f"{name}/", seen, depth + 1, longest)
        elif isinstance(child, h5py.Dataset):
            yield _row(h5py, child, name)
        else:
            raise Refused(f"tensor {name!r} is an HDF5 {type(child).__name__}, neither group nor dataset")


def _row(h5py: Any, dataset: Any, name: str) -> Row:
    where = f"tensor {name!r}"
    layout = dataset.id.get_create_plist()
    if dataset.shape is None or layout.get_layout() != h5py.h5d.CONTIGUOUS or layout.get_external_count():
        raise Refused(
            f"{where} is not one plain block of this file (chunked, compressed, virtual or external); save it again"
        )
    dtype = _DTYPES.get(dataset.dtype.str)
    if dataset.dtype.str == "|V2":
        dtype = "bfloat16" if dataset.attrs.get("dtype") in ("bfloat16", b"bfloat16") else None
    elif dataset.dtype.kind in "iub" and dataset.dtype.byteorder != ">":
        dtype = _INTEGERS[dataset.dtype.itemsize]
    if dtype is None:
        raise Refused(
            f"{where} has dtype {dataset.dtype.str}; pyfused reads {', '.join(_DTYPES)}, and |V2 marked bfloat16"
        )
    offset, shape = dataset.id.get_offset(), [int(size) for size in dataset.shape]
    if offset is None or dataset.id.get_storage_size() != dataset.dtype.itemsize * dataset.size:
        if dataset.size:
            raise Refused(f"{where} of shape {tuple(shape)} was never written")
        offset = 0
    return name, int(offset), dtype, shape, False
