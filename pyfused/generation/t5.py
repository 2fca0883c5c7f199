"""How does T5 answer a batch of sources? It encodes them once; then each decoder step adds a token per row.

All rows of the decoder begin with the start token, so they are equally long. Cross-attention's keys and values are computed
once. There the beams of one source are queries of one row, so its keys are neither copied nor read again for each beam.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..models import inputs as model_inputs
from ..models.call import Call
from ..models.t5 import T5Backbone
from ..nn import Visibility
from ..ops import relative_bias
from .decoder import Decoder, chosen
from .sampling import Choice

_FIRST = 256  # places that a cache begins with; it doubles as the answer grows, so a large limit costs no memory


class T5Decoding:
    """Writes a batch of answers; see `pyfused.generation.steps.Decoding`."""

    def __init__(self, model: T5Backbone, shape: tuple[int, ...], fixed: bool = False, beams: int = 1):
        self.model, self._fixed = model, fixed
        texts, self._most, self._source_capacity = shape
        batch_size = texts * beams
        self._cache = model.new_cache(batch_size, self._most if fixed else min(self._most, _FIRST))
        self._positions = torch.zeros(batch_size, dtype=torch.int64, device=model.device)  # all equal
        self._of_capacity()
        self._lengths: list[int] = []  # of rows that differ in length
        self._decoder = Decoder.of(model, self._cache, fixed)

    @staticmethod
    def shape(prompts: list[np.ndarray], max_new_tokens: int) -> tuple[int, ...]:
        return len(prompts), max_new_tokens, max(len(p) for p in prompts)

    @staticmethod
    def shared(prompts: list[np.ndarray]) -> int:
        return 1  # the start token's

    @staticmethod
    def check_room(model: T5Backbone, prompts: list[np.ndarray], max_new_tokens: int) -> None:
        """T5 takes texts of any length."""

    def _of_capacity(self) -> None:
        """What depends on the cache's capacity."""
        self._places = torch.arange(self._cache.capacity, device=self.model.device)
        self._bias = self._last_bias()

    def _last_bias(self) -> Tensor:
        """(1, H, 1, capacity), the bias of the query at the last place. The bias of place p is its last p + 1 columns."""
        layers: Any = self.model.decoder.layers
        table, capacity = layers[0].attention.position_bias(), self._cache.capacity
        return relative_bias(
            table.table, 1, capacity, bidirectional=False, max_distance=table.max_distance, query_offset=capacity - 1
        )

    def start(self, prompts: list[np.ndarray]) -> Tensor:
        self._cache.positions, self._cache.length = None, 0
        if self._fixed:  # a CUDA graph reads this tensor, and the table may have changed
            self._bias.copy_(self._last_bias())
        self._encode(prompts)
        config = self.model.get_config()
        first = torch.full((self._cache.batch_size,), config["decoder_start_token_id"], device=self._places.device)
        if not self._fixed:
            return self.step(first)
        self._positions.zero_()
        self._cache.at_positions(self._positions, self._cache.capacity)
        return self.fixed_step(first)

    def begin(self) -> None:
        cache, device = self._cache, self._places.device
        layers, heads, size, dtype, _ = cache.signature
        rows, sources = cache.batch_size, self._source_capacity
        keys = torch.zeros(2, layers, rows, heads, sources, size, dtype=dtype, device=device)
        cache.cross = list(zip(*keys))
        cache.encoder_mask = torch.zeros(rows, sources, dtype=torch.bool, device=device)
        cache.at_positions(torch.zeros(rows, dtype=torch.int64, device=device), 1)
        self._lengths = [0] * rows

    def admit(self, row: int, prompt: np.ndarray) -> int:
        cache, length = self._cache, len(prompt)
        assert cache.positions is not None
        assert cache.encoder_mask is not None
        call = Call(torch.from_numpy(prompt)[None].to(self._places.device), visible=Visibility())
        memory = self.model.encoder(self.model.token_embedding(call.token_ids), call)
        layers: Any = self.model.decoder.layers
        for layer, held in zip(layers, cache.cross):
            assert held is not None
            for old, new in zip(held, layer.cross_attention.project(memory)):
                old[row, :, :length] = new[0]
        cache.encoder_mask[row] = torch.arange(self._source_capacity, device=self._places.device) < length
        cache.positions[row] = self._lengths[row] = 0
        cache.at_positions(cache.positions, max(self._lengths) + 1)
        return int(self.model.get_config()["decoder_start_token_id"])

    def _encode(self, prompts: list[np.ndarray]) -> None:
        """Fills the cache with cross-attention's keys and values. Each head's are one stretch of memory."""
        cache, device = self._cache, self._places.device
        ids, lengths = model_inputs.padded(prompts, self._source_capacity if self._fixed else None)
        mask = None
        if self._fixed or lengths.min() < ids.shape[1]:
            mask = torch.from_numpy(np.arange(ids.shape[1]) < lengths[:, None]).to(device)
        call = Call(torch.from_numpy(ids).to(device), visible=Visibility(padding_mask=mask).skip_padding())
        memory = self.model.encoder(self.model.token_embedding(call.token_ids), call)
        layers: Any = self.model.decoder.layers
        for i, layer in enumerate(layers):
            key_value = layer.cross_attention.project(memory)
            held = cache.cross[i] if self._fixed else None
            if held is None:
                key, value = (t.contiguous() for t in key_value)
                cache.cross[i] = key, value
            else:  # a CUDA graph reads these tensors
                for old, new in zip(held, key_value):
                    old.copy_(new)
        if self._fixed and cache.encoder_mask is not None and mask is not None:
            cache.encoder_mask.copy_(mask)
        else:
            cache.encoder_mask = mask

    def step(self, tokens: Tensor, choose: bool | Choice = False) -> Tensor:
        cache = self._cache
        if cache.extent > cache.capacity:
            cache.grow(min(2 * cache.capacity, self._most))
            self._of_capacity()
        found = None if self._decoder is None else self._decoder(tokens, choose)
        if found is None:
            found = chosen(self._called(tokens, self._visible(cache.positions)), choose)
        cache.advance()
        self._lengths = [n + 1 for n in self._lengths]
        return found

    def _visible(self, positions: Tensor | None) -> Visibility:
        """What the next token of each row sees. positions: (B,), or None where all rows are equally long."""
        last, extent = self._cache.capacity - 1, self._cache.extent
        if positions is None:
            return Visibility(attn_bias=self._bias[..., last - self._cache.length :])
        distance = (last - positions[:, None] + self._places[:extent]).clamp(max=last)
        bias = self._bias[0, :, 0][:, distance].transpose(0, 1)[:, :, None]  # (B, H, 1, extent)
        return Visibility(padding_mask=self._places[:extent] <= positions[:, None], attn_bias=bias)

    def fixed_step(self, tokens: Tensor, choose: bool | Choice = False) -> Tensor:
        found = None if self._decoder is None else self._decoder(tokens, choose)
        if found is None:
            capacity, position = self._cache.capacity, self._positions[:1]
            distance = (capacity - 1 - position + self._places).clamp_(max=capacity - 1)
            mask = (self._places <= position).expand(len(tokens), capacity)
            visible = Visibility(padding_mask=mask, attn_bias=self._bias[..., distance])
            found = chosen(self._called(tokens, visible), choose)
        self._positions += 1
        return found

    def _called(self, tokens: Tensor, visible: Visibility) -> Tensor:
        call = Call(tokens[:, None], visible=visible, cache=self._cache, memory_mask=self._cache.encoder_mask)
        return self.model.logits(self.model.decoder(self.model.token_embedding(call.token_ids), call)[:, 0])

    @property
    def state(self) -> tuple[Tensor, ...]:
        return (self._positions,)

    def branch(self, times: int) -> None:
        rows = torch.arange(self._cache.batch_size, device=self._places.device).repeat_interleave(times)
        self._cache.select(rows, sources=slice(None))

    def select(self, texts: list[int]) -> None:
        sources = torch.tensor(texts, device=self._places.device)
        cross = self._cache.cross[0]
        assert cross is not None
        times = self._cache.batch_size // cross[0].shape[0]
        rows = sources[:, None] * times + torch.arange(times, device=sources.device)
        self._cache.select(rows.flatten(), sources)
        if self._cache.positions is not None:
            self._lengths = [self._lengths[text] for text in texts]
            self._cache.at_positions(self._cache.positions, max(self._lengths) + 1)

    def fixed_reorder(self, rows: Tensor, first: int) -> None:
        self._cache.reorder_all(rows, first)

    def reorder(self, rows: list[int], new: int, first: int) -> None:
        self._cache.reorder(rows, 1 + first)
