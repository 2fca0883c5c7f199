"""What do the items of gpu.py share? The device, the clocks, and how an error is reported.

PYFUSED_GPU_DRY=1: tiny CPU tensors, Triton in its interpreter, csrc/cuda, cuDNN and Gluon on the CPU (tests/cuda_on_cpu,
tests/cudnn_on_cpu.py, tests/gluon_on_cpu.py).
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from pyfused import extensions
from pyfused.timing import time_cuda

DRY = os.environ.get("PYFUSED_GPU_DRY") == "1"
DEVICE = "cpu" if DRY else "cuda"
Row = dict[str, Any]
if DRY:
    import cudnn_on_cpu
    import gluon_on_cpu
    import shim

    from pyfused.testing.triton_interpreter import repair_interpreter

    repair_interpreter()
    extensions.emulate_cuda(shim.load)
    cudnn_on_cpu.install()
    gluon_on_cpu.install()
    torch.set_num_threads(1)


def synchronize() -> None:
    if not DRY:
        torch.cuda.synchronize()


def error_row(error: Exception) -> Row:
    """The end of a row for a case that raised. Raises the error again if no later case could run in this process."""
    if _is_sticky(error):
        raise error
    return {"ok": False, "error": f"{type(error).__name__}: {error}"[:1500]}


def _is_sticky(error: Exception) -> bool:
    """Whether every later CUDA call in this process fails too."""
    if DRY or isinstance(error, torch.OutOfMemoryError):
        return False
    try:
        torch.cuda.synchronize()
        torch.ones(1, device="cuda").add(1).item()
    except RuntimeError:
        return True
    return False


def seconds_of(call: Callable[[], Any], times: int) -> float:
    samples = []
    for _ in range(times):
        synchronize()
        began = time.perf_counter()
        call()
        synchronize()
        samples.append(time.perf_counter() - began)
    return statistics.median(samples)


def medians(calls: dict[str, Callable[[], Any]], rounds: int = 1 if DRY else 15) -> dict[str, float]:
    """Median device seconds of each call. The calls run in turn, each with a cold cache."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for round in range(rounds + 1):
        for name, call in calls.items():
            seconds = seconds_of(call, 1) if DRY else time_cuda(call)
            if round:
                samples[name].append(seconds)
    return {name: statistics.median(values) for name, values in samples.items()}
