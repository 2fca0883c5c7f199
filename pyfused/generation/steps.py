"""How does one generation step run? Operator by operator with exact lengths, or as a CUDA graph with fixed shapes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .. import dispatch
from ..families import FAMILIES, families_of, load
from ..models.backbone import Backbone
from ..rules import its_kind
from .sampling import Choice, Sampler

MOST_CAPTURED = 8192  # places of a row's cache: a captured step holds and reads them all, filled or not
_CAPTURING = threading.Lock()  # all captures share one stream


class Decoding(Protocol):
    """How a model continues a batch of B texts. It holds the caches and each row's position.

    The argument `shape` is the result of `shape()`, or larger. fixed=True means that the caller uses fixed_step.
    """

    def __init__(self, model: Any, shape: tuple[int, ...], fixed: bool = False, beams: int = 1):
        """beams: rows for each text, with `fixed`."""

    @staticmethod
    def shape(prompts: list[np.ndarray], max_new_tokens: int) -> tuple[int, ...]:
        """B, then the sizes of the buffers."""

    @staticmethod
    def check_room(model: Any, prompts: list[np.ndarray], max_new_tokens: int) -> None:
        """Raises ValueError if a text would be too long for the model."""

    @staticmethod
    def shared(prompts: list[np.ndarray]) -> int:
        """How many places at the front of the cache are the same for all beams of a text, whatever they choose."""

    def start(self, prompts: list[np.ndarray]) -> Tensor:
        """The logits of the first new token of each prompt, (B, V). With beams, of each beam."""

    def step(self, tokens: Tensor, choose: bool | Choice = False) -> Tensor:
        """Feeds one token to each row, (B,), and returns the next logits, (B, V). With True it returns the likeliest next
        tokens (B,), with a Choice those that it chooses, or NO_TOKEN."""

    def begin(self) -> None:
        """Makes all rows empty, for admit(). It takes the place of start()."""

    def admit(self, row: int, prompt: np.ndarray) -> int:
        """Puts a text into a row, in place of the one before. Returns the first token to feed to it."""

    def fixed_step(self, tokens: Tensor, choose: bool | Choice = False) -> Tensor:
        """As step, for a CUDA graph: shapes and addresses never change, and the host reads nothing."""

    @property
    def state(self) -> tuple[Tensor, ...]:
        """The tensors that a fixed_step changes, beside the caches."""

    def branch(self, times: int) -> None:
        """Turns each row into `times` rows, its beams."""

    def select(self, texts: list[int]) -> None:
        """Keeps only these texts, with all their beams."""

    def fixed_reorder(self, rows: Tensor, first: int) -> None:
        """Row i continues as row rows[i], for a CUDA graph. first: the rows are equal before this place of the cache."""

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
    raise TypeError(f"model is {its_kind(model)}; it takes a {' or a '.join(classes)}")


class Steps(Protocol):
    """Like Decoding, with tokens instead of logits. B counts the slots, the rows that are computed."""

    def start(self, prompts: list[np.ndarray], uniform: Tensor) -> Tensor:
        """Prefills and returns the first new token of each prompt, (B,)."""

    def next(self, uniform: Tensor) -> Tensor:
        """Feeds the last tokens and returns the next, (B,)."""

    runs_ahead: bool  # whether the host should start the next step before it reads these tokens

    def read(self, tokens: Tensor) -> Callable[[], list[int]]:
        """Begins to bring the tokens to the host; the function waits for them. The next step may overwrite the tensor."""

    def keep(self, slots: list[int]) -> bool:
        """Drops all other slots and returns True, or returns False if they run on."""


class EagerSteps:
    """Runs operator by operator. It reads only the keys that exist, and drops stopped rows."""

    runs_ahead = False

    def __init__(self, decoding: Decoding, sampler: Sampler):
        self._decoding, self._sampler = decoding, sampler

    def start(self, prompts: list[np.ndarray], uniform: Tensor) -> Tensor:
        self._tokens = self._sampler(self._decoding.start(prompts), uniform)
        return self._tokens

    def next(self, uniform: Tensor) -> Tensor:
        self._tokens = self._decoding.step(self._tokens, Choice(self._sampler, uniform))
        return self._tokens

    def read(self, tokens: Tensor) -> Callable[[], list[int]]:
        return tokens.tolist

    def keep(self, slots: list[int]) -> bool:
        self._decoding.select(slots)
        self._tokens = self._tokens[torch.tensor(slots, device=self._tokens.device)]
        return True


class Captured:
    """A step that is captured as a CUDA graph once, and then replayed. What it reads keeps its address."""

    def __init__(self, device: torch.device):
        self._device = device
        self._graph: torch.cuda.CUDAGraph | None = None

    @property
    def _state(self) -> tuple[Tensor, ...]:
        """The tensors that a step changes and the next one reads, beside the caches."""
        raise NotImplementedError

    def _step(self) -> None:
        raise NotImplementedError

    def _prepare(self) -> None:
        """Captures the step, if that has not been done."""
        if self._graph is None:
            with _CAPTURING:
                self._graph = self._capture()

    def _replay(self) -> None:
        assert self._graph is not None
        self._graph.replay()

    def _capture(self) -> torch.cuda.CUDAGraph:
        """Warms up on a side stream, as capturing requires, restores the state, and captures. The replayed steps overwrite
        the warm-up's cache entries."""
        before = [t.clone() for t in self._state]

        def restore() -> None:
            for t, was in zip(self._state, before):
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


