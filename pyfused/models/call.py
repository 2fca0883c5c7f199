"""What is one call of a model? Its inputs, checked and on the model's device, and lists for the states that it collects.

Each model reads its inputs with a Reader. A Reader only reads; the forward pass writes the cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import EVERYTHING, Embedding, KVCache, Visibility
from ..own_forward import is_bare
from . import inputs
from .options import head_size

FLAGS = ("return_hidden_states", "return_attentions")


class Call:
    """token_ids (B, S) or embeds (B, S, D). position_ids (S,), (1, S) or (B, S). segment_ids (B, S), also GPT-2's token types.

    visible: which keys self-attention sees. memory: the encoder's hidden states (B, Se, D); memory_mask: which of them are
    real. The lists hidden_states, attentions and cross_attentions are None unless they were asked for.

    It is no dataclass: fully_shard would give each layer a copy, and what the layer writes into that would be lost.
    """

    __slots__ = (
        *("token_ids", "position_ids", "segment_ids", "embeds", "visible", "cache", "memory", "memory_mask"),
        *("hidden_states", "attentions", "cross_attentions"),
    )

    def __init__(
        self,
        token_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        embeds: Tensor | None = None,
        *,
        visible: Visibility,
        cache: KVCache | None = None,
        memory_mask: Tensor | None = None,
    ):
        self.token_ids, self.position_ids, self.embeds = token_ids, position_ids, embeds
        self.visible, self.cache, self.memory_mask = visible, cache, memory_mask
        self.segment_ids: Tensor | None = None
        self.memory: Tensor | None = None
        self.hidden_states: list[Tensor] | None = None
        self.attentions: list[Tensor] | None = None
        self.cross_attentions: list[Tensor] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """B and S."""
        found = self.token_ids if self.embeds is None else self.embeds
        assert found is not None  # one of the two is there
        return found.shape[0], found.shape[1]

    def embedded(self, token: nn.Module) -> Tensor:
        """(B, S, D): the token ids through the table `token`, or the given embeddings."""
        return token(self.token_ids) if self.embeds is None else self.embeds

    def collected(self, side: str = "") -> dict[str, tuple[Tensor, ...]]:
        """The collected states by name. side: the name's prefix in a model with two stacks."""
        found = {}
        if self.hidden_states is not None:
            found[f"{side}hidden_states"] = tuple(self.hidden_states)
        if self.attentions is not None:
            found[f"{side}attentions"] = tuple(self.attentions)
        if self.cross_attentions is not None:
            found["cross_attentions"] = tuple(self.cross_attentions)
        return found


