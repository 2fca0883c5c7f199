"""Which token comes next? The likeliest, or one drawn with a temperature from the top k, the top p, or all."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..kernels.shared.draw import NO_TOKEN, drawn_token, likeliest_token
from ..rules import SEED, Rule, check, check_cuts

__all__ = ["NO_TOKEN", "Choice", "Draws", "Sampler", "likeliest_token", "no_token"]

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


_BLOCK = 256  # steps whose numbers are made at a time: a large limit of steps costs no memory


class Draws:
    """Numbers of [0, 1), float64. Each row r is a stream that depends on (seed, r) alone. Without a seed torch's default
    generator gives one. A sampler that draws nothing gets zeros."""

    def __init__(self, seed: int | None, rows: int, sampler: Sampler, device: torch.device):
        if seed is None:
            seed = int(torch.randint(2**63 - 1, (1,), device="cpu"))
        check(SEED, seed=seed)
        self._streams = [] if sampler.is_greedy else [np.random.default_rng([seed, row]) for row in range(rows)]
        self._block, self._next = torch.zeros(rows, 0, dtype=torch.float64, device=device), 0
        self._zeros = torch.zeros(rows, dtype=torch.float64, device=device)

    def next(self) -> Tensor:
        """The next number of each row, (rows,)."""
        if not self._streams:
            return self._zeros
        if self._next == self._block.shape[1]:
            block = np.stack([stream.random(_BLOCK) for stream in self._streams])
            self._block, self._next = torch.from_numpy(block).to(self._zeros.device), 0
        self._next += 1
        return self._block[:, self._next - 1]

    def next_of(self, rows: list[int]) -> Tensor:
        """The next number of each of these rows, (len(rows),). Nobody calls next() too."""
        numbers = [self._streams[row].random() for row in rows]
        return torch.tensor(numbers, dtype=torch.float64, device=self._zeros.device)

    def keep(self, rows: list[int]) -> None:
        """Drops all other rows."""
        self._block, self._zeros = self._block[rows], self._zeros[rows]
        self._streams = [self._streams[row] for row in rows] if self._streams else []
