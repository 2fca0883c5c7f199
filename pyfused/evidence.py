"""What was measured on this kind of machine, and which backend follows from it?

Evidence is a JSON file for one kind of device, written by `pyfused tune`; tiles.py says what else is in it:

    {"kind": "cpu_amd_avx2", "lines": [
      {"operator": "linear", "function": "forward", "dtype": "float32", "shapes": "large", "threads": 1,
       "date": "2026-11-26", "torch": "2.13.0", "speed": {"cpu": {"1": 1.6, "16": 1.9, "512": 0.9}}}, ...]}

`speed` is how many times as fast as plain PyTorch a backend was, by size, and 0 where its output was wrong; shapes_of() says
what the class of shapes and the size of a call are. A call takes the nearest size that was measured, on a scale of powers.
Backend `reference` is plain PyTorch, and has a speed of its own where one writes the operator otherwise: attention as SDPA. A
line about a GPU has no `threads`. Three files are asked for a line, in this order: this machine's own, in the user's cache
folder; the one shipped for its kind; the one shipped for a kind like it.
"""

from __future__ import annotations

import functools
import json
import math
import os
import platform
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from . import extensions
from .arguments import AttentionBackward, AttentionForward, taking

SHIPPED = Path(__file__).parent / "evidence"
_T = TypeVar("_T")
_remembered: list[Any] = []


def remembered(function: Callable[..., _T]) -> functools._lru_cache_wrapper[_T]:
    """functools.cache of what follows from the files; forget() clears it."""
    cached = functools.cache(function)
    _remembered.append(cached)
    return cached


_only_way: ContextVar[bool | None] = ContextVar("pyfused_one_way", default=None)  # True: the library's
_threads: ContextVar[int | None] = ContextVar("pyfused_threads", default=None)  # in place of torch's
_noticed: ContextVar[set[int] | None] = ContextVar("pyfused_noticed", default=None)
_MOST = 1 << 62  # of a size, and of threads
_LARGE = 1 << 18  # elements of a weight: 1 MB in float32, what a core's second cache holds


class Line(NamedTuple):
    """What was measured of one function of an operator, for one class of shapes."""

    operator: str
    function: str
    dtype: str
    shapes: str
    threads: int  # 0 on a GPU
    speed: dict[str, dict[int, float]]  # by backend, by size
    source: str

    def at(self, size: int) -> dict[str, float]:
        """Each backend's speed at the nearest size measured; plain PyTorch's is 1."""
        place = math.log2(max(size, 1))
        return {
            "reference": 1.0,
            **{
                name: by_size[min(by_size, key=lambda s: abs(math.log2(s) - place))]
                for name, by_size in self.speed.items()
            },
        }

    def describe(self, size: int) -> str:
        """Where a verdict on a call of this size comes from."""
        threads = {0: "", 1: ", one thread"}.get(self.threads, f", {self.threads} threads")
        return f"{self.source}: {self.dtype}, {self.shapes}, size {size}{threads}"


# ---- which class of shapes a call belongs to --------------------------------------------------------------------------


def product_shapes(rows: int, *weights: torch.Tensor) -> tuple[str, int]:
    """Of x W^T: large or small weights, stored by rows as nn.Linear has them or by columns as Conv1D; the size is x's rows."""
    extent = "large" if min(w.numel() for w in weights) >= _LARGE else "small"
    by_rows = all(w.stride()[1] == 1 for w in weights)
    return extent if by_rows else f"{extent}, by columns", rows


def _linear(x, weight, bias, residual):
    return product_shapes(x.shape[:-1].numel(), weight)


def _ffn(x, w_in, b_in, w_out, *_):
    return product_shapes(x.shape[:-1].numel(), w_in, w_out)


def _gated_ffn(x, *weights_and_more):
    return product_shapes(x.shape[:-1].numel(), *weights_and_more[:3])