class Reader:
    """Checks the inputs of one call; each error names the input and what it takes (inputs.py).

    Args:
        given: the inputs by name. config: the model's. like: one of its norms' weights; gives dtype and device.
    """

    def __init__(self, given: Mapping[str, Any], config: Mapping[str, Any], like: Tensor):
        self.given, self.config, self.like = given, config, like

    def tokens(self, side: str = "", s: str = "S") -> Call:
        """Token ids or embeddings. side: the names' prefix in a model with two stacks. s: the length's name."""
        ids, embeds = f"{side}token_ids", f"{side}inputs_embeds"
        tokens, states, config = self.given.get(ids), self.given.get(embeds), self.config
        if (tokens is None) == (states is None):
            both = f"{embeds} is given beside {ids}; it takes one of the two"
            raise ValueError(f"{ids} is missing; it takes (B, {s}) integers" if tokens is None else both)
        if tokens is not None:
            limit, device = config["vocabulary_size"], self.like.device
            return Call(inputs.ids(tokens, ids, f"(B, {s})", (None, None), limit, device), visible=EVERYTHING)
        letter, width = ("E", config["embedding_dim"]) if "embedding_dim" in config else ("D", config["hidden_dim"])
        found = inputs.states(states, embeds, f"(B, {s}, {letter})", (None, None, width), self.like)
        return Call(embeds=found, visible=EVERYTHING)

    def segments(self, call: Call, name: str, limit: int) -> None:
        """Integers in [0, limit), or None."""
        if (segments := self.given.get(name)) is not None:
            call.segment_ids = inputs.ids(segments, name, "(B, S)", call.size, limit, self.like.device)

    def positions(self, call: Call, past: int = 0) -> None:
        """As given, or counted on from the `past` cached tokens. Padding does not change them."""
        places, s, device = self.config["max_sequence_length"], call.size[1], self.like.device
        if (positions := self.given.get("position_ids")) is not None:
            call.position_ids = inputs.positions(positions, call.size, places, device)
            return
        if past + s > places:
            behind = f" behind {past} cached tokens" if past else ""
            raise ValueError(
                f"token_ids has length {s}{behind}; it takes at most max_sequence_length = {places} in all"
            )
        call.position_ids = torch.arange(past, past + s, device=device)

    def padding(self, name: str, shape: str, size: tuple[int, ...]) -> Tensor | None:
        """A padding mask. The caller must give it, if only as None."""
        if name not in self.given:
            raise ValueError(f"{name} is missing; it takes {shape}, or None where nothing is padding")
        return inputs.mask(self.given[name], name, shape, size, self.like.device)

    def cache(self, call: Call, layers: Any) -> int:
        """Sets call.cache, for these layers and with room for the call. Returns the number of cached tokens."""
        sizes = len(layers), layers[0].attention.num_heads, head_size(self.config)
        call.cache = inputs.cache(self.given.get("cache"), *sizes, self.like)
        return inputs.cached(call.cache, *call.size)

    def memory(self, call: Call, names: Sequence[str]) -> bool:
        """Returns True if the cache holds the encoder's keys. Else reads the encoder's states, if they are given.

        names: of the states, of their padding mask, then of the encoder's other inputs.
        """
        given, like = self.given, self.like
        if call.cache is not None and call.cache.cross[0] is not None:
            for name in names:
                if given.get(name) is not None:
                    held = "the cache holds the encoder's keys already"
                    raise ValueError(f"{name} is given, but {held}; it takes None then")
            call.memory_mask = call.cache.encoder_mask
            return True
        states, mask = names[:2]
        if given.get(states) is not None:
            size = (call.size[0], None, self.config["hidden_dim"])
            memory = call.memory = inputs.states(given[states], states, "(B, Se, D)", size, like)
            call.memory_mask = inputs.mask(given.get(mask), mask, "(B, Se)", tuple(memory.shape[:2]), like.device)
        return False

    def collect(self, call: Call, *, cross: bool = False) -> None:
        """Makes the lists that the flags ask for. cross: whether there is cross-attention."""
        if self.given.get("return_hidden_states"):
            call.hidden_states = []
        if self.given.get("return_attentions"):
            call.attentions = []
            call.cross_attentions = [] if cross else None

    def segmented(self) -> Call:
        """ALBERT's and FNet's common inputs: tokens, segments, positions and flags."""
        call = self.tokens()
        if "segment_ids" not in self.given:
            raise ValueError("segment_ids is missing; it takes (B, S) integers, or None where all are 0")
        self.segments(call, "segment_ids", self.config["num_segments"])
        self.positions(call)
        self.collect(call)
        return call


def embed_segmented(call: Call, token: nn.Module, position: nn.Module, segment: nn.Embedding) -> Tensor:
    """(B, S, E): the sum of ALBERT's and FNet's three embeddings.

    It needs no operator: with its norm it is 0.01% of ALBERT base's pass over 8x128 on one CPU thread (0.3 ms of 2.5 s) and
    0.2% of FNet base's over 2x512 (3.2 ms of 1.7 s).
    """
    of_token = call.embedded(token)
    if call.segment_ids is not None:
        of_segment = segment(call.segment_ids)
    elif segment.__class__.forward is Embedding.forward and is_bare(segment):
        of_segment = segment.weight[0]
    else:  # it has hooks, or was replaced
        of_segment = segment(torch.zeros(of_token.shape[:-1], dtype=torch.int64, device=of_token.device))
    return of_token + position(call.position_ids) + of_segment


def cache_of(model: Any, layers: Any, batch_size: int, capacity: int) -> KVCache:
    """An empty KV cache of `capacity` tokens for these layers of a model; for this rank's heads if they are spread."""
    attention = layers[0].attention
    sizes = batch_size, attention.num_heads, capacity, attention.head_size
    return KVCache(len(layers), *sizes, dtype=model.dtype, device=model.device)
