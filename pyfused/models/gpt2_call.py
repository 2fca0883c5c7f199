"""What may GPT-2 be called with, and what do all of its layers then share?"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..nn import CAUSAL, KVCache, Visibility
from . import inputs as model_inputs

INPUTS = (
    "token_ids", "padding_mask", "token_type_ids", "position_ids", "inputs_embeds", "attention_mask", "packed",
    "encoder_hidden_states", "encoder_padding_mask", "cache", "return_hidden_states", "return_attentions",
)  # fmt: skip


@dataclass(slots=True)
class Call:
    """One call's inputs, checked and on the model's device, and the lists that collect what it was asked for.

    token_ids or inputs_embeds; position_ids (S,), (1, S) or (B, S); memory: the encoder's hidden states,
    memory_mask: which of them are real. visible has no default: torch.compile cannot trace the constructor of a dataclass
    that has an object as one.
    """

    token_ids: Tensor | None = None
    position_ids: Tensor | None = None
    token_type_ids: Tensor | None = None
    inputs_embeds: Tensor | None = None
    visible: Visibility = field(kw_only=True)
    cache: KVCache | None = None
    memory: Tensor | None = None
    memory_mask: Tensor | None = None
    hidden_states: list[Tensor] | None = None
    attentions: list[Tensor] | None = None
    cross_attentions: list[Tensor] | None = None


def read(given: dict[str, Any], config: dict[str, Any], like: Tensor) -> Call:
    """Checks the inputs of one call. config: the model's; like: a parameter, for its dtype and device."""
    vocabulary, places, width = config["vocabulary_size"], config["max_sequence_length"], config["hidden_dim"]
    heads = config["num_heads"]
    cache = model_inputs.cache(given.get("cache"), config["num_layers"], heads, width // heads, like)
    call = Call(visible=CAUSAL, cache=cache)
    embeds, tokens = given.get("inputs_embeds"), given.get("token_ids")
    if (embeds is None) == (tokens is None):
        both = "inputs_embeds is given beside token_ids; it takes one of the two"
        raise ValueError("token_ids is missing; it takes (B, S) integers" if tokens is None else both)
    if "padding_mask" not in given:
        raise ValueError("padding_mask is missing; it takes (B, S), or None where nothing is padding")
    if embeds is not None:
        call.inputs_embeds = model_inputs.states(embeds, "inputs_embeds", "(B, S, D)", (None, None, width), like)
        b, s = call.inputs_embeds.shape[:2]
    else:
        call.token_ids = model_inputs.ids(tokens, "token_ids", "(B, S)", (None, None), vocabulary, like.device)
        b, s = call.token_ids.shape
    if (types := given.get("token_type_ids")) is not None:
        call.token_type_ids = model_inputs.ids(types, "token_type_ids", "(B, S)", (b, s), vocabulary, like.device)
    past = model_inputs.cached(call.cache, b, s)
    call.position_ids = _positions(given, b, s, past, places, like.device)
    call.visible = _visible(given, call, (b, config["num_heads"], s, past + s), like)
    _encoder(given, call, config, b, like)
    if given.get("return_hidden_states"):
        call.hidden_states = []
    if given.get("return_attentions"):
        call.attentions = []
        call.cross_attentions = [] if config["cross_attention"] else None
    return call


def _positions(given, b: int, s: int, past: int, places: int, device: torch.device) -> Tensor:
    positions = given.get("position_ids")
    if positions is not None:
        return model_inputs.positions(positions, (b, s), places, device)
    if past + s > places:
        behind = f" behind {past} cached tokens" if past else ""
        raise ValueError(f"token_ids has length {s}{behind}; it takes at most max_sequence_length = {places} in all")
    return torch.arange(past, past + s, device=device)


def _visible(given, call: Call, size: tuple[int, int, int, int], like: Tensor) -> Visibility:
    """size: (B, H, S, Sk)."""
    padding, custom, packed = given["padding_mask"], given.get("attention_mask"), given.get("packed", False)
    if padding is not None:
        padding = model_inputs.mask(padding, "padding_mask", "(B, Sk)", (size[0], size[3]), like.device)
    if not packed:
        if custom is None:
            return Visibility(is_causal=True, padding_mask=padding)
        return Visibility(padding_mask=padding, attn_bias=model_inputs.score_bias(custom, "attention_mask", size, like))
    positions = call.position_ids
    if given.get("position_ids") is None or positions is None:
        raise ValueError("packed=True needs position_ids; a text starts wherever they do not continue")
    if custom is not None or call.cache is not None:
        raise ValueError("packed=True takes neither attention_mask nor cache")
    text = torch.zeros_like(positions)
    text[:, 1:] = (positions[:, 1:] != positions[:, :-1] + 1).cumsum(1)
    same = (text[:, :, None] == text[:, None, :])[:, None]  # (B, 1, S, S)
    return Visibility(True, padding, model_inputs.score_bias(same, "packed", size, like))


def _encoder(given, call: Call, config: dict[str, Any], b: int, like: Tensor) -> None:
    memory, mask = given.get("encoder_hidden_states"), given.get("encoder_padding_mask")
    held = None if call.cache is None else call.cache.cross[0]
    for name, value in (("encoder_hidden_states", memory), ("encoder_padding_mask", mask)):
        if value is not None and not config["cross_attention"]:
            raise ValueError(f"{name} is given to a model without cross-attention; it takes None")
        if value is not None and held is not None:
            raise ValueError(f"{name} is given, but the cache holds the encoder's keys already; it takes None then")
    if mask is not None and memory is None:
        raise ValueError("encoder_padding_mask is given without encoder_hidden_states")
    if memory is not None:
        width = config["hidden_dim"]
        call.memory = model_inputs.states(memory, "encoder_hidden_states", "(B, Se, D)", (b, None, width), like)
        if mask is not None:
            mask = model_inputs.mask(mask, "encoder_padding_mask", "(B, Se)", (b, call.memory.shape[1]), like.device)
        if call.cache is not None:
            call.cache.encoder_mask = mask
    elif held is not None and call.cache is not None:
        mask = call.cache.encoder_mask
    call.memory_mask = mask