def _layer_norm(x, weight, bias, eps, residual, save):
    return "plain" if residual is None else "residual", x.numel()


def _rms_norm(x, weight, eps, residual, save):
    return "plain" if residual is None else "residual", x.numel()


def _fourier_mix(x):
    b, s, n = x.shape
    return "long" if max(s, n) >= 1024 else "short", b * min(s, n)


def _attention(a):
    """Few or many queries of the heads that share a key head, the head size, and the bias; the size is how many scores there
    are."""
    b, h, sq, d = a.query.shape
    hkv, sk = a.key.shape[1:3]
    if a.cu_seqlens is not None:
        kind = "packed"
    else:
        kind = "few queries" if h // max(hkv, 1) * sq <= 16 else "many queries"
    bias = "" if a.bias_table is None else ", relative bias"
    bias += "" if a.attn_bias is None else ", dense bias"
    return f"{kind}, D {64 if d <= 64 else 128 if d <= 128 else 256}{bias}", b * h * sq * sk


def _norm_backward(grad_y, grad_total, x, *saved):
    return "plain" if grad_total is None else "residual", x.numel()


def _ffn_backward(grad_y, x, w_in, w_out, *_):
    return product_shapes(x.shape[:-1].numel(), w_in, w_out)


def _gated_ffn_backward(grad_y, x, *weights_and_more):
    return product_shapes(x.shape[:-1].numel(), *weights_and_more[:3])


def _relative_bias(table, query_length, key_length, *_):
    return "plain", table.shape[1] * query_length * key_length


def _relative_bias_backward(grad_out, *_):
    return "plain", grad_out.numel()


_SHAPES: dict[tuple[str, str], Callable[..., tuple[str, int]]] = {
    ("linear", "forward"): _linear,
    ("ffn", "forward"): _ffn,
    ("ffn", "backward"): _ffn_backward,
    ("gated_ffn", "forward"): _gated_ffn,
    ("gated_ffn", "backward"): _gated_ffn_backward,
    ("layer_norm", "forward"): _layer_norm,
    ("layer_norm", "backward"): _norm_backward,
    ("rms_norm", "forward"): _rms_norm,
    ("rms_norm", "backward"): _norm_backward,
    ("fourier_mix", "forward"): _fourier_mix,
    ("attention", "forward"): taking(AttentionForward)(_attention),
    ("attention", "backward"): taking(AttentionBackward)(_attention),
    ("relative_bias", "forward"): _relative_bias,
    ("relative_bias", "backward"): _relative_bias_backward,
}


OPERATORS = (
    "linear",
    "layer_norm",
    "rms_norm",
    "fourier_mix",
)  # of which CPU evidence is kept; ffn's products are linear's


def shapes_of(operator: str, function: str, args: tuple[Any, ...]) -> tuple[str, int]:
    """The class of shapes of a call, and its size within the class.

    Raises:
        KeyError: nothing is measured of this function.
    """
    return _SHAPES[operator, function](*args)


# ---- which lines are in force -----------------------------------------------------------------------------------------


@remembered
def kind(device: str = "cpu") -> str:
    """What evidence is kept by: of a CPU the vendor, the instruction set of our kernels, and where torch uses another or
    multiplies half precision itself, that; of a GPU its name; of "interpreter", Triton's on a CPU, "triton_interpreter"."""
    if device == "interpreter":
        return "triton_interpreter"
    if device != "cpu":
        name = torch.cuda.get_device_name(device).lower()
        return f"{device.partition(':')[0]}_{re.sub('[^a-z0-9]+', '_', name)}"
    used = extensions.isa() or "none"
    torch_uses = torch.backends.cpu.get_cpu_capability().lower()
    parts = ["cpu", _vendor(), used]
    if torch_uses != {"baseline": "default"}.get(used, used):
        parts.append(f"torch_{torch_uses}")
    return "_".join(parts + [name_of(dtype) for dtype in (torch.bfloat16, torch.float16) if multiplies_itself(dtype)])


