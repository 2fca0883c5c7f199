"""How wrong may a result be? The tolerance rule: hardly worse than plain PyTorch, both measured against float64.

Plain PyTorch in the same dtype, on the same inputs, sets the scale. Two figures are compared, and both must hold:

- the root mean square (RMS) of the errors: at most 1.5 times that of plain PyTorch, plus half a rounding step;
- every single error: at most 4 times the largest of plain PyTorch, plus one rounding step of that element.

With few elements both may be larger by chance, and the bounds grow; see _chance. A rounding step is the distance between
neighbouring numbers of the dtype at the true value. The constants are calibrated: `tests/calibrate_tolerance.py` prints how
far right kernels and planted faults are off on each instruction set; tests/data/tolerance_calibration.json holds the numbers.
If errors share a cause (the log-sum-exp of a row, the only row of a product), there are fewer independent errors than elements:
judge several draws together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Judgement:
    """One comparison: pyfused's `error`, plain PyTorch's error (`plain`), and the allowed error (`bound`).

    The worst element is the one with the largest ratio of error to bound.
    """

    rms_error: float
    rms_plain: float
    rms_bound: float
    worst_error: float
    worst_plain: float
    worst_bound: float

    @property
    def ok(self) -> bool:
        return self.ratio <= 1

    @property
    def ratio(self) -> float:
        """The larger of the two errors over their bounds: at most 1 passes."""
        return max(self.rms_ratio, self.worst_ratio)

    @property
    def rms_ratio(self) -> float:
        return self.rms_error / self.rms_bound if self.rms_bound else 0.0

    @property
    def worst_ratio(self) -> float:
        return self.worst_error / self.worst_bound if self.worst_bound else 0.0


def judge(actual: torch.Tensor, plain: torch.Tensor | Iterable[torch.Tensor], truth: torch.Tensor) -> Judgement:
    """Judges `actual` by the rule.

    A NaN or infinity of the truth must be in the result too, and no other. If the truth is finite but beyond the dtype's range,
    the infinity of its sign is right. Elements where only plain PyTorch is not finite do not count as its errors.

    Args:
        actual: pyfused's result.
        plain: plain PyTorch's result for the same inputs in the same dtype, or several results from different ways to compute
            it. The one with the largest error sets the scale.
        truth: the result in float64.

    Raises:
        ValueError: the shapes differ.
        TypeError: truth is not float64.
    """
    plains = [plain] if isinstance(plain, torch.Tensor) else list(plain)
    for name, tensor in ("actual", actual), *(("plain", p) for p in plains):
        if tensor.shape != truth.shape:
            raise ValueError(f"shapes differ: {name} {tuple(tensor.shape)}, truth {tuple(truth.shape)}")
    if truth.dtype != torch.float64:
        raise TypeError(f"truth is {truth.dtype}; it takes float64")
    if truth.numel() == 0:
        return Judgement(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    truth = truth.detach().cpu()
    step = _rounding_step(truth, actual.dtype)
    error = _errors(actual, truth)
    yardstick = max((_finite(_errors(p, truth)) for p in plains), key=_rms)
    rms_plain, worst_plain = _rms(yardstick), yardstick.max().item()
    # A few elements of plain PyTorch may be exact by luck. Chance then scales the RMS of rounding alone, step / sqrt(12).
    more, rounding = _chance(yardstick) - 1, step / math.sqrt(12)
    bounds = 4 * (worst_plain + more * rounding.clamp(min=worst_plain)) + step
    worst = (error / bounds).argmax()
    return Judgement(
        rms_error=_rms(error),
        rms_plain=rms_plain,
        rms_bound=1.5 * (rms_plain + more * max(rms_plain, _rms(rounding))) + _rms(step) / 2,
        worst_error=error.flatten()[worst].item(),
        worst_plain=worst_plain,
        worst_bound=bounds.flatten()[worst].item(),
    )


def assert_close(
    actual: torch.Tensor,
    plain: torch.Tensor | Iterable[torch.Tensor],
    truth: torch.Tensor,
    what: str = "result",
) -> None:
    """Raises AssertionError with the numbers if the rule does not hold; see judge."""
    verdict = judge(actual, plain, truth)
    if not verdict.ok:
        raise AssertionError(
            f"{what}: RMS error {verdict.rms_error:.3e}, {verdict.rms_bound:.3e} allowed (plain PyTorch's "
            f"{verdict.rms_plain:.3e}); worst element off by {verdict.worst_error:.3e}, {verdict.worst_bound:.3e} allowed "
            f"(plain PyTorch's largest error {verdict.worst_plain:.3e})"
        )


def _chance(errors: torch.Tensor) -> float:
    """By which factor may the RMS of other errors of this kind be larger by chance alone?

    The ratio of two mean squares of n normal numbers has the F distribution. Half its logarithm (Fisher's z) is nearly normal
    with variance 1 / (n - 2/3). Five standard deviations give 3.6 at n = 16, 1.37 at 256 and 1.05 at 10,000. If a few errors
    are much larger than the rest, only they count: n is 3 (sum e^2)^2 / sum e^4, which for normal errors is their number.
    """
    squares = errors.square()
    fourth = squares.square().sum().item()
    count = min(errors.numel(), 3 * squares.sum().item() ** 2 / fourth) if fourth else errors.numel()
    return math.exp(5 / math.sqrt(count - 2 / 3))


def _errors(found: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """|found - truth|: 0 where both are the same NaN or infinity, infinite where only one is NaN or infinite."""
    wide = found.detach().cpu().double()
    beyond = wide.isinf() & (truth.abs() > torch.finfo(found.dtype).max) & (wide.sign() == truth.sign())
    same = beyond | (wide.isnan() & truth.isnan())
    return (wide - truth).abs().nan_to_num(nan=math.inf, posinf=math.inf).masked_fill(same, 0.0)


def _finite(errors: torch.Tensor) -> torch.Tensor:
    """Infinite errors as 0: an element where only plain PyTorch is not finite sets no scale."""
    return errors.masked_fill(errors.isinf(), 0.0)


def _rounding_step(truth: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The distance between neighbouring numbers of the dtype at each true value, at least that of subnormal numbers."""
    info = torch.finfo(dtype)
    size = truth.abs().nan_to_num(nan=0.0, posinf=0.0).clamp(info.tiny, info.max)
    return torch.ldexp(torch.full_like(size, info.eps), torch.frexp(size).exponent - 1)


def _rms(errors: torch.Tensor) -> float:
    return errors.square().mean().sqrt().item()
