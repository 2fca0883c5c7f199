"""Which backend is fastest for a call on this kind of machine? `pyfused tune` measures it, and dispatch and kernels ask here.

storage.py says what a file of measurements holds, machine.py what a kind of machine is, shapes.py which calls are alike.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch

from .. import extensions
from ..setting import set_to
from .cache import forget, remembered
from .machine import kind, multiplies_itself, name_of
from .shapes import MOST_ROWS_BY_COLUMNS, SHAPES, gradient_shapes, product_shapes, shapes_of
from .storage import BY_PRODUCT, OF_CPU, SHIPPED, Line, files, line_from, lines, own_file, read, render, write

__all__ = [
    "MOST_ROWS_BY_COLUMNS",
    "OPERATORS",
    "SHIPPED",
    "asked_for",
    "dot_products",
    "files",
    "forget",
    "found",
    "gradient_shapes",
    "kind",
    "line_from",
    "lines",
    "multiplies_itself",
    "name_of",
    "nearest_threads",
    "one_way",
    "own_file",
    "product_shapes",
    "rank",
    "ranks",
    "read",
    "remembered",
    "render",
    "shapes_of",
    "slower",
    "slower_call",
    "threads_noticed",
    "unproven",
    "with_threads",
    "write",
]

# The operators with evidence for CPUs.
OPERATORS = ("linear", "ffn", "gated_ffn", "layer_norm", "rms_norm", "fourier_mix")

# Settings of the `with` blocks below.
_by_library: ContextVar[bool | None] = ContextVar("pyfused_by_library", default=None)
_assumed_threads: ContextVar[int | None] = ContextVar("pyfused_assumed_threads", default=None)
_thread_counts: ContextVar[set[int] | None] = ContextVar("pyfused_thread_counts", default=None)


def one_way(library: bool) -> AbstractContextManager[None]:
    """Inside the block every launch uses the library (True) or the kernel (False), whatever was measured. A forced backend
    needs that, and `pyfused tune` compares the two."""
    return set_to(_by_library, library)


def with_threads(count: int) -> AbstractContextManager[None]:
    """Inside the block evidence is looked up as if torch used `count` threads."""
    return set_to(_assumed_threads, count)


@contextmanager
def threads_noticed() -> Iterator[set[int]]:
    """Inside the block slower() adds the measured numbers of threads to the set, if its answer depends on that number."""
    counts: set[int] = set()
    with set_to(_thread_counts, counts):
        yield counts


# ---- the line for a call ----------------------------------------------------------------------------------------------


@remembered
def _by_class(device: str) -> dict[tuple[str, str, str, str], dict[int, Line]]:
    """The lines in force, by (operator, function, dtype, class of shapes) and then by the number of threads."""
    table: dict[tuple[str, str, str, str], dict[int, Line]] = {}
    for line in lines(device):
        table.setdefault(line[:4], {})[line.threads] = line
    return table


def _line_for(device: str, operator: str, function: str, dtype: torch.dtype, shapes: str) -> Line | None:
    """The line for a class of shapes, measured with as many threads as torch uses now, or the nearest number."""
    by_threads = _of_class(device, operator, function, name_of(dtype), shapes)
    if by_threads is None:
        return None
    return by_threads[nearest_threads(by_threads)]


def _of_class(device: str, operator: str, function: str, dtype: str, shapes: str) -> dict[int, Line] | None:
    """The lines of a class of shapes, by number of threads."""
    found = _by_class(device).get((operator, function, dtype, shapes))
    if found is None and shapes.startswith("huge"):
        found = _by_class(device).get((operator, function, dtype, shapes.replace("huge", "large")))
    return found


def nearest_threads(measured: Iterable[int]) -> int:
    """The measured number of threads that is nearest to the one torch uses now."""
    now = _assumed_threads.get() or torch.get_num_threads()
    return min(measured, key=lambda threads: abs(math.log2(max(threads, 1) / now)))


def asked_for() -> bool | None:
    """What one_way() asks for; None outside its blocks."""
    return _by_library.get()


# ---- the library or the kernel, on a CPU ------------------------------------------------------------------------------

_UNMEASURED_HERE = "not yet measured on this processor; `pyfused tune` does it"


def slower(
    backend: str,
    operator: str,
    function: str,
    device: str,
    dtype: torch.dtype,
    shapes: str,
    size: int,
    unmeasured: bool = True,
) -> str | None:
    """Why the library should run this call instead of the backend, with the line that says so. None if the backend should.
    unmeasured: whether the backend runs where there is no such line."""
    by_library = _by_library.get()
    if by_library is None and os.environ.get("PYFUSED_BACKEND") == backend:
        by_library = False
    if by_library is not None:
        return "asked for" if by_library else None
    line, speeds = _decides(
        operator, function, device, dtype, shapes, size, lambda speeds: _is_slower(backend, _usual(speeds))
    )
    if line is None and not unmeasured:
        return _UNMEASURED_HERE
    if line is None or not _is_slower(backend, speeds := _usual(speeds)):
        return None
    best = max(speeds, key=speeds.__getitem__)
    other = "plain PyTorch" if best == "reference" else best
    if not speeds[backend]:
        return f"its output was wrong ({line.describe(size)})"
    return f"{other} is {speeds[best] / speeds[backend]:.2f} times as fast ({line.describe(size)})"


def _decides(
    operator: str,
    function: str,
    device: str,
    dtype: torch.dtype,
    shapes: str,
    size: int,
    judge: Callable[[dict[str, float]], bool],
) -> tuple[Line | None, dict[str, float]]:
    """The line for this call and its speeds at this size. If judge(speeds) differs between the measured numbers of threads, the
    set of threads_noticed() gets them."""
    of_shapes = function, name_of(dtype), shapes
    by_threads = _of_class(device, operator, *of_shapes)
    if by_threads is None and operator in BY_PRODUCT:
        by_threads = _of_class(device, "linear", *of_shapes)
    if by_threads is None:
        return None, {}
    counts = _thread_counts.get()
    if counts is not None and len({judge(line.at(size)) for line in by_threads.values()}) > 1:
        counts.update(by_threads)
    line = by_threads[nearest_threads(by_threads)]
    return line, line.at(size)


def _usual(speeds: dict[str, float]) -> dict[str, float]:
    """Without those of instructions for dot products."""
    return {name: speed for name, speed in speeds.items() if name not in extensions.DOT_PRODUCTS}


def _is_slower(backend: str, speeds: dict[str, float]) -> bool:
    return backend in speeds and max(speeds.values()) > speeds[backend]


class Instructions(NamedTuple):
    """Whether a product uses the processor's instructions for dot products: the set's name, and why, or why not."""

    name: str
    used: bool
    reason: str


def dot_products(operator: str, function: str, dtype: torch.dtype, shapes: str, size: int) -> Instructions | None:
    """About a product on the CPU that extensions.dot_products() has. None if there is no such set.

    The set is used if it is forced, or if it was measured on this kind of processor to be right, and faster than the usual
    kernels and than the library. Inside one_way(library=True) it is not used; inside one_way(library=False) the library does
    not count.
    """
    name, by_library = extensions.dot_products(), _by_library.get()
    if name is None:
        return None
    if by_library:
        return Instructions(name, False, "plain PyTorch's library is asked for")
    if extensions.isa() == name:
        return Instructions(name, True, "forced, unproven" if name in extensions.UNPROVEN else "forced")

    def fastest(speeds: dict[str, float]) -> bool:
        others = {other: s for other, s in _usual(speeds).items() if by_library is None or other != "reference"}
        return bool(speeds.get(name)) and speeds[name] > max(others.values(), default=0.0)

    line, speeds = _decides(operator, function, "cpu", dtype, shapes, size, fastest)
    if line is None or name not in speeds:
        return Instructions(name, False, _UNMEASURED_HERE)
    return Instructions(
        name, fastest(speeds), f"{speeds[name]:.2f} times the speed of plain PyTorch ({line.describe(size)})"
    )


def slower_call(backend: str, operator: str, args: tuple[Any, ...]) -> str | None:
    """slower() for the arguments of a forward on the CPU."""
    shapes, size = shapes_of(operator, "forward", args)
    return slower(backend, operator, "forward", "cpu", args[0].dtype, shapes, size)


# ---- the order of backends, on a GPU ----------------------------------------------------------------------------------

# Without measurements Triton is the default. The others have no rank: they come after every backend with one.
_UNMEASURED = {"triton": 1.0 + 1e-9, "reference": 1.0}


def ranks(operator: str, function: str, device: str) -> bool:
    """Whether rank() may change the order. Lines about CPU kernels never do: these choose the library themselves."""
    return any(
        line[:2] == (operator, function) and line.speed.keys() - OF_CPU - {"reference"} for line in lines(device)
    )


@remembered
def rank(device: str, operator: str, function: str, dtype: torch.dtype, shapes: str, size: int) -> dict[str, float]:
    """Each backend's speed for a call. Dispatch tries the largest first."""
    line = _line_for(device, operator, function, dtype, shapes)
    return _UNMEASURED if line is None else {**_UNMEASURED, **line.at(size)}


