"""Where in a file of torch.save is each tensor? The part that Python's unpickler reads.

A pickle is a program. This one may call only what stands in `_NAMES`, which builds a dictionary of tensors and nothing else, as
in torch.load(weights_only=True); the numbers themselves stay in the file. torch.load is not used: it holds all
weights in memory when the file has the form before PyTorch 1.6, which many published ones have. This file runs in a
child process, because a pickle can also ask for any amount of memory, and imports nothing of pyfused.
Format: https://docs.pytorch.org/docs/stable/notes/serialization.html
"""

from __future__ import annotations

import math
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from typing import Any, BinaryIO, NamedTuple

_MAGIC = 0x1950A86A20F9469CFC6C  # begins the form before PyTorch 1.6
_DTYPES = {
    "Float": ("float32", 4), "Half": ("float16", 2), "BFloat16": ("bfloat16", 2), "Double": ("float64", 8),
    "Long": ("int64", 8), "Int": ("int32", 4), "Short": ("int16", 2), "Char": ("int8", 1), "Byte": ("uint8", 1),
    "Bool": ("bool", 1),
}  # fmt: skip

Row = tuple[str, int, str, list[int], bool]
_Places = dict[str, tuple[int, int]]  # a storage's key -> its first byte in the file, and its bytes


class Refused(Exception):
    """A reason of this file's own, complete but for the file's name."""


class Untrusted(Exception):
    """The same for a pickle that wants to call something else."""


class _Dtype(NamedTuple):
    name: str
    size: int


class _Storage(NamedTuple):
    key: str
    dtype: _Dtype


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    """Stands for torch._utils._rebuild_tensor_v2, and for the one before it."""
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, _Storage) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
        raise Refused("holds a tensor that is not made of a storage and sizes")
    if len(shape) > 8 or len(shape) != len(strides):
        raise Refused(f"holds a tensor with {len(shape)} sizes and {len(strides)} strides")
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _parameter(data: Any, *_: Any) -> Any:
    """Stands for torch._utils._rebuild_parameter."""
    return data


_NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
} | {("torch", f"{name}Storage"): _Dtype(*fields) for name, fields in _DTYPES.items()}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise Untrusted(f"needs {module}.{name}, which is more than a dictionary of tensors, so it is not read")
        return _NAMES[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        if (
            not isinstance(pid, tuple)
            or len(pid) not in (5, 6)
            or pid[0] != "storage"
            or not isinstance(pid[1], _Dtype)
        ):
            raise Refused(f"refers to {str(pid)[:80]}, which is no storage")
        if len(pid) == 6 and pid[5] is not None:
            raise Refused("holds views of storages, as PyTorch before 0.4 wrote them; load and save it again")
        return _Storage(str(pid[2]), pid[1])


def prepare() -> None:
    """Nothing has to be imported."""


def entries(path: str, most: int, longest: int) -> list[Row]:
    """(name, offset, dtype, shape, whether by columns) of each tensor, in the file's order.

    most, longest: how many tensors there may be, and characters in a name.
    Raises `Refused`, `Untrusted`, and whatever pickle, zipfile and struct raise.
    """
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
        if is_zip and not zipfile.is_zipfile(file):
            raise Refused("is a zip archive without its end: it is truncated; download it again")
        content, places = _read_zip(file) if is_zip else _read_legacy(file)
    if not isinstance(content, dict):
        raise Refused(f"holds content of type {type(content).__name__}, not a dictionary of tensors")
    if len(content) > most:
        raise Refused(f"holds {len(content)} tensors; at most {most} are read")
    rows = []
    for name, tensor in content.items():
        if not isinstance(name, str) or len(name) > longest:
            raise Refused(f"holds a tensor with the name {str(name)[:60]!r}; names have at most {longest} characters")
        if not isinstance(tensor, _Tensor):
            kind = type(tensor).__name__
            nested = isinstance(tensor, dict) and any(isinstance(value, _Tensor) for value in tensor.values())
            how = f'; its weights are inside: save only those, torch.save(content["{name}"], ...)' if nested else ""
            raise Refused(f"holds {name!r}, which is of type {kind} and not a tensor{how}")
        rows.append(_row(name, tensor, places))
    return rows


def _row(name: str, tensor: _Tensor, places: _Places) -> Row:
    (key, dtype), offset, shape, strides = tensor
    begin, held = places.get(key, (0, -1))
    if (offset + math.prod(shape)) * dtype.size > held:
        raise Refused(f"tensor {name!r} of shape {shape} is not inside the storage {key[:60]!r} of {held} bytes")
    sides = [(size, stride) for size, stride in zip(shape, strides) if size != 1]
    by_columns = False
    if 0 not in shape and not _is_block(sides):
        by_columns = len(shape) == 2 and _is_block(sides[::-1])
        if not by_columns:
            raise Refused(f"tensor {name!r} of shape {shape} has strides {strides}, so it is not one block of the file")
    return name, begin + offset * dtype.size, dtype.name, list(shape), by_columns


def _is_block(sides: list[tuple[int, int]]) -> bool:
    width = 1
    for size, stride in reversed(sides):
        if stride != width:
            return False
        width *= size
    return True


def _read_zip(file: BinaryIO) -> tuple[Any, _Places]:
    """The object of data.pkl, and the place of each storage: data/<key> beside it, stored without compression."""
    with zipfile.ZipFile(file) as archive:
        described = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(described) != 1:
            raise Refused("is a zip archive without exactly one data.pkl, so torch.save did not write its weights")
        root = described[0].removesuffix("data.pkl")
        if (order := _small(archive, f"{root}byteorder")) not in (None, b"little"):
            raise Refused(f"has the byte order {order!r}; pyfused reads little")
        with archive.open(described[0]) as source:
            content = _Unpickler(source).load()
        places = {
            info.filename.removeprefix(f"{root}data/"): (_begin(file, info), info.file_size)
            for info in archive.infolist()
            if info.filename.startswith(f"{root}data/")
        }
    return content, places


def _small(archive: zipfile.ZipFile, name: str) -> bytes | None:
    if name not in archive.namelist():
        return None
    with archive.open(name) as source:
        return source.read(64)


def _begin(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """The first byte of a stored member's content. The local header in front of it has fields of its own lengths."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise Refused(f"holds {info.filename[:60]!r} compressed; torch.save stores it as it is")
    file.seek(info.header_offset)
    signature, name, extra = struct.unpack("<4s22xHH", file.read(30))
    if signature != b"PK\x03\x04":
        raise Refused(f"has no header for {info.filename[:60]!r}; it is damaged")
    return info.header_offset + 30 + int(name) + int(extra)


def _read_legacy(file: BinaryIO) -> tuple[Any, _Places]:
    """The same for the form before PyTorch 1.6: pickles one after another, then each storage behind its number of elements."""
    file.seek(0)
    if _Unpickler(file).load() != _MAGIC:
        raise Refused("is a pickle, but not one of torch.save")
    _Unpickler(file).load()  # the version of the form
    system = _Unpickler(file).load()
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Refused("was written on a machine with another byte order; pyfused reads little-endian numbers")
    sizes: dict[str, int] = {}
    content = _Recording(file, sizes).load()
    keys = _Unpickler(file).load()
    end, places = os.fstat(file.fileno()).st_size, {}  # type: int, _Places
    for key in keys:
        if str(key) not in sizes:
            raise Refused(f"lists the storage {str(key)[:60]!r}, which no tensor uses")
        (count,) = struct.unpack("<q", file.read(8))
        places[str(key)] = file.tell(), count * sizes[str(key)]
        if count < 0 or file.seek(count * sizes[str(key)], os.SEEK_CUR) > end:
            raise Refused(
                f"would hold {count} numbers in the storage {str(key)[:60]!r}: it is truncated; download it again"
            )
    return content, places


class _Recording(_Unpickler):
    """Notes the size of an element of each storage."""

    def __init__(self, file: BinaryIO, sizes: dict[str, int]) -> None:
        super().__init__(file)
        self._sizes = sizes

    def persistent_load(self, pid: Any) -> _Storage:
        storage = super().persistent_load(pid)
        self._sizes[storage.key] = storage.dtype.size
        return storage
