"""Which tiles, warps and pipeline stages does a Triton kernel use on this chip? The evidence files say, not the code.

An evidence file has rows of `tiles` beside its `lines` (evidence/storage.py):

    {"kind": "triton_sm_90", "why": ["..."], "lines": [], "tiles": [
      {"kernel": "attention_forward", "dtype": "half", "case": "relative 0", "up_to": 64,
       "tile": {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}, "date": "2026-11-26"}, ...]}

`dtype` is a name, "half" for both 16-bit dtypes, or "any". `case` is a variant of the kernel, such as attention with T5's bias.
A launcher asks for its own case first and then for more general ones, whose tiles may spill registers in a special case.
`up_to` is the largest size that a row serves: a head size, a row length or a number of rows (see KERNELS). A row without
`up_to` serves every size. A row without a date was not measured.

Files are read in this order: this machine's own, then the shipped ones for this GPU, its architecture, and all chips.

Three numbers are for the launcher: PER_PROCESSOR is how many programs it starts per multiprocessor, LEAST_KEYS the fewest keys
that a program gets, LEAST_K the fewest terms of a sum that is split. All others are arguments of the kernel.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import evidence
from .notices import once

# Each has a shipped file. An NVIDIA chip without a file of its own uses "sm_80" if it has as much shared memory as an A100, and
# "sm_86" otherwise.
ARCHITECTURES = ("sm_90", "sm_80", "sm_86", "gfx942", "interpreter")

_ATTENTION = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
_STREAM = ("BLOCK_N", "BLOCK_K", "num_warps", "num_stages", "PER_PROCESSOR", "LEAST_K")
_PRODUCT = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP", "num_warps", "num_stages")
_BLOCK = ("BLOCK", "num_warps")
_WHOLE_ROWS = ("ROWS", "BLOCK", "num_warps")
_FOURIER = ("ROWS", "COLUMNS", "INNER", "num_warps")

# The numbers that a row of each kernel must have. The comments say what `up_to` is.
KERNELS: dict[str, tuple[str, ...]] = {
    "attention_forward": _ATTENTION,  # head size, as in all attention kernels
    "attention_few": (*_ATTENTION, "PER_PROCESSOR", "LEAST_KEYS"),  # the forward of fewer blocks than multiprocessors
    "attention_decode": (*_ATTENTION, "PER_PROCESSOR", "LEAST_KEYS"),
    "attention_grad_query": _ATTENTION,
    "attention_grad_key_value": _ATTENTION,
    "attention_combine": ("num_warps",),
    "attention_spread": _BLOCK,
    "row_norm_forward": _WHOLE_ROWS,  # row length; longer rows use row_norm_forward_long, which reads them again
    "row_norm_forward_long": _BLOCK,
    "row_norm_backward": ("ROWS", "num_warps", "num_stages", "PER_PROCESSOR"),
    "row_norm_backward_long": _BLOCK,
    "row_norm_column_sums": (*_WHOLE_ROWS, "PER_PROCESSOR"),
    "row_norm_reduce": ("PARTS", *_BLOCK),
    # The products of _product.py; with int8 weights their case is "int8", with rows of x in int8 too "integers".
    "ffn_linear": _PRODUCT,
    "ffn_stream": _STREAM,  # rows: one, or few
    "ffn_combine": _BLOCK,
    "ffn_activation_backward": _BLOCK,
    "linear_rows": _BLOCK,
    "gated_ffn_stream": _STREAM,
    "gated_ffn_product": (*_PRODUCT, "PER_PROCESSOR"),  # terms of a sum; longer sums are the library's
    "gated_ffn_combine": _BLOCK,
    "gated_ffn_gate": _BLOCK,
    "gated_ffn_gate_scaled": _BLOCK,  # row length
    "gated_ffn_unscale": _BLOCK,
    "gated_ffn_gradients": _BLOCK,
    "fourier_mix_features": _FOURIER,
    "fourier_mix_sequence": _FOURIER,
    "relative_bias_forward": ("ROWS", "COLUMNS", "num_warps"),
    "relative_bias_backward": ("ROWS", "COLUMNS", "num_warps"),
}
# If no row serves a call, these do not run: the library multiplies, and few blocks have attention_forward's tile.
OPTIONAL = ("gated_ffn_product", "attention_few")
_LAUNCHER_NUMBERS = ("PER_PROCESSOR", "LEAST_KEYS", "LEAST_K")
_ANY_NUMBER = ("num_stages", "GROUP", "PER_PROCESSOR")
_LIMITS = {"num_warps": 32, "num_stages": 8, "GROUP": 64, "PER_PROCESSOR": 1024}  # a block has at most 32 warps
_LARGEST_SIDE = 1 << 16
_LARGEST_TILE = 1 << 20  # elements: Triton's own limit
_NO_LIMIT = sys.maxsize


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
        """The row in a file's format."""
        row = {"kernel": self.kernel, "dtype": self.dtype, "case": self.case, "up_to": self.up_to}
        if self.up_to == _NO_LIMIT:
            del row["up_to"]
        return {**row, "tile": self.tile, **({"date": self.date} if self.date else {})}


