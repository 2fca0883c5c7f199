"""How does a language model continue or answer prompts? One prefill, then each step adds a token per row from a KV cache."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from ..models import inputs as model_inputs
from ..models.backbone import Backbone
from ..models.evaluation import evaluating
from ..quantize import quantize_all_
from ..rules import SIZE, check
from ..spread import has_spread_weights, is_wrapped
from ..weight_format import FORMATS
from .beam_search import BeamSearch
from .beam_steps import BeamSteps, EagerBeams, GraphBeams
from .queue import run_queue
from .sampling import NO_TOKEN, Sampler, no_token, uniforms
from .steps import EagerSteps, GraphSteps, Steps, decoding_of
from .warm import warm as make_ready

_KEEPING = threading.Lock()


class Generator:
    """Continues prompts with a GPT2Backbone, or answers them with a T5Backbone, whose encoder reads the prompts.

    On a CUDA device one step is captured as a CUDA graph and replayed. A Generator keeps the graphs of the last few shapes, so
    reuse it. It runs the model in evaluation mode and then restores its mode. Threads may share a Generator or its model:
    each call has its own caches and graph.

    Args:
        model: a GPT2Backbone or T5Backbone, on any device and in any dtype.
        weights: None takes the model's. "int8" and "int4" take a copy of the model with such weights (see pyfused.quantize_),
            made now; the model itself stays as it is. A CPU then reads a quarter of float32's bytes for a token, or less.
            Tokens may differ. A model that is quantised already must have this format.
        warm: True does the first call's preparations now. On a GPU it compiles the Triton kernels in parallel and keeps
            them on disk. `pyfused warm` does that ahead of a program.

    Example:
        tokens = pyfused.Generator(model).generate([[464, 3290]], max_new_tokens=20)
    """

    def __init__(self, model: Backbone, *, weights: str | None = None, warm: bool = False):
        self._decoding = decoding_of(model)
        if any(map(is_wrapped, model.modules())):
            raise ValueError(
                "model: fully_shard gathers its weights only while the model is called, and generation calls its parts; "
                "load it with from_preset(..., mesh=...) instead"
            )
        if weights is not None:
            model = _quantized_copy(model, weights)
        self.model = model
        self._graphs: dict[object, GraphSteps | GraphBeams] = {}
        if warm:
            make_ready(model)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop_token_ids: Collection[int] = (),
        on_token: Callable[[int, int], None] | None = None,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        early_stopping: bool | Literal["never"] = False,
        num_return_sequences: int = 1,
    ) -> list[list[int]]:
        """New tokens of each prompt, in the prompts' order.

        Args:
            prompts: token ids; their lengths may differ. Without prompts the result is an empty list.
            max_new_tokens: at most this many per prompt.
            temperature: divides the logits. 0, or a value too small for float32, takes the likeliest token; top_k, top_p
                and seed then change nothing.
            top_k: draws from the k likeliest tokens. top_p: draws from the smallest set of likeliest tokens that holds
                this much probability. With both, top_p cuts the result of top_k.
            seed: of the draws; None takes one from torch's default generator. The draws of row r depend on (seed, r)
                alone, not on the other prompts. A model that is spread over a mesh needs one, the same on all ranks.
            stop_token_ids: a row ends with one of these, which is returned too, as in transformers.
            on_token: called as on_token(row, token) as soon as a token is known: step by step, rows in order.
            num_beams: more than 1 searches for the likeliest text instead of the likeliest token, with transformers'
                scores and rules; length_penalty, early_stopping, num_return_sequences: see `pyfused.generation.beam_search`.
                It returns num_return_sequences texts for each prompt, best first, prompt after prompt. Beams take neither
                a temperature nor on_token.

        Raises:
            ValueError: an empty prompt, no room (GPT-2: prompt + max_new_tokens > max_sequence_length), a number out of
                range, options that exclude each other.
            TypeError: a wrong type. IndexError: a token id outside the vocabulary.
            FloatingPointError: logits that hold NaN or inf, such as a float16 model's that overflows, or only -inf. (A token
                with -inf is never chosen.)
        """
        arrays = self._texts(prompts, max_new_tokens)
        sampler, stops = Sampler(temperature, top_k, top_p), self._stops(stop_token_ids)
        self._check_seed(sampler, seed)
        _check_listener(on_token)
        search = BeamSearch(num_beams, length_penalty, early_stopping, num_return_sequences)
        self._check_search(search, max_new_tokens, sampler, on_token, len(stops))
        draws = uniforms(seed, len(arrays), max_new_tokens)
        if not arrays:
            return []
        with evaluating(self.model), torch.inference_mode():
            if num_beams > 1:
                beams = self._beams(arrays, max_new_tokens, num_beams, search.candidates(len(stops)))
                with self._kept(beams):
                    return search.run(beams, arrays, max_new_tokens, stops)
            steps = self._steps(arrays, max_new_tokens, sampler)
            with self._kept(steps):
                draws = draws.to(self.model.device)
                return _run(steps, arrays, max_new_tokens, draws, stops, on_token, self.model.dtype)

    def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        rows: int = 8,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop_token_ids: Collection[int] = (),
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[list[int]]:
        """New tokens of many prompts, `rows` of them at a time. A row whose text ends takes the next prompt, so texts of mixed
        lengths leave no row idle. Tokens are those of generate() on each prompt alone, up to rounding in ties.

        Args:
            rows: how many texts advance together, at least 1. On a CPU a step of up to 16 rows reads the weights once.
            The others, and what it raises: as generate(). It captures no CUDA graph.
        """
        arrays = self._texts(prompts, max_new_tokens)
        sampler, stops = Sampler(temperature, top_k, top_p), self._stops(stop_token_ids)
        self._check_seed(sampler, seed)
        check(SIZE, rows=rows)
        _check_listener(on_token)
        draws = uniforms(seed, len(arrays), max_new_tokens)
        if not arrays:
            return []
        rows = min(rows, len(arrays))
        with evaluating(self.model), torch.inference_mode():
            shape = rows, *self._decoding.shape(arrays, max_new_tokens)[1:]
            decoding, draws = self._decoding(self.model, shape), draws.to(self.model.device)
            return run_queue(decoding, arrays, rows, max_new_tokens, sampler, draws, stops, on_token)

    def _texts(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[np.ndarray]:
        """The prompts, checked."""
        arrays = model_inputs.texts(prompts, "prompts", self.model.get_config()["vocabulary_size"])
        check(SIZE, max_new_tokens=max_new_tokens)
        self._decoding.check_room(self.model, arrays, max_new_tokens)
        return arrays

    def _steps(self, prompts: list[np.ndarray], max_new_tokens: int, sampler: Sampler) -> Steps:
        """The steps of one call. While a call uses a graph, the graph is not in `_graphs`, so no other call can."""
        shape = self._decoding.shape(prompts, max_new_tokens)
        if self.model.device.type != "cuda" or has_spread_weights(self.model):
            return EagerSteps(self._decoding(self.model, shape), sampler)
        made: Any = self._graphs.pop(GraphSteps.key(self.model, shape, sampler), None)
        return made or GraphSteps(self.model, shape, sampler)

    def _beams(self, prompts: list[np.ndarray], max_new_tokens: int, beams: int, width: int) -> BeamSteps:
        """The same for a beam search. width: how many continuations it considers."""
        shape, shared = self._decoding.shape(prompts, max_new_tokens), self._decoding.shared(prompts)
        if self.model.device.type != "cuda" or has_spread_weights(self.model):
            return EagerBeams(self._decoding(self.model, shape), beams, width)
        made: Any = self._graphs.pop(GraphBeams.key(self.model, shape, shared, beams, width), None)
        return made or GraphBeams(self.model, shape, shared, beams, width)

    @contextlib.contextmanager
    def _kept(self, steps: Steps | BeamSteps) -> Iterator[None]:
        """Keeps the graph for later calls, also if this one fails."""
        try:
            yield
        finally:
            self._keep(steps)

    def _keep(self, steps: Steps | BeamSteps) -> None:
        if isinstance(steps, (GraphSteps, GraphBeams)):
            with _KEEPING:
                self._graphs[steps.made_for] = steps  # the latest is last
                while len(self._graphs) > 4:
                    del self._graphs[next(iter(self._graphs))]

    def _check_seed(self, sampler: Sampler, seed: int | None) -> None:
        if seed is None and not sampler.is_greedy and has_spread_weights(self.model):
            raise ValueError("seed is None; the ranks of a mesh must draw alike: give all of them the same int")

    def _check_search(
        self, search: BeamSearch, max_new_tokens: int, sampler: Sampler, on_token: object, stops: int
    ) -> None:
        if search.num_beams == 1:
            return
        search.check_penalty(max_new_tokens)
        if sampler.temperature != 0.0:
            raise ValueError(f"temperature is {sampler.temperature} and num_beams {search.num_beams}; beams take 0")
        if on_token is not None:
            raise ValueError(
                f"on_token is given and num_beams is {search.num_beams}; no token is certain before the end"
            )
        vocabulary = self.model.get_config()["vocabulary_size"]
        if search.candidates(stops) > search.num_beams * vocabulary:
            raise ValueError(f"stop_token_ids has {stops} tokens of {vocabulary}; beams need another one to go on")

    def _stops(self, stop_token_ids: Collection[int]) -> frozenset[int]:
        if isinstance(stop_token_ids, (str, bytes)) or not isinstance(stop_token_ids, Collection):
            raise TypeError(f"stop_token_ids is {stop_token_ids!r}; it takes a collection of token ids")
        vocabulary = self.model.get_config()["vocabulary_size"]
        for token in stop_token_ids:
            if isinstance(token, bool) or not isinstance(token, (int, np.integer)):
                raise TypeError(f"stop_token_ids holds {token!r}; it takes token ids")
            if not 0 <= token < vocabulary:
                raise IndexError(f"stop_token_ids holds {token}; it takes token ids 0 to {vocabulary - 1}")
        return frozenset(int(token) for token in stop_token_ids)


def _quantized_copy(model: Backbone, weights: str) -> Backbone:
    """A copy of the model with integer weights. Matrices are copied only if they are not quantised."""
    if weights not in list(FORMATS):
        raise ValueError(f"weights is {weights!r}; it takes {', '.join(map(repr, FORMATS))} or None")
    shared: dict[int, Any] = {id(p): p for p in model.parameters()}
    found = copy.deepcopy(model, dict(shared))
    quantize_all_(found, weights, "weights")
    own = {key: nn.Parameter(p.detach().clone(), p.requires_grad) for key, p in shared.items() if _holds(found, p)}
    for module in found.modules():
        for name, p in module._parameters.items():
            module._parameters[name] = own.get(id(p), p)
    return found


def _holds(model: nn.Module, parameter: nn.Parameter) -> bool:
    return any(p is parameter for p in model.parameters())


def _check_listener(on_token: object) -> None:
    if on_token is not None and not callable(on_token):
        raise TypeError(f"on_token is a {type(on_token).__name__}; it takes a function of (row, token)")


def _run(steps: Steps, prompts, count: int, draws, stops: frozenset[int], on_token, dtype) -> list[list[int]]:
    """The loop. Slots are the rows that the model computes. If a row stops, its slot is dropped, or its tokens are ignored.
    dtype: the logits', for an error's hint."""
    slots = list(range(len(prompts)))
    out: list[list[int]] = [[] for _ in slots]
    done = [False] * len(slots)
    tokens = steps.start(prompts, draws[:, 0])
    if not stops and on_token is None and draws.is_cuda:
        # Nobody reads a token before the end, so the host runs ahead of the GPU.
        history = [tokens.clone()]
        history += [steps.next(draws[:, t]).clone() for t in range(1, count)]
        found = torch.stack(history, 1).cpu()
        if (missing := (found == NO_TOKEN).nonzero()).numel():
            row, t = missing[missing[:, 1].argmin()].tolist()
            raise no_token(row, t, dtype)
        return found.tolist()
    coming = steps.read(tokens)
    for t in range(count):
        arrived = coming
        if steps.runs_ahead and t + 1 < count:
            coming = steps.read(steps.next(draws[:, t + 1]))
        for row, token in zip(slots, arrived()):
            if done[row]:
                continue
            if token == NO_TOKEN:
                raise no_token(row, t, dtype)
            out[row].append(token)
            done[row] = token in stops
            if on_token is not None:
                on_token(row, token)
        alive = [slot for slot, row in enumerate(slots) if not done[row]]
        if not alive:
            break
        if len(alive) < len(slots) and steps.keep(alive):
            slots = [slots[slot] for slot in alive]
            draws = draws[alive]
        if not steps.runs_ahead and t + 1 < count:
            coming = steps.read(steps.next(draws[:, t + 1]))
    return out
