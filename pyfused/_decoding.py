"""How does one generation step run? Operator by operator with exact lengths, or as a CUDA graph with fixed shapes."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from . import dispatch
from .models._gpt2_step import BoundStep, bindable
from .models.gpt2 import Call, GPT2Backbone
from .nn import CAUSAL, Visibility
from .sampling import Sampler


class Steps(Protocol):
    """Both ways. B counts the slots, the rows that are computed."""

    def start(self, prompts: list[np.ndarray], uniform: Tensor) -> Tensor:
        """Prefill; the first new token of each prompt, (B,)."""

    def next(self, uniform: Tensor) -> Tensor:
        """Feeds the last tokens; the next ones, (B,)."""

    def keep(self, slots: list[int]) -> bool:
        """Drops all other slots and returns True, or returns False: they run on."""


def prefill(model: GPT2Backbone, cache, prompts: list[np.ndarray]) -> Tensor:
    """Fills the cache; the logits behind each prompt, (B, V).

    Prompts are padded on the right: under a causal mask no real token sees the padding, so that no mask is needed, and
    the padding's keys are overwritten, or masked, in the steps that follow.
    """
    lengths = [len(p) for p in prompts]
    longest = max(lengths)
    ids = np.zeros((len(prompts), longest), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
    device = model.device
    positions = torch.arange(longest, device=device)
    call = Call(torch.from_numpy(ids).to(device), positions, visible=CAUSAL, cache=cache)
    last = torch.tensor(lengths, device=device) - 1
    return model.token_embedding(model.run(call, last), reverse=True)


class EagerSteps:
    """Reads exactly as many keys as there are; rows of one length need no mask. Stopped rows are dropped."""

    def __init__(self, model: GPT2Backbone, batch_size: int, capacity: int, sampler: Sampler):
        self._model, self._sampler = model, sampler
        self._cache = model.new_cache(batch_size, capacity)
        self._places = torch.arange(capacity, device=model.device)
        self._lengths: list[int] = []
        self._bound = BoundStep(model) if bindable(model) else None

    def start(self, prompts: list[np.ndarray], uniform: Tensor) -> Tensor:
        self._lengths = [len(p) for p in prompts]
        self._tokens = self._sampler(prefill(self._model, self._cache, prompts), uniform)
        self._settle()
        return self._tokens

    def _settle(self) -> None:
        """Rows of one length share a position; others get a position each."""
        if len(set(self._lengths)) == 1:
            self._cache.positions, self._cache.length = None, self._lengths[0]
        else:
            self._cache.at_positions(torch.tensor(self._lengths, device=self._places.device), max(self._lengths) + 1)

    def next(self, uniform: Tensor) -> Tensor:
        cache, mask = self._cache, None
        if cache.positions is None:
            position_ids = self._places.narrow(0, cache.length, 1)
        else:
            extent = max(self._lengths) + 1
            cache.at_positions(cache.positions, extent)
            mask = self._places[:extent] <= cache.positions[:, None]
            position_ids = cache.positions[:, None]
        if self._bound is not None:
            logits = self._bound(self._tokens[:, None], position_ids, cache, mask)
        else:
            call = Call(self._tokens[:, None], position_ids, visible=Visibility(padding_mask=mask), cache=cache)
            logits = self._model.token_embedding(self._model.run(call)[:, 0], reverse=True)
        if cache.positions is None:
            cache.length += 1
        else:
            cache.positions += 1
        self._lengths = [n + 1 for n in self._lengths]
        self._tokens = self._sampler(logits, uniform)
        return self._tokens

    def keep(self, slots: list[int]) -> bool:
        rows = torch.tensor(slots, device=self._places.device)
        self._cache.select(rows)
        self._tokens = self._tokens[rows]
        self._lengths = [self._lengths[slot] for slot in slots]
        self._settle()
        return True


class GraphSteps:
    """One step as a CUDA graph, replayed: no launch overhead, no synchronisation. Tokens, positions, cache and draws
    stay where they are; attention reads the whole capacity and masks what a row has not reached."""

    def __init__(self, model: GPT2Backbone, batch_size: int, capacity: int, sampler: Sampler):
        self._model, self._sampler = model, sampler
        capacity = _rounded(capacity)
        self._cache = model.new_cache(batch_size, capacity)
        self._places = torch.arange(capacity, device=model.device)
        self._tokens = torch.zeros(batch_size, dtype=torch.int64, device=model.device)
        self._positions = torch.zeros(batch_size, dtype=torch.int64, device=model.device)
        self._uniform = torch.zeros(batch_size, dtype=torch.float64, device=model.device)
        self._cache.at_positions(self._positions, capacity)
        self._graph: torch.cuda.CUDAGraph | None = None

    @staticmethod
    def key(model: GPT2Backbone, batch_size: int, capacity: int, sampler: Sampler) -> object:
        """What a captured graph depends on: shapes, sampling, where the weights lie, and a forced backend."""
        weights = tuple(p.data_ptr() for p in model.parameters())
        return batch_size, _rounded(capacity), sampler, weights, dispatch._forced.get()

    def start(self, prompts: list[np.ndarray], uniform: Tensor) -> Tensor:
        self._cache.positions, self._cache.length = None, 0
        logits = prefill(self._model, self._cache, prompts)
        self._cache.positions = self._positions
        self._tokens.copy_(self._sampler(logits, uniform))
        self._positions.copy_(torch.tensor([len(p) for p in prompts]))
        return self._tokens

    def next(self, uniform: Tensor) -> Tensor:
        self._uniform.copy_(uniform)
        if self._graph is None:
            self._graph = self._capture()
        self._graph.replay()
        return self._tokens

    def _capture(self) -> torch.cuda.CUDAGraph:
        """Warms up on a side stream, as capturing asks for, puts back the state that this moved, and captures.
        What the warm-up wrote into the cache lies at positions that the replayed steps write again."""
        state = (self._tokens, self._positions)
        before = [t.clone() for t in state]

        def restore() -> None:
            for t, was in zip(state, before):
                t.copy_(was)

        side = torch.cuda.Stream(self._model.device)
        side.wait_stream(torch.cuda.current_stream(self._model.device))
        with torch.cuda.stream(side):
            for _ in range(2):
                self._step()
                restore()
        torch.cuda.current_stream(self._model.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        return graph

    def _step(self) -> None:
        visible = Visibility(padding_mask=self._places <= self._positions[:, None])
        call = Call(self._tokens[:, None], self._positions[:, None], visible=visible, cache=self._cache)
        hidden = self._model.run(call)[:, 0]
        self._tokens.copy_(self._sampler(self._model.token_embedding(hidden, reverse=True), self._uniform))
        self._positions += 1

    def keep(self, slots: list[int]) -> bool:
        return False


def _rounded(capacity: int) -> int:
    """Prompts of similar length share a graph."""
    return -(-capacity // 64) * 64