def unproven(backend: str, operator: str, function: str, device: str) -> Callable[..., str | None] | None:
    """For a CUDA kernel, ours or cuDNN's, and one for Hopper by hand: a function of a call's arguments that returns why it must
    not run, or None if evidence shows it right. For other backends: None."""
    if backend not in ("cuda", "cudnn", "gluon"):
        return None

    def reason(*args: Any) -> str | None:
        if ranks(operator, function, device):
            shapes, size = shapes_of(operator, function, args)
            if rank(device, operator, function, args[0].dtype, shapes, size).get(backend):
                return None
        return f"unproven on this device: no evidence shows it right and faster ({kind(device)})"

    return reason


# ---- what explain() prints --------------------------------------------------------------------------------------------


def found(backend: str, operator: str, function: str, args: tuple[Any, ...]) -> str:
    """A sentence about the backend's measured speed for such a call; "" if nothing was measured."""
    if (operator, function) not in SHAPES:
        return ""
    shapes, size = shapes_of(operator, function, args)
    line = _line_for(args[0].device.type, operator, function, args[0].dtype, shapes)
    if line is None:
        return ""
    if backend == "reference" and backend not in line.speed:
        best = max(line.at(size).values())
        return "" if best > 1 or "cpu" in line.speed else f"faster than the others ({line.describe(size)})"
    speed = line.at(size).get(backend)
    if speed is None:
        return ""
    said = f"{speed:.2f} times the speed of plain PyTorch" if speed else "its output was wrong"
    return f"{said} ({line.describe(size)})"
