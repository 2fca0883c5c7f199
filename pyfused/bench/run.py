"""Which benchmarks run, in which order, and which rows are slow or noisy? The engine of `pyfused bench`."""

from __future__ import annotations

import datetime
import importlib
import importlib.metadata
import pkgutil
import platform
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from .. import evidence, ops
from .._version import __version__
from . import peers as known
from .case import Case, Setup
from .measure import NOISY, ceilings, measure

EVERYTHING = Setup()
LEAST = 0.97  # of plain PyTorch's speed: pyfused promises 1; the rest is the noise of a shared machine


def names() -> list[str]:
    """Every benchmark, benchmarks/bench_<name>.py; the operators first."""
    folder = importlib.import_module(".benchmarks", __package__).__path__
    files = {m.name.removeprefix("bench_") for m in pkgutil.iter_modules(folder) if m.name.startswith("bench_")}
    return [*ops.MODULES, *sorted(files - ops.MODULES.keys())]


def cases(name: str, setup: Setup) -> list[Case]:
    """The rows of a benchmark."""
    return list(importlib.import_module(f".benchmarks.bench_{name}", __package__).cases(setup))


def bench(
    wanted: Sequence[str] = (),
    setup: Setup = EVERYTHING,
    *,
    threads: int = 0,
    peers: Sequence[str] = (),
    seconds: float = 2.0,
    check: bool = False,
    limit: float | None = None,
    each: Callable[[dict[str, Any], str, int], None] = lambda result, now, left: None,
) -> dict[str, Any]:
    """Measures pyfused beside its peers, one row after another, in this process.

    Args:
        wanted: benchmarks; by default all.
        setup: device and dtypes.
        threads: CPU threads during the run; 0 keeps torch's number.
        peers: peers to measure beside plain PyTorch; by default all. The result names those that are not installed.
        seconds: how long to measure a row. There are at least six rounds, or three or one if calls are slow.
        check: measure a row below LEAST twice more, three times as long, before it counts as slow.
        limit: begin no row after so many seconds.
        each: called before every row as each(result so far, "attention 1x12x512x64 float32", rows left).

    Returns:
        {"kind", "device", "threads", "date", "versions", "ceilings", "missing": {peer: why}, "interrupted", "left",
        "rows": [...]}. The rows are measure()'s, with "benchmark", "noisy", and "slow" if pyfused is below LEAST. Ctrl-C ends
        the run and keeps the finished rows. "left" is the number of rows not measured because of that or of the limit.

    Raises:
        ValueError: an unknown benchmark or peer, or a device that is not here.
    """
    for what, given, takes in (("NAMES", wanted, names()), ("--peers", peers, list(known.PEERS))):
        for name in given:
            if name not in takes:
                raise ValueError(f"{what} has {name!r}; it takes {', '.join(takes)}")
    if setup.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device 'cuda': no CUDA device here")
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    rows: list[dict[str, Any]] = []
    missing = {name: why for name in peers or known.PEERS if (why := known.missing(name, setup.device))}
    result: dict[str, Any] = {
        "kind": evidence.kind(setup.device),
        "device": setup.device,
        "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
        "versions": versions(),
        "ceilings": {},
        "missing": missing,
        "interrupted": False,
        "left": 0,
        "rows": rows,
    }
    reasons = {name: missing.get(name, "") for name in peers or known.PEERS}
    try:
        result["ceilings"] = ceilings(setup.device, setup.dtypes, setup.small)
        listed = [(name, case) for name in dict.fromkeys(wanted or names()) for case in cases(name, setup)]
        began = time.monotonic()
        for place, (name, case) in enumerate(listed):
            result["left"] = len(listed) - place  # before each(), which writes the file: this process may be killed
            if limit is not None and time.monotonic() - began > limit:
                break
            each(result, f"{name} {case.name} {evidence.name_of(case.dtype)}", len(listed) - place)
            row = {"benchmark": name, **measure(case, setup.device, reasons, seconds)}
            if check and is_slow(row):
                row = _measure_longer(row, partial(measure, case, setup.device, {}), seconds)
            _mark_slow_and_noisy(row)
            rows.append(row)
            result["left"] -= 1
    except KeyboardInterrupt:
        result["interrupted"] = True
    finally:
        torch.set_num_threads(before)
    return result


def is_slow(row: dict[str, Any]) -> bool:
    """Whether pyfused is below LEAST of plain PyTorch's speed, and not by chance: the ratio's whole interval is below."""
    return bool(row.get("interval")) and row["interval"][1] < LEAST


def _measure_longer(row: dict[str, Any], again: Callable[[float], dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Measures a slow row up to twice more, three times as long. Returns it with the best numbers for pyfused and baseline."""
    for _ in range(2):
        other = again(3 * seconds)
        if not other.get("interval"):
            return row
        if other["interval"][1] > row["interval"][1]:
            baseline = row["baseline"]
            row = {**row, "interval": other["interval"], "rounds": other["rounds"]}
            row["ratio"] = {**row["ratio"], baseline: other["ratio"][baseline]}
            for key in ("seconds", "undisturbed", "spread"):
                row[key] = {**row[key], **{name: other[key][name] for name in ("pyfused", baseline)}}
        if not is_slow(row):
            break
    return row


def _mark_slow_and_noisy(row: dict[str, Any]) -> None:
    row["slow"] = is_slow(row)
    row["noisy"] = any(row.get("spread", {}).get(name, 0) > NOISY for name in ("pyfused", row.get("baseline")))


def versions() -> dict[str, str]:
    """The versions of pyfused, Python, torch, and every installed peer."""
    installed = {"pyfused": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in dict.fromkeys(p for needed in known.PEERS.values() for p in needed):
        try:
            installed[package] = importlib.metadata.version(known.COMPILED.get(package, package))
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed
