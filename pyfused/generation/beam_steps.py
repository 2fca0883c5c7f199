"""How does one step of a beam search run? Operator by operator with exact lengths, or as a CUDA graph with fixed shapes.

A step feeds the beams' last tokens and gives the best continuations: scores, the beams they continue, and tokens.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from .. import dispatch
from ..models.backbone import Backbone
from .steps import Captured, Decoding, decoding_of, rounded, weights_of


class Best(NamedTuple):
    """The best continuations of B texts, best first, each array (B, C)."""

    scores: np.ndarray  # float32, NaN first
    origins: np.ndarray  # the beam that it continues
    tokens: np.ndarray


class BeamSteps(Protocol):
    """Like Steps, for K beams of each text. `running` (B, K) float32 are the scores of the beams so far."""

    dtype: torch.dtype  # of the logits

    def start(self, prompts: list[np.ndarray], running: np.ndarray) -> Best:
        """Prefills. All beams of a text are the same then."""

    def move(self, before: np.ndarray, rows: np.ndarray, new: int) -> None:
        """Lets beam k of a text continue beam rows[text, k], (B, K). before (B, K, N): the tokens fed so far, `new` of them."""

    def keep(self, texts: list[int]) -> bool:
        """Drops all other texts and returns True, or returns False if they run on."""

    def next(self, tokens: np.ndarray, running: np.ndarray) -> Best:
        """Feeds tokens (B, K), after move()."""


def _best(logits: Tensor, running: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """logits (B K, V), running (B, K) -> scores and places in K V of the best, (B, width)."""
    scores = torch.log_softmax(logits, -1, dtype=torch.float32).unflatten(0, running.shape)
    best = (scores + running[:, :, None]).flatten(1).topk(width)  # NaN comes first
    return best.values, best.indices


def _on_host(scores: Tensor, places: Tensor, vocabulary: int) -> Best:
    return Best(scores.cpu().numpy(), *np.divmod(places.cpu().numpy(), vocabulary))


class EagerBeams:
    """Runs operator by operator. It reads and reorders only the keys that exist, and drops finished texts."""

    dtype: torch.dtype

    def __init__(self, decoding: Decoding, beams: int, width: int):
        self._decoding, self._beams, self._width = decoding, beams, width

    def start(self, prompts: list[np.ndarray], running: np.ndarray) -> Best:
        logits = self._decoding.start(prompts)
        self.dtype, self._device = logits.dtype, logits.device
        self._decoding.branch(self._beams)
        return self._of(logits.repeat_interleave(self._beams, 0), running)

    def _of(self, logits: Tensor, running: np.ndarray) -> Best:
        found = _best(logits, torch.from_numpy(running).to(self._device), self._width)
        return _on_host(*found, logits.shape[-1])

    def move(self, before: np.ndarray, rows: np.ndarray, new: int) -> None:
        beams = self._beams
        moved = rows != np.arange(beams)
        if not moved.any():
            return
        was = np.take_along_axis(before, rows[:, :, None], 1)
        differs = (was[moved] != before[moved])[:, :new]
        first = int(differs.any(0).argmax()) if differs.any() else new
        self._decoding.reorder(_flat(rows).tolist(), new, first)

    def keep(self, texts: list[int]) -> bool:
        self._decoding.select(texts)
        return True

    def next(self, tokens: np.ndarray, running: np.ndarray) -> Best:
        return self._of(self._decoding.step(torch.from_numpy(tokens.ravel()).to(self._device)), running)


class GraphBeams(Captured):
    """Replays one step as a CUDA graph: it reorders the caches, feeds the tokens and finds the best continuations. The host
    writes three small tensors and reads two. Texts that have ended run on."""

    def __init__(self, model: Backbone, shape: tuple[int, ...], shared: int, beams: int, width: int):
        """shape: as the Decoding's, for the texts. shared: places of the cache that no beam changes."""
        super().__init__(model.device)
        self.made_for = self.key(model, shape, shared, beams, width)
        self.dtype, self._width = model.dtype, width
        self._decoding = decoding_of(model)(model, rounded(shape), fixed=True, beams=beams)
        self._first = _rounded_down(shared)
        texts, device = shape[0], model.device
        self._as_they_are = torch.arange(texts * beams, device=device)
        self._rows = self._as_they_are.clone()
        self._tokens = torch.zeros(texts * beams, dtype=torch.int64, device=device)
        self._running = torch.zeros(texts, beams, device=device)
        self._scores = torch.zeros(texts, width, device=device)
        self._places = torch.zeros(texts, width, dtype=torch.int64, device=device)
        self._vocabulary = model.get_config()["vocabulary_size"]

    @staticmethod
    def key(model: Backbone, shape: tuple[int, ...], shared: int, beams: int, width: int) -> object:
        """As GraphSteps.key."""
        of_search = "beams", _rounded_down(shared), beams, width
        return rounded(shape), of_search, weights_of(model), dispatch._forced.get()

    def start(self, prompts: list[np.ndarray], running: np.ndarray) -> Best:
        self._running.copy_(torch.from_numpy(running))
        self._found(self._decoding.start(prompts))
        self._rows.copy_(self._as_they_are)
        return _on_host(self._scores, self._places, self._vocabulary)

    def move(self, before: np.ndarray, rows: np.ndarray, new: int) -> None:
        self._moved = torch.from_numpy(_flat(rows))

    def keep(self, texts: list[int]) -> bool:
        return False

    def next(self, tokens: np.ndarray, running: np.ndarray) -> Best:
        self._tokens.copy_(torch.from_numpy(tokens.ravel()))
        self._running.copy_(torch.from_numpy(running))
        self._rows.copy_(self._as_they_are)  # a capture's warm-up runs the step, and must not reorder
        self._prepare()
        self._rows.copy_(self._moved)
        self._replay()
        return _on_host(self._scores, self._places, self._vocabulary)

    @property
    def _state(self) -> tuple[Tensor, ...]:
        return self._decoding.state

    def _step(self) -> None:
        self._decoding.fixed_reorder(self._rows, self._first)
        self._found(self._decoding.fixed_step(self._tokens))

    def _found(self, logits: Tensor) -> None:
        scores, places = _best(logits, self._running, self._width)
        self._scores.copy_(scores)
        self._places.copy_(places)


def _flat(rows: np.ndarray) -> np.ndarray:
    """Beams of each text (B, K) -> rows of the model (B K,)."""
    return (rows + np.arange(len(rows))[:, None] * rows.shape[1]).ravel()


def _rounded_down(shared: int) -> int:
    """To a multiple of 64, so that prompts of similar length share a graph."""
    return shared // 64 * 64
