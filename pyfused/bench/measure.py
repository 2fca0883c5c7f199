"""How is a case timed? Outputs are checked first; then all providers run in turn, for many rounds.

An absolute time means little on a shared machine. Two numbers count: the ratio to a peer in the same rounds, and the share of
the machine's own limits, measured in the same run.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from ..evidence import name_of
from ..testing.tolerance import judge
from ..timing import time_cuda
from .case import Calls, Case, Function, Values, wide
from .cost import cost_of

SLOW = 5.0  # seconds; if a round takes longer, three rounds are enough
VERY_SLOW = 30.0  # seconds; if a round takes longer, one is: half precision on a CPU that has no instructions for it
NOISY = 0.25  # a row is noisy if the middle half of its times spans more than this share of their median


def measure(case: Case, device: str, peers: dict[str, str], seconds: float) -> dict[str, Any]:
    """Checks the outputs of a case's providers by the tolerance rule, then times them in turn.

    Args:
        case: what to run.
        device: "cpu" or "cuda".
        peers: requested peers -> why each cannot run here, "" if it can.
        seconds: how long to measure. There are at least six rounds: fewer give no interval of 95% confidence. If a round takes
            longer than SLOW, three are enough, and the interval spans them all (75%); longer than VERY_SLOW, one.

    Returns:
        {"case", "dtype", "baseline", "rounds", "bytes", "flops", "left_out": {peer: why},
        "interval": [low, high] of the baseline's ratio, with 95% confidence}
        and by provider: "seconds" (the median), "undisturbed" (the first decile of the times), "spread" (the middle half of the
        times / the median; not of one round) and "ratio" (the provider's time / pyfused's, the median over the rounds).
        For Values: "unit", "values" and "ratio". If pyfused fails or its output is wrong: "error".
    """
    row: dict[str, Any] = {"case": case.name, "dtype": name_of(case.dtype)}
    try:
        torch.manual_seed(0)
        calls = case.make()
        if isinstance(calls, Values):
            own = calls.values["pyfused"]
            ratio = {name: value / own for name, value in calls.values.items() if name != "pyfused"}
            return row | {"unit": calls.unit, "values": calls.values, "ratio": ratio}
        with torch.set_grad_enabled(calls.trains):
            return row | _check_and_time(calls, device, peers, seconds)
    except Exception as error:
        return row | {"error": _error_text(error)}


def _error_text(error: BaseException) -> str:
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:300]}"


def _check_and_time(calls: Calls, device: str, peers: dict[str, str], seconds: float) -> dict[str, Any]:
    providers, left_out = right_providers(calls, peers)
    cost = calls.cost or cost_of(providers["pyfused"])
    times = _time_rounds(providers, calls.baseline, device, seconds)
    return {"baseline": calls.baseline, **times, "bytes": cost.bytes, "flops": cost.flops, "left_out": left_out}


def right_providers(calls: Calls, peers: dict[str, str]) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """The calls with a right output, of "pyfused", plain PyTorch and the requested peers; and why others are left out.

    Raises:
        AssertionError: pyfused's own output breaks the tolerance rule. ValueError: the exact result is not finite.
    """
    left_out = {name: peers[name] for name in calls.peers if peers.get(name)}
    makers = {name: make for name, make in calls.peers.items() if name in peers and name not in left_out}
    exact = _items(calls.exact() if calls.exact else calls.plain(*wide(calls.inputs)))
    if not all(truth.isfinite().all() for truth in exact):
        raise ValueError("the exact result is not finite")
    scale = _items((calls.scale or calls.plain)(*calls.inputs))
    wrong = _wrong(calls.pyfused(*calls.inputs), [scale], exact)
    if wrong:
        raise AssertionError(f"pyfused's output is wrong: {wrong}")
    providers: dict[str, Callable[[], Any]] = {"pyfused": functools.partial(calls.pyfused, *calls.inputs)}
    baseline: dict[str, Callable[[], Function]] = {calls.baseline: lambda: calls.plain}
    yardsticks = [scale]
    for name, make in (baseline | makers).items():
        try:
            function = make()
            out = scale if function is calls.plain and not calls.scale else function(*calls.inputs)
            if name == calls.baseline or name in calls.loose:
                wrong = _far_off(out, exact)
            else:
                wrong = _wrong(out, yardsticks, exact)
            if wrong:
                raise AssertionError(f"its output is wrong: {wrong}")
            if name == calls.baseline:
                yardsticks.append(_items(out))  # plain PyTorch's errors count too: it may compute in other steps
            providers[name] = functools.partial(function, *calls.inputs)
        except Exception as error:
            left_out[name] = _error_text(error)
    return providers, left_out


def _items(out: Any) -> tuple[torch.Tensor, ...]:
    return tuple(out) if isinstance(out, tuple | list) else (out,)


def _wrong(out: Any, plain: list[tuple[torch.Tensor, ...]], exact: tuple[torch.Tensor, ...]) -> str:
    """How the output breaks the tolerance rule beside one or several plain results; "" if it does not."""
    if len(_items(out)) < len(exact):
        return f"{len(_items(out))} of {len(exact)} tensors"
    for found, *scales, truth in zip(_items(out), *plain, exact):
        if found.dtype != scales[0].dtype:
            return f"it is {name_of(found.dtype)}, plain PyTorch's {name_of(scales[0].dtype)}"
        verdict = judge(_sample(found), map(_sample, scales), _sample(truth))
        if not verdict.ok:
            return f"{verdict.ratio:.2g} times what the tolerance rule allows (an RMS error of {verdict.rms_error:.2g})"
    return ""


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """At most about two million elements, evenly spread: the tolerance rule runs on the CPU."""
    return tensor if tensor.numel() < 1 << 21 else tensor.flatten()[:: (tensor.numel() >> 20) | 1]


def _far_off(out: Any, exact: tuple[torch.Tensor, ...]) -> str:
    """How the output of plain PyTorch, or of a peer in lower precision, is wrong; "" if not. The RMS error may be a tenth of
    the result's RMS."""
    if len(_items(out)) < len(exact):
        return f"{len(_items(out))} of {len(exact)} tensors"
    for found, truth in zip(_items(out), exact):
        truth = truth.cpu()
        off = (found.cpu().double() - truth).square().mean().sqrt() / truth.square().mean().sqrt()
        if not off <= 0.1:
            return f"an RMS error of {off:.2g} of the result's RMS"
    return ""


def _time_rounds(providers: dict[str, Callable[[], Any]], baseline: str, device: str, seconds: float) -> dict[str, Any]:
    clock = _clock(device)
    first = {name: clock(call, 1) for name, call in providers.items()}
    if sum(first.values()) > VERY_SLOW:
        samples = {name: [once] for name, once in first.items()}
    else:
        repeats = {name: 1 if device == "cuda" else _repeats(call) for name, call in providers.items()}
        samples = {name: [] for name in providers}
        order, least, began = list(providers), 6, time.perf_counter()
        while len(samples["pyfused"]) < least or time.perf_counter() - began < seconds:
            for name in order:
                samples[name].append(clock(providers[name], repeats[name]))
            order.reverse()  # a provider finds the caches as the one before it left them
            least = 3 if time.perf_counter() - began > SLOW * len(samples["pyfused"]) else 6
    own = samples["pyfused"]
    ratios = {name: [t / o for t, o in zip(times, own)] for name, times in samples.items() if name != "pyfused"}
    medians = {name: statistics.median(times) for name, times in samples.items()}
    spread = {}
    for name, times in samples.items():
        if len(times) > 1:
            low, _, high = statistics.quantiles(times, n=4)
            spread[name] = (high - low) / medians[name]
    return {
        "seconds": medians,
        "undisturbed": {name: sorted(times)[len(times) // 10] for name, times in samples.items()},
        "spread": spread,
        "ratio": {name: statistics.median(values) for name, values in ratios.items()},
        "interval": _interval(ratios[baseline]) if baseline in ratios else None,
        "rounds": len(own),
    }


def _interval(values: list[float]) -> list[float]:
    """The 95% confidence interval of the median, for any distribution. The number of values below the median is binomial; this
    uses its normal approximation."""
    ordered, n = sorted(values), len(values)
    half = 0.98 * math.sqrt(n)
    return [ordered[max(0, math.floor(n / 2 - half))], ordered[min(n - 1, math.ceil(n / 2 + half))]]


def _repeats(call: Callable[[], Any]) -> int:
    """How often to repeat a call for one reading: for 0.2 ms, so that the clock and a cold start do not matter."""
    once = _time_cpu(call, 1)
    if once < 1e-3:
        once = min(_time_cpu(call, 1) for _ in range(3))
    return max(1, min(200, int(2e-4 / max(once, 1e-7))))


def _clock(device: str) -> Callable[[Callable[[], Any], int], float]:
    return (lambda call, repeats: time_cuda(call)) if device == "cuda" else _time_cpu


def _time_cpu(call: Callable[[], Any], repeats: int) -> float:
    """Seconds per call."""
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - began) / repeats


def ceilings(device: str, dtypes: tuple[torch.dtype, ...], small: bool = False) -> dict[str, float]:
    """This machine's limits with the threads in use: copy and read bandwidth (GB/s), and the rate of torch's matrix product in
    each dtype (GFLOP/s)."""
    clock = _clock(device)
    size = 1 << (20 if small else 30 if device == "cuda" else 27)
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    limits = {
        "copy_gb_per_s": 2 * size / min(clock(lambda: target.copy_(source), 1) for _ in range(7)) / 1e9,
        "read_gb_per_s": size / min(clock(lambda: source.sum(), 1) for _ in range(7)) / 1e9,
    }
    for dtype in dict.fromkeys((torch.float32, *dtypes)):
        # Many CPUs have no instructions for half precision: a large product would take minutes.
        n = 64 if small else 8192 if device == "cuda" else 1024 if dtype == torch.float32 else 256
        a = torch.randn(n, n, device=device).to(dtype)
        seconds = min(clock(functools.partial(torch.matmul, a, a), 1) for _ in range(7))
        limits[f"{name_of(dtype)}_gflop_per_s"] = 2 * n**3 / seconds / 1e9
    return limits


def share(row: dict[str, Any], limits: dict[str, float]) -> float | None:
    """The share of the roofline that pyfused reaches: the least time for the row's bytes and FLOPs at this machine's limits,
    over the time taken. It can exceed 1 if the data stays in caches. Half precision may be computed in float32."""
    if not (row["bytes"] or row["flops"]):
        return None
    rate = max(limits.get(f"{row['dtype']}_gflop_per_s", 0.0), limits["float32_gflop_per_s"])
    bandwidth = max(limits["read_gb_per_s"], limits["copy_gb_per_s"])
    return max(row["bytes"] / bandwidth, row["flops"] / rate) / 1e9 / row["seconds"]["pyfused"]
