"""Which token comes next? Greedy, or drawn with a temperature from the top k, from the top p, or from all."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# What stands for a token where the logits choose none: NaN or inf among them, or nothing but -inf.
NO_TOKEN = -1

# Temperatures that float32 divides by, on every device: some multiply by the reciprocal, and some take subnormals for 0.
_COLDEST, _HOTTEST = 2.0**-126, 2.0**126


@dataclass(frozen=True)
class Sampler:
    """Logits to tokens: softmax(logits / temperature), cut to the top_k likeliest, of these to the smallest set that
    holds top_p of the probability (Holtzman et al. 2019, arXiv:1904.09751), drawn by inverting the cumulative sum.

    temperature 0, and one too small for float32, takes the likeliest token. None cuts nothing. Nothing here synchronises
    with a GPU.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature)
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it takes a finite number, at least 0")
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
        """logits (B, V), uniform (B,) float64 in [0, 1) -> tokens (B,) int64; NO_TOKEN where the logits choose none."""
        if self.temperature < _COLDEST:
            token = logits.argmax(-1, keepdim=True)  # NaN counts as the largest
            return _or_none(token, logits.gather(-1, token))
        top, likeliest = logits.max(-1, keepdim=True)
        # Less the maximum first: a tiny temperature then gives -inf, not inf - inf.
        scores = (logits.float() - top) / float(min(self.temperature, _HOTTEST))
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
            last = (((cumulative - probabilities) < self.top_p).sum(-1, keepdim=True) - 1).clamp_(min=0)  # for NaN
        total = cumulative.gather(-1, last)
        pick = torch.searchsorted(cumulative, uniform[:, None] * total, right=True).minimum(last)
        token = pick if order is None else order.gather(-1, pick)
        # A parallel sum may grow by rounding where a probability is 0.
        return _or_none(torch.where(probabilities.gather(-1, pick) > 0.0, token, likeliest), top)


def _or_none(token: Tensor, top: Tensor) -> Tensor:
    """tokens (B, 1) -> (B,), and NO_TOKEN where the largest logit, which is NaN if any of them is, says that there is none."""
    return token.masked_fill(~top.isfinite(), NO_TOKEN).squeeze(-1)


def no_token(row: int, step: int, dtype: torch.dtype) -> FloatingPointError:
    """What to raise where prompts[row] gets NO_TOKEN in place of its new token number `step`, counted from 0."""
    hint = "the model's weights or what it computes of them are not finite"
    if dtype == torch.float16:
        hint = "float16 ends at 65504; dtype='bfloat16' and 'float32' reach further"
    return FloatingPointError(f"the logits of new token {step} of prompts[{row}] choose none: they hold NaN or inf; {hint}")


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
