"""How does GPT-2 continue a batch of texts of any lengths? One prefill, then each step adds a token per row."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..models import inputs as model_inputs
from ..models.call import Call
from ..models.gpt2 import GPT2Backbone
from ..nn import CAUSAL, KVCache, Visibility
from .decoder import Decoder, chosen
from .sampling import Choice


def prefill(model: GPT2Backbone, cache: KVCache, prompts: list[np.ndarray]) -> Tensor:
    """Fills the cache and returns the hidden states at the end of each prompt, (B, D).

    Prompts of several lengths are packed. In the cache they are padded on the right; later steps overwrite or mask this
    padding.
    """
    ids, lengths = model_inputs.padded(prompts)
    device = model.device
    positions = torch.arange(ids.shape[1], device=device)
    visible = CAUSAL
    if lengths.min() < ids.shape[1]:
        real = torch.from_numpy(np.arange(ids.shape[1]) < lengths[:, None]).to(device)
        visible = Visibility(is_causal=True, padding_mask=real).skip_padding()
    call = Call(torch.from_numpy(ids).to(device), positions, visible=visible, cache=cache)
    return model.run(call, torch.from_numpy(lengths).to(device) - 1)


class GPT2Decoding:
    """Continues a batch of texts; see `pyfused.generation.steps.Decoding`."""

    def __init__(self, model: GPT2Backbone, shape: tuple[int, ...], fixed: bool = False, beams: int = 1):
        self.model = model
        batch_size, capacity = shape[0] * beams, shape[1]
        self._cache = model.new_cache(batch_size, capacity)
        self._places = torch.arange(capacity, device=model.device)
        self._lengths: list[int] = []
        self._times = beams
        self._decoder = Decoder.of(model, self._cache, fixed)
        self._positions: Tensor | None = None
        if fixed:
            self._positions = torch.zeros(batch_size, dtype=torch.int64, device=model.device)

    @staticmethod
    def shape(prompts: list[np.ndarray], max_new_tokens: int) -> tuple[int, ...]:
        return len(prompts), max(len(p) for p in prompts) + max_new_tokens - 1  # the last new token is never fed

    @staticmethod
    def shared(prompts: list[np.ndarray]) -> int:
        return min(len(p) for p in prompts)

    @staticmethod
    def check_room(model: GPT2Backbone, prompts: list[np.ndarray], max_new_tokens: int) -> None:
        places = model.get_config()["max_sequence_length"]
        for row, prompt in enumerate(prompts):
            if len(prompt) + max_new_tokens > places:
                raise ValueError(
                    f"prompts[{row}] has {len(prompt)} tokens and max_new_tokens is {max_new_tokens}; "
                    f"together they take at most max_sequence_length = {places}"
                )

    def start(self, prompts: list[np.ndarray]) -> Tensor:
        self._cache.positions, self._cache.length = None, 0
        self._lengths = [len(p) for p in prompts]
        if self._positions is None:
            logits = self.model.logits(prefill(self.model, self._cache, prompts))
            self._settle()
            return logits
        times = self._cache.batch_size // len(prompts)
        cache = self._cache if times == 1 else self.model.new_cache(len(prompts), max(self._lengths))
        logits = self.model.logits(prefill(self.model, cache, prompts))
        if times > 1:
            self._cache.put_all(cache, max(self._lengths))
        self._positions.copy_(torch.tensor(self._lengths, device="cpu").repeat_interleave(times))
        self._cache.at_positions(self._positions, self._cache.capacity)
        return logits.repeat_interleave(times, 0)

    def begin(self) -> None:
        self._lengths = [0] * self._cache.batch_size
        self._cache.at_positions(torch.zeros(len(self._lengths), dtype=torch.int64, device=self._places.device), 1)

    def admit(self, row: int, prompt: np.ndarray) -> int:
        cache, length = self._cache, len(prompt) - 1  # the last token is fed, and gives the logits
        assert cache.positions is not None
        if length:
            own = self.model.new_cache(1, length)
            prefill(self.model, own, [prompt[:-1]])
            own.length = length
            cache.put(row, own)
        self._lengths[row] = length
        cache.positions[row] = length
        cache.at_positions(cache.positions, max(self._lengths) + 1)
        return int(prompt[-1])

    def _settle(self) -> None:
        """Rows of equal length share one position; otherwise each row gets its own."""
        if len(set(self._lengths)) == 1:
            self._cache.positions, self._cache.length = None, self._lengths[0]
        else:
            self._cache.at_positions(torch.tensor(self._lengths, device=self._places.device), max(self._lengths) + 1)

    def step(self, tokens: Tensor, choose: bool | Choice = False) -> Tensor:
        cache = self._cache
        found = None if self._decoder is None else self._decoder(tokens, choose)
        if found is None:
            if cache.positions is None:
                mask, position_ids = None, self._places.narrow(0, cache.length, 1)
            else:
                mask = self._places[: cache.extent] <= cache.positions[:, None]
                position_ids = cache.positions[:, None]
            found = chosen(self._called(tokens, position_ids, mask), choose)
        cache.advance()
        self._lengths = [n + 1 for n in self._lengths]
        return found

    def fixed_step(self, tokens: Tensor, choose: bool | Choice = False) -> Tensor:
        assert self._positions is not None
        found = None if self._decoder is None else self._decoder(tokens, choose)
        if found is None:
            mask = self._places <= self._positions[:, None]
            found = chosen(self._called(tokens, self._positions[:, None], mask), choose)
        self._positions += 1
        return found

    def _called(self, tokens: Tensor, position_ids: Tensor, mask: Tensor | None) -> Tensor:
        call = Call(tokens[:, None], position_ids, visible=Visibility(padding_mask=mask), cache=self._cache)
        return self.model.logits(self.model.run(call)[:, 0])

    @property
    def state(self) -> tuple[Tensor, ...]:
        return () if self._positions is None else (self._positions,)

    def branch(self, times: int) -> None:
        rows = range(len(self._lengths))
        self._take([row for row in rows for _ in range(times)])
        self._times *= times

    def select(self, texts: list[int]) -> None:
        self._take([text * self._times + i for text in texts for i in range(self._times)])

    def _take(self, rows: list[int]) -> None:
        self._cache.select(torch.tensor(rows, device=self._places.device))
        self._lengths = [self._lengths[row] for row in rows]
        self._settle()

    def fixed_reorder(self, rows: Tensor, first: int) -> None:
        self._cache.reorder_all(rows, first)

    def reorder(self, rows: list[int], new: int, first: int) -> None:
        # Beams of one prompt differ only in new tokens, and these begin no earlier than the shortest prompt ends.
        self._cache.reorder(rows, min(self._lengths) - new + first)
