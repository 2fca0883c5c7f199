"""Which texts are likeliest as a whole? Beam search, with the scores and stopping rules of transformers' generate.

The score of a finished text is the sum of its tokens' log-probabilities, divided by length ** length_penalty.
The host does the bookkeeping and reads only a few numbers per beam.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from ..rules import NUMBER, SIZE, check
from .beam_steps import BeamSteps
from .sampling import no_token

# Added to the score of a forbidden choice, as in transformers. Comparisons then never meet infinity.
_NEVER = np.float32(-1.0e9)
# The score of an empty slot. A negative length_penalty brings the scores of texts far below _NEVER.
_NOTHING = np.float32(-np.inf)


@dataclass(frozen=True)
class BeamSearch:
    """The options of a search, and the search.

    num_beams: texts that are followed at a time. length_penalty: see the file's first lines; above 0 prefers long texts.
    early_stopping: True stops a search when num_beams texts have ended. False stops when, in addition, the best running text
    would score less at its present length than the worst of these. "never" with length_penalty > 0 compares at the longest
    possible length instead. num_return_sequences: how many of the texts are returned, best first.
    """

    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    num_return_sequences: int = 1

    def __post_init__(self) -> None:
        check(SIZE, num_beams=self.num_beams, num_return_sequences=self.num_return_sequences)
        if self.num_return_sequences > self.num_beams:
            raise ValueError(
                f"num_return_sequences is {self.num_return_sequences}; it takes at most num_beams = {self.num_beams}"
            )
        check(NUMBER, length_penalty=self.length_penalty)
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ValueError(f"early_stopping is {self.early_stopping!r}; it takes True, False or 'never'")
        if self.num_beams == 1 and (self.length_penalty != 1.0 or self.early_stopping is not False):
            raise ValueError(
                "length_penalty and early_stopping are for beams, and num_beams is 1; it takes at least 2"
            )

    def candidates(self, stops: int) -> int:
        """How many continuations to consider: enough that num_beams of them do not end in a stop token."""
        return max(2, 1 + stops) * self.num_beams

    def check_penalty(self, max_new_tokens: int) -> None:
        """Raises ValueError if length ** length_penalty leaves float32, the scores' dtype."""
        most = 30.0 / math.log10(max_new_tokens) if max_new_tokens > 1 else math.inf
        if abs(self.length_penalty) > most:
            raise ValueError(
                f"length_penalty is {self.length_penalty}; where max_new_tokens is {max_new_tokens} it takes "
                f"{-most:.3g} to {most:.3g}"
            )

    @torch.inference_mode()
    def run(
        self, steps: BeamSteps, prompts: list[np.ndarray], max_new_tokens: int, stops: frozenset[int]
    ) -> list[list[int]]:
        """The best num_return_sequences texts of each prompt, prompt after prompt, including stop tokens. steps: of num_beams
        beams and candidates(len(stops)) continuations."""
        texts = list(range(len(prompts)))
        found: list[list[list[int]]] = [[] for _ in prompts]
        state = _State(len(prompts), self.num_beams, max_new_tokens)
        over = np.zeros(len(texts), bool)  # texts that have ended and run on
        ends = np.array(sorted(stops), np.int64)
        best = steps.start(prompts, state.running)
        for t in range(max_new_tokens):
            if t:
                best = steps.next(state.tokens[:, :, t - 1], state.running)
            undefined = np.isnan(best.scores[:, 0]) & ~over
            if undefined.any():
                raise no_token(texts[int(undefined.argmax())], t, steps.dtype)
            is_last = t + 1 == max_new_tokens
            stopping = np.isin(best.tokens, ends) | is_last
            before = state.tokens
            rows = state.advance(t, *best, stopping, self)
            done = state.done(t + 1, max_new_tokens, self) | is_last
            for slot in np.flatnonzero(done & ~over):
                found[texts[slot]] = state.finished_texts(int(slot), self.num_return_sequences)
            over |= done
            if over.all():
                break
            steps.move(before, rows, t)
            alive = [int(slot) for slot in np.flatnonzero(~over)]
            if len(alive) < len(texts) and steps.keep(alive):
                state.keep(alive)
                texts, over = [texts[slot] for slot in alive], over[alive]
        return [tokens for of_prompt in found for tokens in of_prompt]


class _State:
    """The running and the finished texts of B prompts, K each, at most N tokens long. Scores are float32, as in
    transformers."""

    def __init__(self, batch: int, beams: int, longest: int):
        self.tokens = np.zeros((batch, beams, longest), np.int64)
        self.running = np.full((batch, beams), _NEVER)
        self.running[:, 0] = 0.0  # at first all beams are the same
        self.finished = np.full((batch, beams), _NOTHING)
        self.finished_tokens = self.tokens.copy()
        self.lengths = np.zeros((batch, beams), np.int64)
        self.is_finished = np.zeros((batch, beams), bool)

    def advance(self, t: int, best, origin, token, stopping, search: BeamSearch) -> np.ndarray:
        """Adds the candidates of step t, each (B, C) and best first: their scores, the beams they continue, their last
        tokens, and whether they end. Returns the beam that each running text continues, (B, K)."""
        beams = search.num_beams
        longer = np.take_along_axis(self.tokens, origin[:, :, None], 1)
        longer[:, :, t] = token
        running = best + stopping * _NEVER
        kept = np.argsort(-running, 1, kind="stable")[:, :beams]
        self.tokens = np.take_along_axis(longer, kept[:, :, None], 1)
        self.running = np.take_along_axis(running, kept, 1)

        # A candidate that ends counts only among the best K. The other candidates are there to keep K texts running.
        ends = stopping & (np.arange(best.shape[1]) < beams)
        scores = best / np.float32((t + 1) ** search.length_penalty)
        if search.early_stopping is True:
            ends = ends & ~self.is_finished.all(1, keepdims=True)
        scores = np.where(ends, scores, _NOTHING)
        merged = np.concatenate([self.finished, scores], 1)
        top = np.argsort(-merged, 1, kind="stable")[:, :beams]
        self.finished = np.take_along_axis(merged, top, 1)
        self.is_finished = np.take_along_axis(np.concatenate([self.is_finished, ends], 1), top, 1)
        lengths = np.concatenate([self.lengths, np.full(best.shape, t + 1)], 1)
        self.lengths = np.take_along_axis(lengths, top, 1)
        both = np.concatenate([self.finished_tokens, longer], 1)
        self.finished_tokens = np.take_along_axis(both, top[:, :, None], 1)
        return np.take_along_axis(origin, kept, 1)

    def done(self, length: int, longest: int, search: BeamSearch) -> np.ndarray:
        """(B,) bool: whether, by the stopping rule, no running text can still become one of the finished ones."""
        if search.early_stopping == "never" and search.length_penalty > 0.0:
            length = longest
        hoped = self.running[:, :1] / np.float32(length**search.length_penalty)
        worst = np.where(self.is_finished, self.finished.min(1, keepdims=True), _NOTHING)
        done = ~(hoped > worst).any(1)
        return done | self.is_finished.all(1) if search.early_stopping is True else done

    def finished_texts(self, slot: int, count: int) -> list[list[int]]:
        """The best texts of one prompt."""
        rows = zip(self.finished_tokens[slot, :count], self.lengths[slot])
        return [tokens[:length].tolist() for tokens, length in rows]

    def keep(self, slots: list[int]) -> None:
        """Forgets all other prompts."""
        for name, value in vars(self).items():
            setattr(self, name, value[slots])