class Tile(NamedTuple):
    """The numbers for one launch."""

    options: dict[str, int]  # keyword arguments of the kernel; read only, find() caches them
    programs: int  # PER_PROCESSOR x multiprocessors, or 0
    least_keys: int  # LEAST_KEYS, or 0
    least_k: int  # LEAST_K, or 0
    row: Row


class Asked(NamedTuple):
    """A call of find() and its answer, as recorded() collects them."""

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
    """The tile for a launch, or None if no row serves this size.

    Args:
        kernel: a name in KERNELS.
        where: the tensors' device, or a name in ARCHITECTURES, for its shipped rows alone.
        dtype: the tensors' dtype, if the kernel has rows for different dtypes.
        cases: the launch's case, then more general ones; "" is the most general.
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
    if fitting:
        _, row = min(fitting, key=order)
    elif kernel in _trial:
        row = Row(kernel, "any", "", _NO_LIMIT, _trial[kernel], "", "")
    else:
        return None
    numbers = {**row.tile, **_trial.get(kernel, {})}
    options = {key: value for key, value in numbers.items() if key not in _LAUNCHER_NUMBERS}
    programs = numbers.get("PER_PROCESSOR", 0) * multiprocessors(where)
    tile = Tile(options, programs, numbers.get("LEAST_KEYS", 0), numbers.get("LEAST_K", 0), row)
    if _asked is not None:
        _asked.append(Asked(kernel, where, dtype, size, cases, tile))
    return tile


@contextlib.contextmanager
def recorded() -> Iterator[list[Asked]]:
    """Inside the block each new question to find() is added to the list."""
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
    """Inside the block a kernel uses this tile, whatever its rows say. For `pyfused tune`; not thread-safe."""
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
    """The name in ARCHITECTURES whose rows a device uses."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    if torch.cuda.get_device_properties(device).major == 9:
        return "sm_90"
    return "sm_80" if shared_memory(device) >= 163 * 1024 else "sm_86"


def multiprocessors(where: torch.device | str) -> int:
    """The number of the device's multiprocessors; 1 for a CPU or the name of an architecture."""
    if isinstance(where, str) or where.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(where).multi_processor_count


def lanes(where: torch.device | str) -> int:
    """The threads of a warp."""
    return 64 if (where if isinstance(where, str) else architecture(where)) == "gfx942" else 32


def shared_memory(where: torch.device | str) -> int:
    """Bytes that one block may ask for; unlimited for a CPU or the name of an architecture."""
    if isinstance(where, str) or where.type != "cuda":
        return _NO_LIMIT
    properties: Any = torch.cuda.get_device_properties(where)
    return getattr(properties, "shared_memory_per_block_optin", 0) or properties.shared_memory_per_block


# ---- rows -------------------------------------------------------------------------------------------------------------


def files(where: torch.device | str) -> list[tuple[Path, str]]:
    """The files to read, in order, and the kind that each must be about."""
    found: list[tuple[Path, str]] = []
    if isinstance(where, str):
        chip = where
    else:
        device = str(where) if where.type == "cuda" else "interpreter"
        chip = architecture(where)
        found = [(path, path.stem) for path in evidence.files(device)]
    names = (f"triton_{chip}", "triton")
    return list(dict.fromkeys([*found, *((evidence.SHIPPED / f"{name}.json", name) for name in names)]))


