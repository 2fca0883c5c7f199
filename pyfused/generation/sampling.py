"""Which token comes next? The likeliest, or one drawn with a temperature from the top k, the top p, or all."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..kernels.shared.draw import NO_TOKEN, drawn_token, likeliest_token
from ..rules import SEED, Rule, check, check_cuts

__all__ = ["NO_TOKEN", "Choice", "Sampler", "likeliest_token", "no_token", "uniforms"]

# float32 can divide by these temperatures on every device. Some devices multiply by the reciprocal; some read subnormals as 0.
_COLDEST, _HOTTEST = 2.0**-126, 2.0**126
_TEMPERATURE = Rule((int, float), "a number", lambda value: 0.0 <= value < math.inf, "a finite number, at least 0")
_ALL = 2**31 - 1  # no vocabulary has more tokens. Kernels take top_k as 64 bits


@dataclass(frozen=True)
class Sampler:
    """Logits to tokens: softmax(logits / temperature), cut to the top_k likeliest tokens, then to the smallest set that
    holds top_p of the probability (Holtzman et al. 2019, arXiv:1904.09751). The draw inverts the cumulative sum.

    Temperature 0, or one too small for float32, takes the likeliest token. None cuts nothing. Nothing here synchronises
    with a GPU.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        check(_TEMPERATURE, temperature=self.temperature)
        check_cuts(self.top_k, self.top_p)

    @property
    def is_greedy(self) -> bool:
        """Whether it takes the likeliest token."""
        return self.temperature < _COLDEST

    def __call__(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """logits (B, V), uniform (B,) float64 in [0, 1) -> tokens (B,) int64; NO_TOKEN if the logits choose none."""
        if self.is_greedy:
            return likeliest_token(logits)
        return drawn_token(logits, uniform, *self.cuts)

    @property
    def cuts(self) -> tuple[float, int, float]:
        """Temperature, top k and top p as drawn_token and `decode` take them."""
        top_k = min(self.top_k or 0, _ALL)
        return float(min(self.temperature, _HOTTEST)), top_k, 1.0 if self.top_p is None else float(self.top_p)


@dataclass(frozen=True)
class Choice:
    """What a step chooses its tokens with: a sampler, and a number of [0, 1) for each row, (B,) float64."""

    sampler: Sampler
    uniform: Tensor

    def __call__(self, logits: Tensor) -> Tensor:
        """logits (B, V) -> tokens (B,) int64."""
        return self.sampler(logits, self.uniform)


def no_token(row: int, step: int, dtype: torch.dtype) -> FloatingPointError:
    """The error to raise if prompts[row] gets NO_TOKEN as its new token `step`, counted from 0."""
    hint = "the model's weights or what it computes of them are not finite"
    if dtype == torch.float16:
        hint = "float16 ends at 65504; dtype='bfloat16' and 'float32' reach further"
    return FloatingPointError(
        f"the logits of new token {step} of prompts[{row}] choose none: they hold NaN or inf; {hint}"
    )


def uniforms(seed: int | None, rows: int, count: int) -> Tensor:
    """(rows, count) float64 in [0, 1). Each row r is a stream that depends on (seed, r) alone; a larger count only extends
    it. None takes the seed from torch's default generator."""
    if seed is None:
        seed = int(torch.randint(2**63 - 1, (1,)))
    check(SEED, seed=seed)
    streams = [np.random.default_rng([seed, row]).random(count) for row in range(rows)]
    return torch.from_numpy(np.stack(streams)) if rows else torch.empty(0, count, dtype=torch.float64)
