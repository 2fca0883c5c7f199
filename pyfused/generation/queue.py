"""How are many prompts answered with few rows? A row that ends takes the next prompt, so no row computes for nothing."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .sampling import NO_TOKEN, Choice, Draws, Sampler, no_token


@torch.inference_mode()
def run_queue(
    decoding: Any,
    prompts: list[np.ndarray],
    rows: int,
    count: int,
    sampler: Sampler,
    draws: Draws,
    stops: frozenset[int],
    on_token: Callable[[int, int], None] | None,
) -> list[list[int]]:
    """At most `count` new tokens of each prompt. decoding: a Decoding of `rows` rows. draws: a row for each prompt."""
    waiting = deque(range(len(prompts)))
    out: list[list[int]] = [[] for _ in prompts]
    decoding.begin()
    device = decoding.model.device
    texts = [waiting.popleft() for _ in range(rows)]  # the prompt in each row
    tokens = torch.tensor([decoding.admit(row, prompts[text]) for row, text in enumerate(texts)], device=device)
    while texts:
        choose = sampler.is_greedy or Choice(sampler, draws.next_of(texts))
        tokens = decoding.step(tokens, choose)
        ended = []
        for row, (text, token) in enumerate(zip(texts, tokens.tolist())):
            if token == NO_TOKEN:
                raise no_token(text, len(out[text]), decoding.model.dtype)
            out[text].append(token)
            if on_token is not None:
                on_token(text, token)
            if token in stops or len(out[text]) == count:
                ended.append(row)
        for row in ended[: len(waiting)]:
            texts[row] = waiting.popleft()
            tokens[row] = decoding.admit(row, prompts[texts[row]])
            ended.remove(row)
        if ended:
            alive = [row for row in range(len(texts)) if row not in ended]
            texts, tokens = [texts[row] for row in alive], tokens[alive]
            if alive:
                decoding.select(alive)
    return out