def rows(where: torch.device | str) -> list[Row]:
    """Every row in force, in the order of their files."""
    placed = [pair for pairs in _rows(where).values() for pair in pairs]
    return [row for _, row in sorted(placed, key=lambda pair: pair[0])]


@evidence.remembered
def _rows(where: torch.device | str) -> dict[str, list[tuple[int, Row]]]:
    """For each kernel, (place of the file in the order, row)."""
    table: dict[str, list[tuple[int, Row]]] = {}
    limit = shared_memory(where)
    for place, (path, kind) in enumerate(files(where)):
        for row in evidence.read(path, kind, "tiles", lambda row, file: _row_of_ours(row, file, limit)):
            if row is not None:
                table.setdefault(row.kernel, []).append((place, row))
    return table


def _row_of_ours(row: dict[str, Any], file: str, shared: int) -> Row | None:
    """row_from(), and None for a kernel that this release does not have."""
    if isinstance(row["kernel"], str) and row["kernel"] not in KERNELS:
        once(f"evidence file {file}: this pyfused has no kernel {row['kernel']!r}; its tiles are left out")
        return None
    return row_from(row, file, shared)


def row_from(row: dict[str, Any], file: str, shared: int = _NO_LIMIT) -> Row:
    """Checks a row of a file's `tiles`, for a chip with `shared` bytes of shared memory.

    Raises:
        KeyError, TypeError, ValueError: it does not have the format at the top of this module, or does not fit on the chip.
    """
    kernel, dtype, up_to = row["kernel"], row["dtype"], row.get("up_to", _NO_LIMIT)
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
    """Checks a tile against the limits of the kernel that hold on every chip.

    Raises:
        ValueError: the kernel is unknown, or does not take such a tile.
    """
    if set(tile) != set(KERNELS.get(kernel, ())):
        raise ValueError(f"{kernel}: the tile has {sorted(tile)}; it takes {sorted(KERNELS.get(kernel, ()))}")
    elements = 1
    for name, value in tile.items():
        if type(value) is not int or not 1 <= value <= _LIMITS.get(name, _LARGEST_SIDE):
            raise ValueError(f"{kernel}: {name} is {value!r}; it takes 1 to {_LIMITS.get(name, _LARGEST_SIDE)}")
        if name not in _ANY_NUMBER and value & (value - 1):
            raise ValueError(f"{kernel}: {name} is {value}; it takes a power of two")
        if name not in _LIMITS and name not in _LAUNCHER_NUMBERS:
            elements *= value
    if elements > _LARGEST_TILE:
        raise ValueError(f"{kernel}: {tile} has more than {_LARGEST_TILE} elements")
    if kernel == "attention_decode" and tile["BLOCK_M"] < 16:
        raise ValueError(f"{kernel}: BLOCK_M is {tile['BLOCK_M']}; it takes at least 16: 16 queries share a tile")


def least_shared(row: Row) -> int:
    """A lower bound for the bytes of shared memory of a 16-bit product: the tiles of its operands in every stage except the one
    being computed. 0 for other rows: only the compiler knows, and rows written by tune() have run."""
    tile, stages_in_flight = row.tile, row.tile.get("num_stages", 1) - 1
    if row.dtype not in ("half", "float16", "bfloat16"):
        return 0
    if row.kernel in ("attention_forward", "attention_few", "attention_decode") and row.up_to <= 256:
        return stages_in_flight * 2 * tile["BLOCK_N"] * row.up_to * 2  # keys and values
    if row.kernel == "ffn_linear":
        of_x, of_weight = {"int8": (2, 1), "integers": (1, 1)}.get(row.case, (2, 2))
        return stages_in_flight * (tile["BLOCK_M"] * of_x + tile["BLOCK_N"] * of_weight) * tile["BLOCK_K"]
    if row.kernel == "gated_ffn_product":
        return stages_in_flight * (tile["BLOCK_M"] + 2 * tile["BLOCK_N"]) * tile["BLOCK_K"] * 2
    return 0
