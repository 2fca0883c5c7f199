"""Which token comes next? Greedy, or drawn with a temperature from the top k, from the top p, or from all."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampler:
    """Logits to tokens: softmax(logits / temperature), cut to the top_k likeliest, of these to the smallest set that
    holds top_p of the probability (Holtzman et al. 2019, arXiv:1904.09751), drawn by inverting the cumulative sum.

    temperature 0 takes the likeliest token. None cuts nothing. Nothing here synchronises with a GPU.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature)
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it takes at least 0")
        if self.top_k is not None:
            if isinstance(self.top_k, bool) or not isinstance(self.top_k, int):
                raise TypeError(f"top_k is {self.top_k!r}; it takes an int or None")
            if self.top_k < 1:
                raise ValueError(f"top_k is {self.top_k}; it takes at least 1")
        if self.top_p is not None:
            _check_number("top_p", self.top_p)
            if not 0.0 < self.top_p <= 1.0:
                raise ValueError(f"top_p is {self.top_p}; it takes 0 < top_p <= 1")

    def __call__(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """logits (B, V), uniform (B,) float64 in [0, 1) -> tokens (B,) int64."""
        if self.temperature == 0.0:
            return logits.argmax(-1)
        # Less the maximum first: a tiny temperature then gives -inf, not inf - inf.
        scores = (logits.float() - logits.amax(-1, keepdim=True)) / self.temperature
        order = None
        if self.top_k is not None and self.top_k < scores.shape[-1]:
            scores, order = scores.topk(self.top_k)
        elif self.top_p is not None and self.top_p < 1.0:
            scores, order = scores.sort(descending=True)
        probabilities = torch.softmax(scores, -1, dtype=torch.float64)
        cumulative = probabilities.cumsum(-1)
        last = torch.full_like(cumulative[:, :1], cumulative.shape[-1] - 1, dtype=torch.int64)
        if order is not None and self.top_p is not None:
            # A token stays as long as those before it hold less than top_p; the first one always does.
            last = ((cumulative - probabilities) < self.top_p).sum(-1, keepdim=True) - 1
        total = cumulative.gather(-1, last)
        pick = torch.searchsorted(cumulative, uniform[:, None] * total, right=True).minimum(last)
        return (pick if order is None else order.gather(-1, pick)).squeeze(-1)


def uniforms(seed: int | None, rows: int, count: int) -> Tensor:
    """(rows, count) float64 in [0, 1): row r is a stream of its own, decided by (seed, r), of which a longer count only
    shows more. None takes the seed from torch's default generator."""
    if seed is None:
        seed = int(torch.randint(2**63 - 1, (1,)))
    elif isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed is {seed!r}; it takes an int or None")
    elif seed < 0:
        raise ValueError(f"seed is {seed}; it takes at least 0")
    streams = [np.random.default_rng([seed, row]).random(count) for row in range(rows)]
    return torch.from_numpy(np.stack(streams)) if rows else torch.empty(0, count, dtype=torch.float64)


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}; it takes a number")
