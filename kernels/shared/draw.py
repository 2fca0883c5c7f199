"""Which token comes next? The likeliest, or one drawn from a softmax: what decode's kernels and the generator compute alike."""

from __future__ import annotations

import torch
from torch import Tensor

# Replaces a token if the logits choose none: they hold NaN or inf, or only -inf.
NO_TOKEN = -1


def likeliest_token(logits: Tensor) -> Tensor:
    """logits (B, V) -> the first of the largest, (B,) int64; NO_TOKEN where the largest is not finite."""
    token = logits.argmax(-1, keepdim=True)  # NaN counts as the largest
    return _or_none(token, logits.gather(-1, token))


def drawn_token(logits: Tensor, uniform: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """logits (B, V), uniform (B,) float64 in [0, 1) -> tokens (B,) int64; NO_TOKEN where the largest logit is not finite.

    softmax(logits / temperature), cut to the top_k likeliest tokens, 0 for all, then to the smallest set that holds top_p of
    the probability. The draw inverts the cumulative sum: from the likeliest token if there is a cut, and equal ones in their
    order; else from token 0. The temperature is one that float32 can divide by.
    """
    top, likeliest = logits.max(-1, keepdim=True)
    # Subtract the maximum before dividing: a tiny temperature then gives -inf, not inf - inf. No score is -0.
    scores = (logits.float() - top) / temperature + 0.0
    order = None
    if 0 < top_k < scores.shape[-1]:
        order = _keys(scores).topk(top_k).indices
        scores = scores.gather(-1, order)
    elif top_p < 1.0:
        scores, order = scores.sort(descending=True, stable=True)
    probabilities = torch.softmax(scores, -1, dtype=torch.float64)
    cumulative = probabilities.cumsum(-1)
    last = torch.full_like(cumulative[:, :1], cumulative.shape[-1] - 1, dtype=torch.int64)
    if order is not None and top_p < 1.0:
        # A token stays if the tokens before it hold less than top_p. The first always stays.
        last = (((cumulative - probabilities) < top_p).sum(-1, keepdim=True) - 1).clamp_(min=0)  # for NaN
    total = cumulative.gather(-1, last)
    pick = torch.searchsorted(cumulative, uniform[:, None] * total, right=True).minimum(last)
    token = pick if order is None else order.gather(-1, pick)
    # In a parallel sum rounding may add to the total at a token of probability 0, and the draw may pick it.
    return _or_none(torch.where(probabilities.gather(-1, pick) > 0.0, token, likeliest), top)


def _keys(scores: Tensor) -> Tensor:
    """int64 numbers in the order of the scores; of equal scores the first is the largest. So topk has one answer."""
    bits = scores.view(torch.int32)
    rising = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    return (rising << 32) - torch.arange(scores.shape[-1], device=scores.device)


def _or_none(token: Tensor, top: Tensor) -> Tensor:
    """tokens (B, 1) -> (B,), with NO_TOKEN where the largest logit is not finite. It is NaN if any logit is."""
    return token.masked_fill(~top.isfinite(), NO_TOKEN).squeeze(-1)
