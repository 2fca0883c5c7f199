"""Which tiles, warps and pipeline stages does a Triton kernel use on this chip? Rows of evidence, none of them code.

A file of evidence.py has them beside its lines:

    {"kind": "triton_sm_90", "why": ["..."], "lines": [], "tiles": [
      {"kernel": "attention_forward", "dtype": "half", "case": "relative 0", "up_to": 64,
       "tile": {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}, "date": "2026-11-26"}, ...]}

`dtype` is a name, or "half" for both of 16 bits, or "any". `case` is what else the kernel does; a launcher names its case and
then more general ones, and the first that has a row is taken: a general row may spill in a special case. `up_to` is the largest
size that a row serves: head size, row length or rows, as KERNELS says; without it the row serves all. A row without a date is
not measured. Files are asked in this order: this machine's own; the shipped one of this very GPU, of its architecture, of all
chips.

PER_PROCESSOR is how many programs a launcher aims at for each multiprocessor, LEAST_KEYS how many keys one of them has at
least; everything else goes to the kernel.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import evidence

# Files that are shipped by architecture. "sm_80" serves every NVIDIA chip without its own that has as much shared memory,
# "sm_86" the others.
ARCHITECTURES = ("sm_90", "sm_80", "sm_86", "gfx942", "interpreter")

_ATTENTION = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
_STREAM = ("BLOCK_N", "BLOCK_K", "num_warps", "num_stages", "PER_PROCESSOR")
_BLOCK = ("BLOCK", "num_warps")
_ROWS = ("ROWS", "num_warps")
_FOURIER = ("ROWS", "COLUMNS", "INNER", "num_warps")

# What a row of each kernel says, all of it.
KERNELS: dict[str, tuple[str, ...]] = {
    "attention_forward": _ATTENTION,  # by head size, as all of attention
    "attention_decode": (*_ATTENTION, "PER_PROCESSOR", "LEAST_KEYS"),
    "attention_grad_query": _ATTENTION,
    "attention_grad_key_value": _ATTENTION,
    "attention_combine": ("num_warps",),
    "row_norm_forward": _ROWS,  # by row length, which ends where rows are run in blocks
    "row_norm_forward_long": _BLOCK,
    "row_norm_backward": (*_ROWS, "PER_PROCESSOR"),
    "row_norm_backward_long": _BLOCK,
    "row_norm_column_sums": (*_ROWS, "BLOCK", "PER_PROCESSOR"),
    "row_norm_reduce": ("PARTS", *_BLOCK),
    "ffn_linear": ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP", "num_warps", "num_stages"),
    "ffn_stream": _STREAM,  # by rows: one, or few
    "ffn_combine": _BLOCK,
    "ffn_activation_backward": _BLOCK,
    "gated_ffn_stream": _STREAM,
    "gated_ffn_combine": _BLOCK,
    "gated_ffn_gate": _BLOCK,
    "gated_ffn_gate_scaled": _BLOCK,  # by row length
    "gated_ffn_unscale": _BLOCK,
    "gated_ffn_gradients": _BLOCK,
    "fourier_mix_features": _FOURIER,
    "fourier_mix_sequence": _FOURIER,
    "relative_bias_forward": ("ROWS", "COLUMNS", "num_warps"),
    "relative_bias_backward": ("ROWS", "COLUMNS", "num_warps"),
}
_OF_THE_LAUNCHER = ("PER_PROCESSOR", "LEAST_KEYS")
_NO_POWERS_OF_TWO = ("num_stages", "GROUP", "PER_PROCESSOR")
_MOST = {"num_warps": 32, "num_stages": 8, "GROUP": 64, "PER_PROCESSOR": 1024}  # a block has 1024 threads
_MOST_ELEMENTS = 1 << 16  # of any side of a tile
_MOST_IN_A_TILE = 1 << 20  # what Triton takes
_ENDLESS = sys.maxsize


class Row(NamedTuple):
    """A row of a file's `tiles`."""

    kernel: str
    dtype: str
    case: str
    up_to: int
    tile: dict[str, int]
    date: str  # "": not measured
    source: str

    def as_json(self) -> dict[str, Any]:
        """As a file has it."""
        row = {"kernel": self.kernel, "dtype": self.dtype, "case": self.case, "up_to": self.up_to}
        if self.up_to == _ENDLESS:
            del row["up_to"]
        return {**row, "tile": self.tile, **({"date": self.date} if self.date else {})}


