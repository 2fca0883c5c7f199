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
    """What a model knows about continuing a batch of texts: its caches, and where each row stands. B rows.

    Made as Decoding(model, shape, fixed) with a shape of `shape` or larger; `fixed` says that fixed_step is used.
    """

    def __init__(self, model: Any, shape: tuple[int, ...], fixed: bool = False): ...

    @staticmethod
    def shape(prompts: list[np.ndarray], max_new_tokens: int) -> tuple[int, ...]:
        """B, then what the buffers have room for."""

    @staticmethod
    def check_room(model: Any, prompts: list[np.ndarray], max_new_tokens: int) -> None:
        """Raises ValueError where the model takes no text so long."""

    def start(self, prompts: list[np.ndarray]) -> Tensor:
        """The logits of the first new token of each prompt, (B, V)."""

    def step(self, tokens: Tensor) -> Tensor:
        """Feeds a token to each row, (B,); the logits of the next, (B, V)."""

    def fixed_step(self, tokens: Tensor) -> Tensor:
        """As step, with shapes and places in memory that never change, and no look at the host: a CUDA graph's step."""

    @property
    def state(self) -> tuple[Tensor, ...]:
        """What a fixed_step moves on, beside the caches."""

    def branch(self, times: int) -> None:
        """Makes `times` rows, its beams, of each row."""

    def select(self, texts: list[int]) -> None:
        """Keeps these texts alone, with all their beams."""

    def reorder(self, rows: list[int], new: int, first: int) -> None:
        """Row i goes on as row rows[i], a beam of the same text. new: how many new tokens each row has been fed; before
        the first of them at index `first`, row i was equal to row rows[i] all along."""


def decoding_of(model: Backbone) -> type[Decoding]:
    """Raises TypeError for a model that generates nothing, ValueError for a T5 that is the encoder alone."""
    for family in families_of(type(model)):
        if family.decoding is not None:
            model.check_decoder("generation")
            return load(family.decoding)  # type: ignore[no-any-return]
    classes = [family.class_name for family in FAMILIES.values() if family.decoding is not None]
    raise TypeError(f"model is a {type(model).__name__}; it takes a {' or a '.join(classes)}")


class Steps(Protocol):
    """Tokens instead of logits. B counts the slots, the rows that are computed."""

    def start(self, prompts: list[np.ndarray], uniform: Tensor) -> Tensor:
        """Prefill; the first new token of each prompt, (B,)."""

    def next(self, uniform: Tensor) -> Tensor:
        """Feeds the last tokens; the next ones, (B,)."""

    def keep(self, slots: list[int]) -> bool:
        """Drops all other slots and returns True, or returns False: they run on."""


class EagerSteps:
    """Reads exactly as many keys as there are. Stopped rows are dropped."""

    def __init__(self, decoding: Decoding, sampler: Sampler):
        self._decoding, self._sampler = decoding, sampler

    def start(self, prompts: list[np.ndarray], uniform: Tensor) -> Tensor:
        self._tokens = self._sampler(self._decoding.start(prompts), uniform)
        return self._tokens

    def next(self, uniform: Tensor) -> Tensor:
        self._tokens = self._sampler(self._decoding.step(self._tokens), uniform)
        return self._tokens

    def keep(self, slots: list[int]) -> bool:
        self._decoding.select(slots)
        self._tokens = self._tokens[torch.tensor(slots, device=self._tokens.device)]
        return True


class GraphSteps:
    """One step as a CUDA graph, replayed: no launch overhead, no synchronisation. Tokens, positions, caches and draws
    stay where they are; attention reads the whole capacity and masks what a row has not reached."""

    def __init__(self, model: Backbone, shape: tuple[int, ...], sampler: Sampler):
        self._sampler, self._device = sampler, model.device
        self.made_for = self.key(model, shape, sampler)
        self._decoding = decoding_of(model)(model, _rounded(shape), fixed=True)
        self._tokens = torch.zeros(shape[0], dtype=torch.int64, device=self._device)
        self._uniform = torch.zeros(shape[0], dtype=torch.float64, device=self._device)
        self._graph: torch.cuda.CUDAGraph | None = None

    @staticmethod
    def key(model: Backbone, shape: tuple[int, ...], sampler: Sampler) -> object:
        """What a captured graph depends on: shapes, sampling, where the weights lie and as what, and a forced backend."""
        weights = tuple((p.data_ptr(), p.dtype) for p in model.parameters())
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
        """Warms up on a side stream, as capturing asks for, puts back the state that this moved, and captures.
        What the warm-up wrote into the cache lies at positions that the replayed steps write again."""
        state = (self._tokens, *self._decoding.state)
        before = [t.clone() for t in state]

        def restore() -> None:
            for t, was in zip(state, before):
                t.copy_(was)

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):  # torch captures on the current one, which need not be the model's
            side, current = torch.cuda.Stream(), torch.cuda.current_stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(2):
                    self._step()
                    restore()
            current.wait_stream(side)
            # What other threads do on the GPU meanwhile is no part of the graph, and no error.
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                self._step()
        return graph

    def _step(self) -> None:
        fed = self._tokens.clamp(min=0)  # NO_TOKEN is seen when the host looks; the graph may run on until then
        self._tokens.copy_(self._sampler(self._decoding.fixed_step(fed), self._uniform))

    def keep(self, slots: list[int]) -> bool:
        return False


def _rounded(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Prompts of similar length share a graph."""
    return shape[0], *(-(-size // 64) * 64 for size in shape[1:])
