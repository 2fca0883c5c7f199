"""The tolerance rule: an error at most twice that of plain PyTorch in the same dtype, plus one rounding of the output dtype.

Both errors are measured against the same maths in float64. There is no hand-picked tolerance: plain PyTorch sets it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Judgement:
    """One comparison: largest absolute errors of pyfused and of plain PyTorch against float64, and the bound."""

    error: float
    plain_error: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.error <= self.bound

    @property
    def ratio(self) -> float:
        """Error over bound: at most 1 passes."""
        return self.error / self.bound if self.bound else (0.0 if self.error == 0 else float("inf"))


def judge(actual: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor) -> Judgement:
    """Judges `actual` by the rule.

    Args:
        actual: pyfused's result.
        plain: plain PyTorch's result for the same inputs in the same dtype.
        truth: the result in float64.
    """
    if actual.shape != truth.shape or plain.shape != truth.shape:
        raise ValueError(f"shapes differ: actual {actual.shape}, plain {plain.shape}, truth {truth.shape}")
    if truth.dtype != torch.float64:
        raise TypeError(f"truth is {truth.dtype}; it takes float64")
    if truth.numel() == 0:
        return Judgement(0.0, 0.0, 0.0)
    truth = truth.detach().cpu()
    eps = torch.finfo(actual.dtype).eps
    error = (actual.detach().cpu().double() - truth).abs().max().item()
    plain_error = (plain.detach().cpu().double() - truth).abs().max().item()
    bound = 2 * plain_error + eps * truth.abs().max().item()
    return Judgement(error, plain_error, bound)


def assert_close(actual: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, what: str = "result") -> None:
    """Raises AssertionError, with the numbers, where the rule does not hold; NaN anywhere fails."""
    result = judge(actual, plain, truth)
    if not result.ok:
        raise AssertionError(
            f"{what}: error {result.error:.3e} exceeds {result.bound:.3e} (plain PyTorch's error {result.plain_error:.3e})"
        )