class Tile(NamedTuple):
    """What one launch uses."""

    options: dict[str, int]  # keyword arguments of the kernel; not to be changed
    programs: int  # that fill the chip, where the row has PER_PROCESSOR
    least_keys: int  # LEAST_KEYS, where the row has it
    row: Row


class Asked(NamedTuple):
    """One question to find(), as recorded() collects them."""

    kernel: str
    where: torch.device | str
    dtype: torch.dtype | None
    size: int
    cases: tuple[str, ...]
    tile: Tile


_trial: dict[str, dict[str, int]] = {}
_asked: list[Asked] | None = None


@evidence.remembered
def find(
    kernel: str,
    where: torch.device | str,
    dtype: torch.dtype | None = None,
    size: int = 0,
    cases: tuple[str, ...] = ("",),
) -> Tile | None:
    """The tile of one launch, or None where no row goes up to this size.

    Args:
        kernel: a name in KERNELS.
        where: the tensors' device; or a name in ARCHITECTURES, of which the shipped rows are asked alone.
        dtype: the tensors', where the kernel has rows by dtype.
        cases: what the kernel does, then more general names of it; "" is the most general.
    """
    name = None if dtype is None else evidence.name_of(dtype)
    dtypes = ("any",) if name is None else (name, "any") if name == "float32" else (name, "half", "any")

    def order(place_and_row: tuple[int, Row]) -> tuple[int, ...]:
        place, row = place_and_row
        return cases.index(row.case), row.up_to, place, dtypes.index(row.dtype)

    fitting = [
        (place, row)
        for place, row in _rows(where).get(kernel, ())
        if row.case in cases and row.dtype in dtypes and size <= row.up_to
    ]
    if not fitting:
        return None
    _, row = min(fitting, key=order)
    numbers = {**row.tile, **_trial.get(kernel, {})}
    options = {key: value for key, value in numbers.items() if key not in _OF_THE_LAUNCHER}
    programs = numbers.get("PER_PROCESSOR", 0) * multiprocessors(where)
    tile = Tile(options, programs, numbers.get("LEAST_KEYS", 0), row)
    if _asked is not None:
        _asked.append(Asked(kernel, where, dtype, size, cases, tile))
    return tile


@contextlib.contextmanager
def recorded() -> Iterator[list[Asked]]:
    """Inside the block every question to find() that was not asked there before is put on the list."""
    global _asked
    found: list[Asked] = []
    _asked = found
    find.cache_clear()
    try:
        yield found
    finally:
        _asked = None


@contextlib.contextmanager
def trying(kernel: str, tile: dict[str, int]) -> Iterator[None]:
    """Inside the block a kernel gets this tile in place of its rows'; for `pyfused tune`, not thread-safe."""
    before = _trial.get(kernel)
    _trial[kernel] = tile
    find.cache_clear()
    try:
        yield
    finally:
        if before is None:
            del _trial[kernel]
        else:
            _trial[kernel] = before
        find.cache_clear()


# ---- the chip ---------------------------------------------------------------------------------------------------------


