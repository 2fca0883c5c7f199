"""What is in an evidence file, and which files are read?

A file is about one kind of machine (machine.py), and `pyfused tune` writes it:

    {"kind": "cpu_amd_avx2", "lines": [
      {"operator": "linear", "function": "forward", "dtype": "float32", "shapes": "large", "threads": 1,
       "date": "2026-11-26", "torch": "2.13.0", "speed": {"cpu": {"1": 1.6, "16": 1.9, "512": 0.9}}}, ...]}

`shapes` is a class of shapes and "1", "16", "512" are sizes within it (shapes.py). `speed` is how many times as fast as plain
PyTorch a backend was at each size; 0 means that its output was wrong. The backend `reference` has a speed of its own where
users of plain PyTorch would call something else, such as SDPA for attention. A line about a GPU has no `threads`. In one about
a CPU a set of extensions.DOT_PRODUCTS, such as "avx512_bf16", stands for the backend `cpu` with the products of that set.
pyfused/tiles.py describes the rows of `tiles`.

Three files are read, in this order: this machine's own, in the user's cache folder; the one shipped for its kind; the one
shipped for a similar kind.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from .. import extensions
from .cache import forget, remembered
from .machine import kind, multiplies_itself, name_of
from .shapes import MANY_BY_COLUMNS, SHAPES

SHIPPED = Path(__file__).parent
OF_CPU = frozenset({"cpu", *extensions.DOT_PRODUCTS})  # what a line about a CPU may hold speeds of
_T = TypeVar("_T")
_MOST = 1 << 62  # bound of a size, and of a number of threads


_HOPPER = "cuda_hopper"  # an H100 and an H200 have the same multiprocessors

# Without lines of their own these go by those of their products.
BY_PRODUCT = ("ffn", "gated_ffn")


class Line(NamedTuple):
    """The measurements of one function of an operator, for one class of shapes."""

    operator: str
    function: str
    dtype: str
    shapes: str
    threads: int  # 0 on a GPU
    speed: dict[str, dict[int, float]]  # by backend, by size
    source: str

    def at(self, size: int) -> dict[str, float]:
        """Each backend's speed at the nearest measured size, on a scale of powers. Plain PyTorch has 1."""
        place = math.log2(max(size, 1))
        return {
            "reference": 1.0,
            **{
                name: by_size[min(by_size, key=lambda s: abs(math.log2(s) - place))]
                for name, by_size in self.speed.items()
            },
        }

    def describe(self, size: int) -> str:
        """The source of a verdict on a call of this size."""
        threads = {0: "", 1: ", one thread"}.get(self.threads, f", {self.threads} threads")
        return f"{self.source}: {self.dtype}, {self.shapes}, size {size}{threads}"


# ---- reading ----------------------------------------------------------------------------------------------------------