@functools.cache
def _vendor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        text = ""
    for word, vendor in (("AuthenticAMD", "amd"), ("GenuineIntel", "intel")):
        if word in text:
            return vendor
    return platform.machine().lower() or "unknown"


def multiplies_itself(dtype: torch.dtype) -> bool:
    """Whether this processor has products of a half-precision dtype, which oneDNN then uses in torch."""
    if dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return dtype == torch.float16 and torch.cpu._is_amx_fp16_supported()


def name_of(dtype: torch.dtype) -> str:
    """ "float32" of torch.float32."""
    return str(dtype).removeprefix("torch.")


def own_file(device: str = "cpu") -> Path:
    """Where `pyfused tune` writes what it measured on this machine: in the user's cache folder, or in PYFUSED_EVIDENCE."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("PYFUSED_EVIDENCE") or cache / "pyfused" / "evidence") / f"{kind(device)}.json"


def files(device: str = "cpu") -> list[Path]:
    """The files that are asked for a line, first to last; some may not exist."""
    found = [own_file(device), SHIPPED / f"{kind(device)}.json"]
    if device == "cpu":
        likes = [f"cpu_{name_of(d)}" for d in (torch.bfloat16, torch.float16) if multiplies_itself(d)]
        like = "cpu_amd_baseline_torch_avx2" if extensions.isa() == "baseline" else "cpu_amd_avx2"
        found += [SHIPPED / f"{name}.json" for name in (*likes, like)]
    return list(dict.fromkeys(found))


@remembered
def lines(device: str = "cpu") -> tuple[Line, ...]:
    """The lines in force: of each function, dtype and class of shapes, those of the first file that has any."""
    taken: dict[tuple[str, str, str, str], tuple[Path, list[Line]]] = {}
    for path in files(device):
        for line in read(path, None if path.parent == SHIPPED else kind(device), "lines", line_from):
            first, kept = taken.setdefault(line[:4], (path, []))
            if first == path:
                kept.append(line)
    return tuple(line for _, kept in taken.values() for line in kept)


@contextmanager
def one_way(library: bool) -> Iterator[None]:
    """Inside the block launches are prepared for the library's way, or for the kernel's, whatever was measured: how a forced
    backend runs, and how `pyfused tune` gets both to compare."""
    token = _only_way.set(library)
    try:
        yield
    finally:
        _only_way.reset(token)


@contextmanager
def threads_noticed() -> Iterator[set[int]]:
    """Inside the block a set fills with numbers of threads whenever the answer of slower() depends on that number."""
    found: set[int] = set()
    token = _noticed.set(found)
    try:
        yield found
    finally:
        _noticed.reset(token)


@contextmanager
def with_threads(count: int) -> Iterator[None]:
    """Inside the block lines are looked up as if torch used so many threads."""
    token = _threads.set(count)
    try:
        yield
    finally:
        _threads.reset(token)


def forget() -> None:
    """Reads the files again when they are next asked for."""
    for function in _remembered:
        function.cache_clear()


def read(path: Path, expected: str | None, key: str, parse: Callable[[dict[str, Any], str], _T]) -> list[_T]:
    """parse(row, file name) of each row that a file has under a key; of a damaged or foreign file, a warning that names it,
    and none.

    Args:
        expected: the kind of device that the file must be about; None for any.
    """
    try:
        return [parse(row, path.name) for row in _content(path, expected).get(key, ())]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        warnings.warn(f"evidence file {path}: its {key} are left out: {what}", RuntimeWarning, stacklevel=2)
        return []


@remembered
def _content(path: Path, expected: str | None) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        if expected is not None and content["kind"] != expected:
            raise ValueError(f"it is about {content['kind']!r}, this machine is {expected!r}")
        return dict(content)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        what = f"{type(error).__name__}: {error}"
        warnings.warn(f"evidence file {path} is left out: {what}", RuntimeWarning, stacklevel=2)
    return {}


def line_from(row: dict[str, Any], file: str) -> Line:
    """A row of a file's `lines`, checked.

    Raises:
        KeyError, TypeError, ValueError: it is not as the head of this file says.
    """
    speed = {
        str(name): {int(size): float(value) for size, value in by_size.items()}
        for name, by_size in row["speed"].items()
    }
    operator, function, dtype, shapes = (str(row[key]) for key in Line._fields[:4])
    if (operator, function) not in _SHAPES:
        raise ValueError(f"nothing is measured of {operator}'s {function}")
    if not speed or not speed.keys() <= {"cpu", "triton", "cuda", "reference"}:
        raise ValueError(f"speed of {operator}: of backends {sorted(speed)}")
    for by_size in speed.values():
        if not by_size or not all(0 < s < _MOST and 0 <= v < math.inf for s, v in by_size.items()):
            raise ValueError(f"speed of {operator}: sizes are positive numbers, speeds 0 or more")
    threads = int(row.get("threads", 0))
    if not 0 <= threads < _MOST or ("cpu" in speed and (not threads or len(speed) > 1)):
        raise ValueError(f"speed of {operator}: of {sorted(speed)} with {threads} threads; a CPU's is alone, with 1 or more")
    return Line(operator, function, dtype, shapes, threads, speed, f"{file}, {row['date']}")


# ---- what follows -----------------------------------------------------------------------------------------------------


@remembered
def _by_class(device: str) -> dict[tuple[str, str, str, str], dict[int, Line]]:
    table: dict[tuple[str, str, str, str], dict[int, Line]] = {}
    for line in lines(device):
        table.setdefault(line[:4], {})[line.threads] = line
    return table


def line_of(device: str, operator: str, function: str, dtype: torch.dtype, shapes: str) -> Line | None:
    """The line for a class of shapes, measured with as many threads as torch uses now, or the nearest number."""
    by_threads = _by_class(device).get((operator, function, name_of(dtype), shapes))
    if by_threads is None:
        return None
    return by_threads[nearest_threads(by_threads)]


def nearest_threads(measured: Iterable[int]) -> int:
    """Of the numbers of threads that were measured, the one nearest to what torch uses now."""
    now = _threads.get() or torch.get_num_threads()
    return min(measured, key=lambda threads: abs(math.log2(max(threads, 1) / now)))


def slower(
    backend: str, operator: str, function: str, device: str, dtype: torch.dtype, shapes: str, size: int
) -> str | None:
    """Why the library runs such a call instead of this backend, with the line that says so; None if it is not faster."""
    way = _only_way.get()
    if way is None and os.environ.get("PYFUSED_BACKEND") == backend:
        way = False
    if way is not None:
        return "asked for" if way else None
    by_threads = _by_class(device).get((operator, function, name_of(dtype), shapes))
    if by_threads is None:
        return None
    noticed = _noticed.get()
    if noticed is not None and len({_is_slower(backend, line.at(size)) for line in by_threads.values()}) > 1:
        noticed.update(by_threads)
    line = by_threads[nearest_threads(by_threads)]
    speeds = line.at(size)
    if not _is_slower(backend, speeds):
        return None
    best = max(speeds, key=speeds.__getitem__)
    other = "plain PyTorch" if best == "reference" else best
    if not speeds[backend]:
        return f"its output was wrong ({line.describe(size)})"
    return f"{other} is {speeds[best] / speeds[backend]:.2f} times as fast ({line.describe(size)})"


def _is_slower(backend: str, speeds: dict[str, float]) -> bool:
    return backend in speeds and max(speeds.values()) > speeds[backend]


def slower_call(backend: str, operator: str, args: tuple[Any, ...]) -> str | None:
    """slower() of a forward's arguments on the CPU, whose kernels' launchers have the library's way beside their own."""
    shapes, size = shapes_of(operator, "forward", args)
    return slower(backend, operator, "forward", "cpu", args[0].dtype, shapes, size)


def ranks(operator: str, function: str, device: str) -> bool:
    """Whether rank() has anything to go by: a CPU kernel has the library's way beside its own, and needs no rank."""
    return any(line[:2] == (operator, function) and set(line.speed) - {"cpu", "reference"} for line in lines(device))


# A backend of which nothing was measured: Triton is the default; a hand-written kernel comes after all that is known.
_UNMEASURED = {"triton": 1.0 + 1e-9, "reference": 1.0}


@remembered
def rank(device: str, operator: str, function: str, dtype: torch.dtype, shapes: str, size: int) -> dict[str, float]:
    """What each backend's place in the order goes by, the largest first."""
    line = line_of(device, operator, function, dtype, shapes)
    return _UNMEASURED if line is None else {**_UNMEASURED, **line.at(size)}


def unproven(backend: str, operator: str, function: str, device: str) -> Callable[..., str | None] | None:
    """A function of a call's arguments that says why no evidence lets a hand-written CUDA kernel run it, or None; None for
    other backends."""
    if backend != "cuda":
        return None

    def reason(*args: Any) -> str | None:
        if ranks(operator, function, device):
            shapes, size = shapes_of(operator, function, args)
            if rank(device, operator, function, args[0].dtype, shapes, size).get(backend):
                return None
        return f"unproven on this device: no evidence shows it right and faster ({kind(device)})"

    return reason


