"""How is a case timed? Providers in turn, many rounds, outputs judged in the same run, medians and ratios reported.

An absolute time means little on a shared machine: what counts is the ratio to the baseline, and the share of the
machine's own ceilings (copy bandwidth, matrix rate), measured in the same run.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..testing.tolerance import assert_close


@dataclass
class Case:
    """One row of a benchmark.

    Args:
        name: such as "512x768 float32 residual".
        providers: name -> a function of no arguments that returns a tensor, or a tuple of them.
        exact: the result in float64. Of a tuple, as many items are judged as this one returns.
        plain: plain PyTorch in the dtype of "pyfused", which sets the scale of errors; None is the baseline.
        baseline: the provider that ratios refer to; "pyfused" is compared with the best of the others as well.
        bytes, flops: the least that the case must move and do, for GB/s and GFLOP/s; 0 if not meaningful.
        rounds, seconds: at most so many, and so long; at least five rounds.
    """

    name: str
    providers: dict[str, Callable[[], Any]]
    exact: Callable[[], Any]
    plain: Callable[[], Any] | None = None
    baseline: str = "torch"
    bytes: float = 0.0
    flops: float = 0.0
    rounds: int = 60
    seconds: float = 4.0


def measure(case: Case, device: str = "cpu") -> dict[str, Any]:
    """Times every provider of a case, interleaved, after its output has passed the tolerance rule.

    Args:
        case: what to run.
        device: "cpu" or "cuda".

    Returns:
        {"case", "seconds": {provider: median}, "undisturbed": {provider: the time that a tenth of the rounds stay below, for a
        machine whose processor others share}, "ratio": {provider: its time / pyfused's}, "gb_per_s", "gflop_per_s"}.

    Raises:
        AssertionError: an output breaks the rule, or the exact one is not finite: a fast wrong answer is no result.
    """
    check(case)
    clock = _time_cuda if device == "cuda" else _time_cpu
    for call in case.providers.values():  # compiled and warm
        call()
    samples: dict[str, list[float]] = {name: [] for name in case.providers}
    began = time.perf_counter()
    for done in range(case.rounds):
        for name, call in case.providers.items():
            samples[name].append(clock(call))
        if done >= 4 and time.perf_counter() - began > case.seconds:
            break
    medians = {name: statistics.median(values) for name, values in samples.items()}
    lows = {name: sorted(values)[len(values) // 10] for name, values in samples.items()}
    own = medians["pyfused"]
    return {
        "case": case.name,
        "seconds": medians,
        "undisturbed": lows,
        "rounds": len(next(iter(samples.values()))),
        "ratio": {name: value / own for name, value in medians.items() if name != "pyfused"},
        "gb_per_s": case.bytes / own / 1e9,
        "gflop_per_s": case.flops / own / 1e9,
    }


def check(case: Case) -> None:
    """Judges the output of every provider of a case by the tolerance rule.

    Raises:
        AssertionError: as measure.
    """
    exact, plain = _items(case.exact()), _items((case.plain or case.providers[case.baseline])())
    if not all(truth.isfinite().all() for truth in exact):
        raise AssertionError(f"{case.name}: the exact result is not finite")
    for name, call in case.providers.items():
        for found, scale, truth in zip(_items(call()), plain, exact):
            assert_close(found, scale, truth, f"{case.name}: {name}")


def _items(out: Any) -> tuple[torch.Tensor, ...]:
    return tuple(out) if isinstance(out, tuple | list) else (out,)


def _time_cpu(call: Callable[[], Any]) -> float:
    """Seconds per call; a call that takes less than 100 us is repeated, as the clock and a cold start would weigh in."""
    began = time.perf_counter()
    call()
    once = time.perf_counter() - began
    if once > 1e-4:
        return once
    began = time.perf_counter()
    for _ in range(20):
        call()
    return (time.perf_counter() - began) / 20


def _time_cuda(call: Callable[[], Any]) -> float:
    """Seconds of one call on the device, by events. Before it 512 MB are overwritten: the L2 cache is cold, as between the
    layers of a model, and the host has time to submit the call before the device gets there, so that only the device's
    time is measured."""
    _flush().zero_()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@functools.cache
def _flush() -> torch.Tensor:
    return torch.empty(512 << 20, dtype=torch.int8, device="cuda")


def ceilings(device: str = "cpu") -> dict[str, float]:
    """What this machine can do at most, with the threads in use: copy bandwidth (GB/s) and matrix rate (GFLOP/s)."""
    clock = _time_cuda if device == "cuda" else _time_cpu
    size = 1 << (30 if device == "cuda" else 27)
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    n, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    copy = min(clock(lambda: target.copy_(source)) for _ in range(7))
    read = min(clock(lambda: source.sum()) for _ in range(7))
    product = min(clock(lambda: a @ b) for _ in range(7))
    return {
        "copy_gb_per_s": 2 * size / copy / 1e9,
        "read_gb_per_s": size / read / 1e9,
        f"matmul_{str(dtype).removeprefix('torch.')}_gflop_per_s": 2 * n**3 / product / 1e9,
    }


def render(rows: list[dict[str, Any]]) -> str:
    """The rows as a table: times in ms (below 0.1 ms in us, the undisturbed one in brackets), and how many times faster
    pyfused is than each other provider."""
    lines = []
    for row in rows:
        own = row["seconds"]["pyfused"] * 1e3
        time = f"{own:>9.3f} ms"
        if own < 0.1:
            time = f"{own * 1e3:>9.2f} us ({row['undisturbed']['pyfused'] * 1e6:.1f})"
        peers = "  ".join(f"{name} x{ratio:.2f}" for name, ratio in row["ratio"].items())
        rate = f"{row['gb_per_s']:.1f} GB/s" if row["gb_per_s"] else ""
        rate = f"{row['gflop_per_s']:.0f} GFLOP/s" if row["gflop_per_s"] else rate
        lines.append(f"{row['case']:<44} {time}  {rate:<14} {peers}")
    return "\n".join(lines)