def own_file(device: str = "cpu") -> Path:
    """The file that `pyfused tune` writes on this machine, in PYFUSED_EVIDENCE or else in the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("PYFUSED_EVIDENCE") or cache / "pyfused" / "evidence") / f"{kind(device)}.json"


def files(device: str = "cpu") -> list[Path]:
    """The files to read, in order. Some may not exist."""
    found = [own_file(device), SHIPPED / f"{kind(device)}.json"]
    if device == "cpu":
        similar = [f"cpu_{name_of(d)}" for d in (torch.bfloat16, torch.float16) if multiplies_itself(d)]
        if extensions.base_isa() == "avx512" and not kind(device).endswith("_amx"):
            similar.append("cpu_intel_avx512_bfloat16")
        similar.append("cpu_amd_baseline_torch_avx2" if extensions.base_isa() == "baseline" else "cpu_amd_avx2")
        found += [SHIPPED / f"{name}.json" for name in similar]
    elif device.startswith("cuda") and not torch.version.hip and torch.cuda.get_device_capability(device)[0] == 9:
        found.append(SHIPPED / f"{_HOPPER}.json")
    return list(dict.fromkeys(found))


@remembered
def lines(device: str = "cpu") -> tuple[Line, ...]:
    """The lines in force. For each function, dtype and class of shapes they come from the first file that has any. Of a similar
    kind's file, speeds with instructions for dot products do not count, nor those of many rows by columns and of gradients:
    processors differ most in these."""
    taken: dict[tuple[str, str, str, str], tuple[Path, list[Line]]] = {}
    for path in files(device):
        for line in read(path, None if path.parent == SHIPPED else kind(device), "lines", line_from):
            if device == "cpu" and path.stem != kind(device):
                if line.shapes.endswith(MANY_BY_COLUMNS) or line.function == "backward":
                    continue
                line = line._replace(speed={name: s for name, s in line.speed.items() if name not in extensions.DOT_PRODUCTS})
            if not line.speed:
                continue
            first, kept = taken.setdefault(line[:4], (path, []))
            if first == path:
                kept.append(line)
    order = files(device)
    for key in [key for key in taken if key[0] in BY_PRODUCT]:
        product = taken.get(("linear", *key[1:]))
        if product is not None and order.index(product[0]) < order.index(taken[key][0]):
            del taken[key]  # a nearer kind's products say more than another kind's networks
    return tuple(line for _, kept in taken.values() for line in kept)


def read(path: Path, expected: str | None, key: str, parse: Callable[[dict[str, Any], str], _T]) -> list[_T]:
    """parse(row, file name) of each row under a key of a file. A damaged or foreign file gives a warning and no rows.

    Args:
        expected: the kind of machine that the file must be about; None for any.
    """
    try:
        return [parse(row, path.name) for row in _content(path, expected).get(key, ())]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        warnings.warn(f"evidence file {path}: its {key} are ignored: {reason}", RuntimeWarning, stacklevel=2)
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
        reason = f"{type(error).__name__}: {error}"
        warnings.warn(f"evidence file {path} is ignored: {reason}", RuntimeWarning, stacklevel=2)
    return {}


def line_from(row: dict[str, Any], file: str) -> Line:
    """Checks a row of a file's `lines`.

    Raises:
        KeyError, TypeError, ValueError: it does not have the format at the top of this module.
    """
    speed = {
        str(name): {int(size): float(value) for size, value in by_size.items()}
        for name, by_size in row["speed"].items()
    }
    operator, function, dtype, shapes = (str(row[key]) for key in Line._fields[:4])
    if (operator, function) not in SHAPES:
        raise ValueError(f"no evidence is kept for {operator}'s {function}")
    of_cpu = speed.keys() & OF_CPU
    if not speed or not speed.keys() <= {*OF_CPU, "triton", "cuda", "cudnn", "gluon", "reference"}:
        raise ValueError(f"speed of {operator}: unknown backends, or none: {sorted(speed)}")
    for by_size in speed.values():
        if not by_size or not all(0 < s < _MOST and 0 <= v < math.inf for s, v in by_size.items()):
            raise ValueError(f"speed of {operator}: a size must be positive, and a speed 0 or more")
    threads = int(row.get("threads", 0))
    if not 0 <= threads < _MOST or (of_cpu and (not threads or of_cpu != speed.keys())):
        raise ValueError(
            f"speed of {operator}: backends {sorted(speed)} with {threads} threads; cpu must be the only backend of its line, "
            "with 1 thread or more"
        )
    return Line(operator, function, dtype, shapes, threads, speed, f"{file}, {row['date']}")


# ---- writing ----------------------------------------------------------------------------------------------------------


def write(path: Path, found: dict[str, Any]) -> dict[str, Any]:
    """Writes the results of a tune(). Rows of the old file that were not measured again stay. The file is replaced in one step.

    Returns:
        The new content of the file.
    """
    try:
        old = json.loads(path.read_text())
        old = {
            key: [dict(row) for row in old.get(key, ())] for key in ("lines", "tiles") if old["kind"] == found["kind"]
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        old = {}  # there is no file, or it is damaged
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
    """The table that `pyfused evidence` prints."""
    rows, ends = [], []
    for line in found:
        for backend, by_size in line.speed.items():
            threads = f"{line.threads} thread{'s' * (line.threads > 1)}" if line.threads else ""
            rows.append((line.operator, line.function, line.dtype, line.shapes, threads, backend))
            speeds = "  ".join(f"{size}: {speed:.2f}" for size, speed in sorted(by_size.items()))
            ends.append(f"{speeds}  [{line.source}]")
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [" ".join((*map(str.ljust, row, widths), end)) for row, end in zip(rows, ends)]
    return "\n".join(("times as fast as plain PyTorch, by size (below 1 plain PyTorch runs)", *lines))
