"""How long does one call take? A CPU is timed by the wall clock, a GPU by events with a cold L2 cache."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch


def time_cpu(call: Callable[[], Any]) -> float:
    """Seconds per call. A call of less than 100 us is repeated 20 times, or the clock and a cold start would count too much."""
    began = time.perf_counter()
    call()
    once = time.perf_counter() - began
    if once > 1e-4:
        return once
    began = time.perf_counter()
    for _ in range(20):
        call()
    return (time.perf_counter() - began) / 20


def time_cuda(call: Callable[[], Any]) -> float:
    """Seconds of one call on the current device, by events.

    Overwriting 512 MB first makes the L2 cache cold, as it is between the layers of a model. Then the device waits, so that the
    host has submitted the call before the device reaches it: only the device's time is measured. On an H200 the 120 us of the
    overwriting alone were too short for attention by cuDNN, whose checks took the host longer.
    """
    _flush(torch.cuda.current_device()).zero_()
    torch.cuda._sleep(_AHEAD)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


_AHEAD = 2_000_000  # clocks: some 1.1 ms


@functools.cache
def _flush(index: int) -> torch.Tensor:
    return torch.empty(512 << 20, dtype=torch.int8, device=torch.device("cuda", index))