def architecture(device: torch.device) -> str:
    """Which of ARCHITECTURES serves a device."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    if torch.cuda.get_device_properties(device).major == 9:
        return "sm_90"
    return "sm_80" if shared_memory(device) >= 163 * 1024 else "sm_86"


def multiprocessors(where: torch.device | str) -> int:
    """The device's; 1 where there is none: what an architecture's rows say for each multiprocessor."""
    if isinstance(where, str) or where.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(where).multi_processor_count


def shared_memory(where: torch.device | str) -> int:
    """Bytes that one block may ask for; without a device no bound."""
    if isinstance(where, str) or where.type != "cuda":
        return _ENDLESS
    properties: Any = torch.cuda.get_device_properties(where)
    return getattr(properties, "shared_memory_per_block_optin", 0) or properties.shared_memory_per_block


# ---- rows -------------------------------------------------------------------------------------------------------------


def files(where: torch.device | str) -> list[tuple[Path, str]]:
    """The files that are asked for a tile, first to last, and the kind that each must be about."""
    found: list[tuple[Path, str]] = []
    if isinstance(where, str):
        chip = where
    else:
        device = str(where) if where.type == "cuda" else "interpreter"
        chip = architecture(where)
        found = [(path, evidence.kind(device)) for path in evidence.files(device)]
    names = (f"triton_{chip}", "triton")
    return list(dict.fromkeys([*found, *((evidence.SHIPPED / f"{name}.json", name) for name in names)]))


def rows(where: torch.device | str) -> list[Row]:
    """Every row in force, those of the file that is asked first before the others."""
    placed = [of for by_kernel in _rows(where).values() for of in by_kernel]
    return [row for _, row in sorted(placed, key=lambda of: of[0])]


@evidence.remembered
def _rows(where: torch.device | str) -> dict[str, list[tuple[int, Row]]]:
    """By kernel, every row with the place of its file."""
    table: dict[str, list[tuple[int, Row]]] = {}
    limit = shared_memory(where)
    for place, (path, kind) in enumerate(files(where)):
        for row in evidence.read(path, kind, "tiles", lambda row, file: row_from(row, file, limit)):
            table.setdefault(row.kernel, []).append((place, row))
    return table


def row_from(row: dict[str, Any], file: str, shared: int = _ENDLESS) -> Row:
    """A row of a file's `tiles`, checked for a chip with so many bytes of shared memory.

    Raises:
        KeyError, TypeError, ValueError: it is not as the head of this file says, or cannot fit.
    """
    kernel, dtype, up_to = row["kernel"], row["dtype"], row.get("up_to", _ENDLESS)
    if dtype not in ("float32", "float16", "bfloat16", "half", "any"):
        raise ValueError(f"{kernel}: dtype is {dtype!r}")
    if type(up_to) is not int or up_to < 1:
        raise ValueError(f"{kernel}: up_to is {up_to!r}; it takes a positive number")
    tile = dict(row["tile"])
    check(kernel, tile)
    found = Row(kernel, dtype, str(row.get("case", "")), up_to, tile, str(row.get("date", "")), file)
    if (least := least_shared(found)) > shared:
        raise ValueError(f"{kernel}: {tile} takes at least {least} bytes of shared memory; this chip has {shared}")
    return found


def check(kernel: str, tile: dict[str, int]) -> None:
    """
    Raises:
        ValueError: no kernel takes such a tile, on any chip.
    """
    if set(tile) != set(KERNELS.get(kernel, ())):
        raise ValueError(f"{kernel}: a tile of {sorted(tile)}; it takes {sorted(KERNELS.get(kernel, ()))}")
    elements = 1
    for name, value in tile.items():
        if type(value) is not int or not 1 <= value <= _MOST.get(name, _MOST_ELEMENTS):
            raise ValueError(f"{kernel}: {name} is {value!r}; it takes 1 to {_MOST.get(name, _MOST_ELEMENTS)}")
        if name not in _NO_POWERS_OF_TWO and value & (value - 1):
            raise ValueError(f"{kernel}: {name} is {value}; it takes powers of two")
        if name not in _MOST and name not in _OF_THE_LAUNCHER:
            elements *= value
    if elements > _MOST_IN_A_TILE:
        raise ValueError(f"{kernel}: {tile} is more than {_MOST_IN_A_TILE} elements")
    if kernel == "attention_decode" and tile["BLOCK_M"] < 16:
        raise ValueError(f"{kernel}: BLOCK_M is {tile['BLOCK_M']}; 16 queries share a tile")


def least_shared(row: Row) -> int:
    """Bytes of shared memory that a 16-bit product takes at least: its operands' tiles, of all stages but the one at work.
    0 where nothing is known: the compiler decides, and what tune() wrote has run."""
    tile, flight = row.tile, row.tile.get("num_stages", 1) - 1
    if row.dtype not in ("half", "float16", "bfloat16"):
        return 0
    if row.kernel in ("attention_forward", "attention_decode") and row.up_to <= 256:
        return flight * 2 * tile["BLOCK_N"] * row.up_to * 2  # keys and values
    if row.kernel == "ffn_linear":
        return flight * (tile["BLOCK_M"] + tile["BLOCK_N"]) * tile["BLOCK_K"] * 2
    return 0