def found(backend: str, operator: str, function: str, args: tuple[Any, ...]) -> str:
    """What was measured of this backend for such a call, as explain() prints it; "" if nothing was."""
    if (operator, function) not in _SHAPES:
        return ""
    shapes, size = shapes_of(operator, function, args)
    line = line_of(args[0].device.type, operator, function, args[0].dtype, shapes)
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


# ---- what people see of it --------------------------------------------------------------------------------------------


def write(path: Path, found: dict[str, Any]) -> dict[str, Any]:
    """Writes what a tune() found, and keeps the lines and tiles that are there of what it did not measure. Whole or not at all.

    Returns:
        What the file has now.
    """
    try:
        old = json.loads(path.read_text())
        old = {
            key: [dict(row) for row in old.get(key, ())] for key in ("lines", "tiles") if old["kind"] == found["kind"]
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        old = {}  # nothing there, or nothing that could be read
    whole: dict[str, Any] = {**found}
    for key, names in (("lines", Line._fields[:5]), ("tiles", ("kernel", "dtype", "case", "up_to"))):
        rows: dict[tuple[str, ...], Any] = {}
        for row in (*old.get(key, ()), *found.get(key, ())):
            rows[tuple(str(row.get(name, "")) for name in names)] = row
        whole[key] = [rows[of] for of in sorted(rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    lines, tiles = (",\n  ".join(json.dumps(row) for row in whole[key]) for key in ("lines", "tiles"))
    fresh.write_text(f'{{"kind": {json.dumps(whole["kind"])}, "lines": [\n  {lines}\n], "tiles": [\n  {tiles}\n]}}\n')
    os.replace(fresh, path)
    forget()
    return whole


def render(found: Iterable[Line]) -> str:
    """The lines as the table that `pyfused evidence` prints."""
    rows = ["times as fast as plain PyTorch, by size (below 1 plain PyTorch runs)"]
    for line in found:
        for backend, by_size in line.speed.items():
            speeds = "  ".join(f"{size}: {speed:.2f}" for size, speed in sorted(by_size.items()))
            threads = f"{line.threads} thread{'s' * (line.threads > 1)}" if line.threads else ""
            what = f"{line.operator:<12} {line.function:<8} {line.dtype:<9} {line.shapes:<18} {threads:<9} {backend:<5}"
            rows.append(f"{what} {speeds}  [{line.source}]")
    return "\n".join(rows)