class GraphSteps(Captured):
    """Replays one step as a CUDA graph: no launch overhead, no synchronisation. Tokens, positions, caches and draws keep
    their addresses. Attention reads the whole capacity and masks the places that a row has not reached.

    The step draws its token too, and feeds it to the next one. So the host runs a step ahead of what it reads.
    """

    runs_ahead = True

    def __init__(self, model: Backbone, shape: tuple[int, ...], sampler: Sampler):
        super().__init__(model.device)
        self._sampler = sampler
        self.made_for = self.key(model, shape, sampler)
        self._decoding = decoding_of(model)(model, rounded(shape), fixed=True)
        self._tokens = torch.zeros(shape[0], dtype=torch.int64, device=self._device)
        self._uniform = torch.zeros(shape[0], dtype=torch.float64, device=self._device)

    @staticmethod
    def key(model: Backbone, shape: tuple[int, ...], sampler: Sampler) -> object:
        """A captured graph depends on these: shapes, sampling, the weights' addresses and dtypes, a forced backend."""
        return rounded(shape), sampler, weights_of(model), dispatch._forced.get()

    def start(self, prompts: list[np.ndarray], uniform: Tensor) -> Tensor:
        self._tokens.copy_(self._sampler(self._decoding.start(prompts), uniform))
        return self._tokens

    def next(self, uniform: Tensor) -> Tensor:
        self._uniform.copy_(uniform)
        self._prepare()
        self._replay()
        return self._tokens

    def read(self, tokens: Tensor) -> Callable[[], list[int]]:
        held = tokens.to("cpu", non_blocking=True, copy=True)
        if not tokens.is_cuda:
            return held.tolist
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(self._device))

        def wait() -> list[int]:
            copied.synchronize()
            return held.tolist()

        return wait

    @property
    def _state(self) -> tuple[Tensor, ...]:
        return self._tokens, *self._decoding.state

    def _step(self) -> None:
        fed = self._tokens.clamp(min=0)  # the host checks for NO_TOKEN later; until then the graph needs a valid id
        self._tokens.copy_(self._decoding.fixed_step(fed, Choice(self._sampler, self._uniform)))

    def keep(self, slots: list[int]) -> bool:
        return False


def weights_of(model: Backbone) -> tuple[tuple[int, torch.dtype], ...]:
    """The addresses and dtypes of a model's tensors, which a graph reads."""
    return tuple((p.data_ptr(), p.dtype) for p in (*model.parameters(), *model.buffers()))


def rounded(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes rounded up to multiples of 64, so that prompts of similar length share a graph."""
    return shape[0], *(-(-size // 64) * 64 for size in shape[1:])
