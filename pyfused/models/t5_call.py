"""What may T5 be called with, and what do all layers of a stack then share?"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..nn import CAUSAL, EVERYTHING, KVCache, Visibility
from . import inputs as model_inputs

ENCODER_INPUTS = ("encoder_token_ids", "encoder_padding_mask", "encoder_inputs_embeds")
FLAGS = ("return_hidden_states", "return_attentions")
INPUTS = (
    "encoder_token_ids", "encoder_padding_mask", "decoder_token_ids", "decoder_padding_mask", "encoder_inputs_embeds",
    "encoder_sequence_output", "decoder_inputs_embeds", "cache", *FLAGS,
)  # fmt: skip


@dataclass(slots=True)
class StackCall:
    """One call of a stack, checked and on the model's device, and the lists that collect what it was asked for.

    token_ids or embeds; memory: the encoder's hidden states, memory_mask: which of them are real. visible has no default:
    torch.compile cannot trace the constructor of a dataclass that has an object as one.
    """

    token_ids: Tensor | None = None
    embeds: Tensor | None = None
    visible: Visibility = field(kw_only=True)
    cache: KVCache | None = None
    memory: Tensor | None = None
    memory_mask: Tensor | None = None
    hidden_states: list[Tensor] | None = None
    attentions: list[Tensor] | None = None
    cross_attentions: list[Tensor] | None = None


@dataclass(slots=True)
class Call:
    """encoder is None where its states are given, or their keys are in the cache. decoder.memory is filled in later."""

    encoder: StackCall | None
    decoder: Any  # a StackCall; None in a model that is the encoder alone
    memory: Tensor | None = None
    asked: dict[str, list[Tensor]] = field(default_factory=dict)


def read(given: dict[str, Any], config: dict[str, Any], like: Tensor) -> Call:
    """Checks the inputs of one call. config: the model's; like: a parameter, for its dtype and device."""
    heads = config["num_heads"]
    size = config["key_value_dim"] or config["hidden_dim"] // heads
    cache = model_inputs.cache(given.get("cache"), config["num_decoder_layers"], heads, size, like)
    decoder = _tokens(given, "decoder", config, like)
    tokens = decoder.token_ids if decoder.embeds is None else decoder.embeds
    assert tokens is not None  # one of the two is there
    b, s = tokens.shape[:2]
    past = model_inputs.cached(cache, b, s)
    decoder.cache, decoder.visible = cache, CAUSAL
    if given["decoder_padding_mask"] is not None:
        shape, keys = "(B, Sk)" if past else "(B, Sd)", (b, past + s)
        mask = model_inputs.mask(given["decoder_padding_mask"], "decoder_padding_mask", shape, keys, like.device)
        decoder.visible = Visibility(is_causal=True, padding_mask=mask)
    call = Call(None, decoder)
    _source(given, call, b, config, like)
    collect(call, given)
    return call


def read_encoder(given: dict[str, Any], config: dict[str, Any], like: Tensor) -> StackCall:
    """Checks what `encode` is called with."""
    call = _tokens(given, "encoder", config, like)
    tokens = call.token_ids if call.embeds is None else call.embeds
    assert tokens is not None
    mask = given["encoder_padding_mask"]
    if mask is not None:
        mask = model_inputs.mask(mask, "encoder_padding_mask", "(B, Se)", tuple(tokens.shape[:2]), like.device)
    call.visible = Visibility(padding_mask=mask)
    return call


def _tokens(given: dict[str, Any], side: str, config: dict[str, Any], like: Tensor) -> StackCall:
    """Token ids or embeddings of one side; its padding mask must be there, if only as None."""
    ids, embeds, length = f"{side}_token_ids", f"{side}_inputs_embeds", f"S{side[0]}"
    if (given.get(embeds) is None) == (given.get(ids) is None):
        both = f"{embeds} is given beside {ids}; it takes one of the two"
        raise ValueError(f"{ids} is missing; it takes (B, {length}) integers" if given.get(ids) is None else both)
    if f"{side}_padding_mask" not in given:
        raise ValueError(f"{side}_padding_mask is missing; it takes (B, {length}), or None where nothing is padding")
    if given.get(ids) is None:
        size = (None, None, config["hidden_dim"])
        states = model_inputs.states(given[embeds], embeds, f"(B, {length}, D)", size, like)
        return StackCall(embeds=states, visible=EVERYTHING)
    vocabulary = config["vocabulary_size"]
    tokens = model_inputs.ids(given[ids], ids, f"(B, {length})", (None, None), vocabulary, like.device)
    return StackCall(tokens, visible=EVERYTHING)


def _source(given: dict[str, Any], call: Call, b: int, config: dict[str, Any], like: Tensor) -> None:
    """Where cross-attention's keys come from: tokens, states of an earlier call, or the cache."""
    cache = call.decoder.cache
    if cache is not None and cache.cross[0] is not None:
        for name in (*ENCODER_INPUTS, "encoder_sequence_output"):
            if given.get(name) is not None:
                raise ValueError(f"{name} is given, but the cache holds the encoder's keys already; it takes None then")
        call.decoder.memory_mask = cache.encoder_mask
        return
    states = given.get("encoder_sequence_output")
    if states is None:
        call.encoder = read_encoder(given, config, like)
        tokens = call.encoder.token_ids if call.encoder.embeds is None else call.encoder.embeds
        assert tokens is not None
        if tokens.shape[0] != b:
            name = "encoder_token_ids" if call.encoder.embeds is None else "encoder_inputs_embeds"
            raise ValueError(f"{name} has {tokens.shape[0]} rows; it takes decoder_token_ids' batch size, {b}")
        call.decoder.memory_mask = call.encoder.visible.padding_mask
    else:
        for name in ("encoder_token_ids", "encoder_inputs_embeds"):
            if given.get(name) is not None:
                raise ValueError(f"encoder_sequence_output is given beside {name}; it takes one of the two")
        if "encoder_padding_mask" not in given:
            raise ValueError("encoder_padding_mask is missing; it takes (B, Se), or None where nothing is padding")
        size = (b, None, config["hidden_dim"])
        call.memory = model_inputs.states(states, "encoder_sequence_output", "(B, Se, D)", size, like)
        mask = given["encoder_padding_mask"]
        if mask is not None:
            shape = tuple(call.memory.shape[:2])
            mask = model_inputs.mask(mask, "encoder_padding_mask", "(B, Se)", shape, like.device)
        call.decoder.memory_mask = mask
    if cache is not None:
        cache.encoder_mask = call.decoder.memory_mask


def collect(call: Call, given: dict[str, Any]) -> None:
    """Lists for what the flags ask for, of both stacks; the encoder's only where it runs."""
    for flag, what in (("return_hidden_states", "hidden_states"), ("return_attentions", "attentions")):
        for side, stack in (("encoder", call.encoder), ("decoder", call.decoder)):
            if given.get(flag) and stack is not None:
                found: list[torch.Tensor] = []
                setattr(stack, what, found)
                call.asked[f"{side}_{what}"] = found
    if given.get("return_attentions") and call.decoder is not None:
        call.decoder.cross_attentions = call.asked["cross_attentions"] = []
