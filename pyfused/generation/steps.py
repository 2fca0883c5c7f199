"""How does one generation step run? Operator by operator with exact lengths, or as a CUDA graph with fixed shapes."""

from __future__ import annotations

import threading
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .. import dispatch
from ..families import FAMILIES, families_of, load
from ..models.backbone import Backbone
from .sampling import Sampler

_CAPTURING = threading.Lock()  # all captures share one stream


class Decoding(Protocol):
    """How a model continues a batch of B texts. It holds the caches and each row's position.

    The argument `shape` is the result of `shape()`, or larger. fixed=True means that the caller uses fixed_step.
    """

    def __init__(self, model: Any, shape: tuple[int, ...], fixed: bool = False): ...

    @staticmethod
    def shape(prompts: list[np.ndarray], max_new_tokens: int) -> tuple[int, ...]:
        """B, then the sizes of the buffers."""

    @staticmethod
    def check_room(model: Any, prompts: list[np.ndarray], max_new_tokens: int) -> None:
        """Raises ValueError if a text would be too long for the model."""

    def start(self, prompts: list[np.ndarray]) -> Tensor:
        """The logits of the first new token of each prompt, (B, V)."""

    def step(self, tokens: Tensor, choose: bool = False) -> Tensor:
        """Feeds one token to each row, (B,), and returns the next logits, (B, V). With `choose` it returns the likeliest next
        tokens (B,), or NO_TOKEN."""

    def begin(self) -> None:
        """Makes all rows empty, for admit(). It takes the place of start()."""

    def admit(self, row: int, prompt: np.ndarray) -> int:
        """Puts a text into a row, in place of the one before. Returns the first token to feed to it."""

    def fixed_step(self, tokens: Tensor) -> Tensor:
        """As step, for a CUDA graph: shapes and addresses never change, and the host reads nothing."""

    @property
    def state(self) -> tuple[Tensor, ...]:
        """The tensors that a fixed_step changes, beside the caches."""

    def branch(self, times: int) -> None:
        """Turns each row into `times` rows, its beams."""

    def select(self, texts: list[int]) -> None:
        """Keeps only these texts, with all their beams."""

    def reorder(self, rows: list[int], new: int, first: int) -> None:
        """Row i continues as row rows[i], a beam of the same text. new: how many new tokens each row has been fed. first: the
        rows are equal before the new token with this index."""


def decoding_of(model: Backbone) -> type[Decoding]:
    """The model's Decoding. Raises TypeError for a model that cannot generate, ValueError for a T5 encoder alone."""
    for family in families_of(type(model)):
        if family.decoding is not None:
            model.check_decoder("generation")
            return load(family.decoding)  # type: ignore[no-any-return]
    classes = [family.class_name for family in FAMILIES.values() if family.decoding is not None]
    raise TypeError(f"model is a {type(model).__name__}; it takes a {' or a '.join(classes)}")


class Steps(Protocol):
    """Like Decoding, with tokens instead of logits. B counts the slots, the rows that are computed."""

    def start(self, prompts: list[np.ndarray], uniform: Tensor) -> Tensor:
        """Prefills and returns the first new token of each prompt, (B,)."""

    def next(self, uniform: Tensor) -> Tensor:
        """Feeds the last tokens and returns the next, (B,)."""

    def keep(self, slots: list[int]) -> bool:
        """Drops all other slots and returns True, or returns False if they run on."""


class EagerSteps:
    """Runs operator by operator. It reads only the keys that exist, and drops stopped rows."""

    def __init__(self, decoding: Decoding, sampler: Sampler):
        self._decoding, self._sampler = decoding, sampler

    def start(self, prompts: list[np.ndarray], uniform: Tensor) -> Tensor:
        self._tokens = self._sampler(self._decoding.start(prompts), uniform)
        return self._tokens

    def next(self, uniform: Tensor) -> Tensor:
        if self._sampler.is_greedy:
            self._tokens = self._decoding.step(self._tokens, choose=True)
        else:
            self._tokens = self._sampler(self._decoding.step(self._tokens), uniform)
        return self._tokens

    def keep(self, slots: list[int]) -> bool:
        self._decoding.select(slots)
        self._tokens = self._tokens[torch.tensor(slots, device=self._tokens.device)]
        return True


class GraphSteps:
    """Replays one step as a CUDA graph: no launch overhead, no synchronisation. Tokens, positions, caches and draws keep
    their addresses. Attention reads the whole capacity and masks the places that a row has not reached."""

    def __init__(self, model: Backbone, shape: tuple[int, ...], sampler: Sampler):
        self._sampler, self._device = sampler, model.device
        self.made_for = self.key(model, shape, sampler)
        self._decoding = decoding_of(model)(model, _rounded(shape), fixed=True)
        self._tokens = torch.zeros(shape[0], dtype=torch.int64, device=self._device)
        self._uniform = torch.zeros(shape[0], dtype=torch.float64, device=self._device)
        self._graph: torch.cuda.CUDAGraph | None = None

    @staticmethod
    def key(model: Backbone, shape: tuple[int, ...], sampler: Sampler) -> object:
        """A captured graph depends on these: shapes, sampling, the weights' addresses and dtypes, a forced backend."""
        weights = tuple((p.data_ptr(), p.dtype) for p in (*model.parameters(), *model.buffers()))
        return _rounded(shape), sampler, weights, dispatch._forced.get()

    def start(self, prompts: list[np.ndarray], uniform: Tensor) -> Tensor:
        self._tokens.copy_(self._sampler(self._decoding.start(prompts), uniform))
        return self._tokens

    def next(self, uniform: Tensor) -> Tensor:
        self._uniform.copy_(uniform)
        if self._graph is None:
            with _CAPTURING:
                self._graph = self._capture()
        self._graph.replay()
        return self._tokens

    def _capture(self) -> torch.cuda.CUDAGraph:
        """Warms up on a side stream, as capturing requires, restores the state, and captures. The replayed steps overwrite
        the warm-up's cache entries."""
        state = (self._tokens, *self._decoding.state)
        before = [t.clone() for t in state]

        def restore() -> None:
            for t, was in zip(state, before):
                t.copy_(was)

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):  # torch captures on the current device, which may not be the model's
            side, current = torch.cuda.Stream(), torch.cuda.current_stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(2):
                    self._step()
                    restore()
            current.wait_stream(side)
            # Other threads may use the GPU meanwhile; that is no error and not part of the graph.
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                self._step()
        return graph

    def _step(self) -> None:
        fed = self._tokens.clamp(min=0)  # the host checks for NO_TOKEN later; until then the graph needs a valid id
        self._tokens.copy_(self._sampler(self._decoding.fixed_step(fed), self._uniform))

    def keep(self, slots: list[int]) -> bool:
        return False


def _rounded(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes rounded up to multiples of 64, so that prompts of similar length share a graph."""
    return shape[0], *(-(-size // 64) * 64 for size in shape[1:])
