"""How is a case timed? Providers in turn, many rounds, outputs judged first, medians and paired ratios reported.

An absolute time means little on a shared machine: what counts is the ratio to a peer in the same rounds, and the share of the
machine's own ceilings, measured in the same run.
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

SLOW = 5.0  # seconds: of rounds that take longer three are enough
NOISY = 0.25  # a spread (the middle half of the times over their median) from here on is said to be noise


def measure(case: Case, device: str, peers: dict[str, str], seconds: float) -> dict[str, Any]:
    """Times every provider of a case, interleaved, once its output has passed the tolerance rule.

    Args:
        case: what to run.
        device: "cpu" or "cuda".
        peers: those asked for, each with the reason why it cannot run here, "" if it can.
        seconds: how long, and at least six rounds: of fewer no interval has 95% confidence. Three where a round takes longer
            than SLOW, whose interval is all of them (75%).

    Returns:
        {"case", "dtype", "baseline", "rounds", "bytes", "flops", "left_out": {peer: why}} and, by provider, "seconds" (the
        median), "undisturbed" (what a tenth of the rounds stay below), "spread" (the middle half of the times / the median)
        and "ratio" (its time / pyfused's, the median over the rounds); "interval": [low, high] of the baseline's ratio, with
        95% confidence. Of Values "unit", "values" and "ratio". Where pyfused fails or its output is wrong, "error".
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
            return row | _measured(calls, device, peers, seconds)
    except Exception as error:
        return row | {"error": _said(error)}


def _said(error: BaseException) -> str:
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:300]}"


def _measured(calls: Calls, device: str, peers: dict[str, str], seconds: float) -> dict[str, Any]:
    providers, left_out = judged(calls, peers)
    cost = calls.cost or cost_of(providers["pyfused"])
    timed = _timed(providers, calls.baseline, device, seconds)
    return {"baseline": calls.baseline, **timed, "bytes": cost.bytes, "flops": cost.flops, "left_out": left_out}


def judged(calls: Calls, peers: dict[str, str]) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """The calls of "pyfused", of plain PyTorch and of the peers asked for, where the outputs were right; and why others are
    left out.

    Raises:
        AssertionError: pyfused's own output breaks the tolerance rule. ValueError: the exact one is not finite.
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
                yardsticks.append(_items(out))  # plain PyTorch too, in other steps
            providers[name] = functools.partial(function, *calls.inputs)
        except Exception as error:
            left_out[name] = _said(error)
    return providers, left_out


def _items(out: Any) -> tuple[torch.Tensor, ...]:
    return tuple(out) if isinstance(out, tuple | list) else (out,)


def _wrong(out: Any, plain: list[tuple[torch.Tensor, ...]], exact: tuple[torch.Tensor, ...]) -> str:
    """What breaks the tolerance rule beside one or several plain results, or ""."""
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
    """At most some million of the elements, evenly spread: the rule runs on the host."""
    return tensor if tensor.numel() < 1 << 21 else tensor.flatten()[:: (tensor.numel() >> 20) | 1]


def _far_off(out: Any, exact: tuple[torch.Tensor, ...]) -> str:
    """Of plain PyTorch, and of peers in lower precision: the RMS error may be a tenth of the result's RMS."""
    if len(_items(out)) < len(exact):
        return f"{len(_items(out))} of {len(exact)} tensors"
    for found, truth in zip(_items(out), exact):
        truth = truth.cpu()
        off = (found.cpu().double() - truth).square().mean().sqrt() / truth.square().mean().sqrt()
        if not off <= 0.1:
            return f"an RMS error of {off:.2g} of the result's RMS"
    return ""


def _timed(providers: dict[str, Callable[[], Any]], baseline: str, device: str, seconds: float) -> dict[str, Any]:
    clock = _clock(device)
    repeats = {name: 1 if device == "cuda" else _repeats(call) for name, call in providers.items()}
    samples: dict[str, list[float]] = {name: [] for name in providers}
    order, least, began = list(providers), 6, time.perf_counter()
    while len(samples["pyfused"]) < least or time.perf_counter() - began < seconds:
        for name in order:
            samples[name].append(clock(providers[name], repeats[name]))
        order.reverse()  # who comes first finds caches as the other left them
        least = 3 if time.perf_counter() - began > SLOW * len(samples["pyfused"]) else 6
    own = samples["pyfused"]
    ratios = {name: [t / o for t, o in zip(times, own)] for name, times in samples.items() if name != "pyfused"}
    medians = {name: statistics.median(times) for name, times in samples.items()}
    spread = {}
    for name, times in samples.items():
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
    """Between which two of the values their median lies with 95% confidence, whatever their distribution: by the normal
    approximation of how many of n lie below it."""
    ordered, n = sorted(values), len(values)
    half = 0.98 * math.sqrt(n)
    return [ordered[max(0, math.floor(n / 2 - half))], ordered[min(n - 1, math.ceil(n / 2 + half))]]


def _repeats(call: Callable[[], Any]) -> int:
    """How often a call is repeated for one reading: 0.2 ms, where the clock and a cold start weigh nothing."""
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
    """What this machine can do at most, with the threads in use: copy and read bandwidth (GB/s), and the matrix rate of
    torch's own product by dtype (GFLOP/s)."""
    clock = _clock(device)
    size = 1 << (20 if small else 30 if device == "cuda" else 27)
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    found = {
        "copy_gb_per_s": 2 * size / min(clock(lambda: target.copy_(source), 1) for _ in range(7)) / 1e9,
        "read_gb_per_s": size / min(clock(lambda: source.sum(), 1) for _ in range(7)) / 1e9,
    }
    for dtype in dict.fromkeys((torch.float32, *dtypes)):
        # A product without instructions of its own, as half precision has on many CPUs, would take minutes.
        n = 64 if small else 8192 if device == "cuda" else 1024 if dtype == torch.float32 else 256
        a = torch.randn(n, n, device=device).to(dtype)
        seconds = min(clock(functools.partial(torch.matmul, a, a), 1) for _ in range(7))
        found[f"{name_of(dtype)}_gflop_per_s"] = 2 * n**3 / seconds / 1e9
    return found


def share(row: dict[str, Any], limits: dict[str, float]) -> float | None:
    """The part of the roofline that pyfused reaches: the least time that the bytes and the FLOPs take at this machine's
    ceilings, over the time taken. More than 1 where the data stays in caches. Half precision may be computed in float32."""
    if not (row["bytes"] or row["flops"]):
        return None
    rate = max(limits.get(f"{row['dtype']}_gflop_per_s", 0.0), limits["float32_gflop_per_s"])
    bandwidth = max(limits["read_gb_per_s"], limits["copy_gb_per_s"])
    return max(row["bytes"] / bandwidth, row["flops"] / rate) / 1e9 / row["seconds"]["pyfused"]
