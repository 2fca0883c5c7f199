"""What does attn_implementation="pyfused" compute in a transformers layer? pyfused.attention with the layer's arguments."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ... import notices
from ...nn import EVERYTHING, Visibility
from ...nn.attention import additive
from ...ops import RelativeBias, attention
from ...ops import relative_bias as materialise
from ...ops.attention import MAX_HEAD_SIZE
from ...own_forward import original
from ...rules import its_kind
from ...setting import set_to
from .blind import alike
from .masks import is_zero, read_mask, with_blind_queries, with_dense_bias, with_position_bias
from .releases import named, output_capturing

# Arguments that change the result and are not supported. A model passes one only if it has that feature.
REFUSED = {
    "softcap": "scores with a soft cap",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "cache": "a paged cache",
    "indices": "a choice of keys for each query (sparse attention)",
    "block_indices": "a choice of keys for each query (sparse attention)",
    "decoder_head_mask": "the head mask of a decoder",
    "cross_attn_head_mask": "the head mask of cross-attention",
}


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | Tensor | None = None,
    is_causal: bool | None = None,
    *,
    relative_bias: RelativeBias | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' AttentionInterface "pyfused".

    Args:
        module: the attention layer. Its is_causal, layer_idx and config are read if present.
        query: (B, H, Tq, D). key, value: (B, Hkv, Sk, D); Hkv divides H.
        attention_mask: None, or a mask that broadcasts to (B, H, Tq, Sk). A bool mask is True where a query sees a key; a
            float mask is added to the scores. With None a query sees all keys. If the layer is causal and there is
            more than one query, it sees the keys up to its own position.
        dropout: the chance that a probability becomes 0.
        scaling: multiplies the scores; 1 / sqrt(D) if None.
        is_causal: overrides the module's own. Both count only if attention_mask is None. A layer that fuse_ fused gets the
            masks of the model's own implementation and reads None the same way: with sdpa the queries' own keys are the
            first Tq; with eager code every key is visible.
        relative_bias: T5's bias table; query i has position i + Sk - Tq.
        position_bias: added to the scores, broadcasts to (B, H, Tq, Sk).
        **kwargs: the model's other arguments. head_mask, cu_seq_lens_q with cu_seq_lens_k, and output_attentions are
            honoured. An argument in REFUSED raises; the rest does not concern attention.

    Returns:
        (output (B, Tq, H, D), probabilities (B, H, Tq, Sk) or None if the model does not collect attentions).

    Raises:
        TypeError, ValueError: an argument does not fit or is not supported.
    """
    for name, what in REFUSED.items():
        if kwargs.get(name) is not None:
            raise ValueError(f'{name}: attn_implementation="pyfused" has no {what}; use attn_implementation="eager"')
    if isinstance(scaling, Tensor):
        query, scaling = query * scaling, 1.0
    if query.shape[0] != key.shape[0]:
        query = query.expand(key.shape[0], -1, -1, -1)  # learned queries, one row for all
    head_mask = _read_head_mask(module, kwargs.get("head_mask"), query.shape[1])
    packed = None
    # T5's cross-attention has a bias of zeros, which its fused layer leaves out. On a GPU masks are not read: there a query
    # that sees no key gets zeros.
    biased = position_bias is not None or relative_bias is not None or hasattr(module, "has_relative_attention_bias")
    biased = biased and query.is_cpu
    if attention_mask is not None:
        visible = read_mask(attention_mask, query, key, biased)
    else:
        packed = _read_packing(kwargs, query, key)
        visible = _without_mask(module, query, key, is_causal, kwargs.get("sliding_window"))
    if visible.keys is not None and visible.keys < key.shape[2]:
        key, value, position_bias = _first_keys(visible.keys, key, value, position_bias)
    if position_bias is not None and is_zero(position_bias):
        position_bias = None
    if packed is not None and position_bias is not None:
        raise ValueError("cu_seq_lens_q: packed sequences and position_bias do not go together; pass attention_mask")
    if relative_bias is not None:
        visible = replace(visible, relative_bias=relative_bias)
    given = query, key, value, attention_mask, visible, position_bias, biased, packed
    return _compute(module, *given, dropout, scaling, head_mask, kwargs)


def _without_mask(module, query, key, is_causal, window):
    queries, keys = query.shape[2], key.shape[2]
    if window is not None and keys > window:
        raise ValueError(
            f"attention_mask is None, sliding_window is {window} and there are {keys} keys; it takes a mask that has the "
            "window"
        )
    masks = getattr(getattr(module, "config", None), "masks", None)  # of a FusedConfig
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    # Eager code sees every key without a mask (Splinter's says no is_causal), but an older GPT-2's has a triangle of its own.
    triangle = getattr(module, "bias", None)
    sees_all = masks == "eager" and not (isinstance(triangle, Tensor) and triangle.dtype == torch.bool)
    if queries == 1 or not causal or sees_all:
        return EVERYTHING
    # sdpa masks: transformers passes no mask in the first call with a static cache; the keys after the queries' own are empty.
    # Our masks: the model has cut its queries (Gemma 4 does), and their own keys come last.
    if queries > keys or (queries < keys and masks != "sdpa"):
        raise ValueError(
            f"attention_mask is None in a causal layer with {queries} queries and {keys} keys, which does not say which of "
            "the keys are the queries' own; it takes a mask"
        )
    return Visibility(is_causal=True, keys=queries)


def _compute(
    module, query, key, value, mask, visible, position_bias, biased, packed, dropout, scaling, head_mask, kwargs
):  # fmt: skip
    plain = (query, key, visible, position_bias, packed)
    if getattr(module, "reorder_and_upcast_attn", False) and hasattr(module, "_upcast_and_reordered_attn"):
        notices.once("reorder_and_upcast_attn: attention runs in transformers' own code, in float32")
        bias, dead = _dense_bias(*plain)
        output, weights = module._upcast_and_reordered_attn(query, key, value, bias)
        if dead is not None:
            output, weights = output.masked_fill(dead.transpose(1, 2), 0.0), weights.masked_fill(dead, 0.0)
        if head_mask is not None:
            output, weights = output * head_mask[:, None], weights * head_mask[:, None, None]
        return output, weights
    if scaling is None and (reason := reason_to_scale(module)):
        raise ValueError(f'{reason}; use attn_implementation="eager"')
    wanted = attentions_wanted(module, kwargs)
    if wanted or dropout >= 1.0:
        if wanted:
            notices.once("output_attentions: attention runs in plain PyTorch, which has the probabilities")
        return _with_weights(query, key, value, _dense_bias(*plain), dropout, scaling, head_mask)
    if query.shape[3] > MAX_HEAD_SIZE or value.shape[3] != query.shape[3]:
        notices.once(
            f"head sizes {query.shape[3]} and {value.shape[3]}: attention runs on transformers' sdpa; the kernels take "
            f"one size for keys and values, up to {MAX_HEAD_SIZE}"
        )
        bias, dead = _dense_bias(*plain)
        output, _ = sdpa_attention_forward(module, query, key, value, bias, dropout, scaling, False)
        if dead is not None:
            output = output.masked_fill(dead.transpose(1, 2), 0.0)
    else:
        blind = None
        if visible.attn_bias is not None and not dropout and not _learned(visible, position_bias):
            found = with_blind_queries(mask, query, key, biased)
            if found is not None:
                visible, blind = replace(found[0], relative_bias=visible.relative_bias), found[1]
        every = key, value
        if visible.keys is not None and visible.keys < key.shape[2]:
            key, value, position_bias = _first_keys(visible.keys, key, value, position_bias)
        if position_bias is not None:
            visible = with_position_bias(visible, position_bias, query, key)
        output = attention(
            query,
            key,
            value,
            is_causal=visible.is_causal,
            padding_mask=visible.padding_mask,
            attn_bias=visible.attn_bias,
            relative_bias=visible.relative_bias,
            scale=scaling,
            dropout_p=dropout,
            cu_seqlens=None if packed is None else packed[0],
            max_seqlen=None if packed is None else packed[1],
        ).transpose(1, 2)
        if blind is not None:
            scale = query.shape[3] ** -0.5 if scaling is None else scaling
            output = torch.where(blind[:, :, None, None], alike(query, *every, scale), output)
    return output if head_mask is None else output * head_mask[:, None], None


def _first_keys(count, key, value, position_bias):
    return key[:, :, :count], value[:, :, :count], None if position_bias is None else position_bias[..., :count]


def _learned(visible, position_bias):
    """Whether a bias has a gradient."""
    biases = position_bias, getattr(visible.relative_bias, "table", None)
    return torch.is_grad_enabled() and any(bias is not None and bias.requires_grad for bias in biases)


def _with_weights(query, key, value, dense, dropout, scaling, head_mask):
    """The same in plain PyTorch, softmax in float32. As in eager code, the probabilities include dropout and head mask."""
    bias, dead = dense
    group = query.shape[1] // key.shape[1]
    key, value = (t if group == 1 else t.repeat_interleave(group, 1) for t in (key, value))
    scores = query @ key.transpose(-1, -2) * (query.shape[3] ** -0.5 if scaling is None else scaling)
    if bias is not None:
        scores = scores + bias
    wide = torch.promote_types(query.dtype, torch.float32)
    weights = torch.softmax(scores, -1, dtype=wide).to(query.dtype)
    if dead is not None:
        weights = weights.masked_fill(dead, 0.0)
    weights = F.dropout(weights, dropout)
    if head_mask is not None:
        weights = weights * head_mask[:, None, None]
    return (weights @ value).transpose(1, 2), weights


def _dense_bias(query, key, visible, position_bias, packed):
    """(bias (B or 1, H or 1, Tq, Sk) for the fallbacks, mask (..., Tq, 1) of queries that see no key), or (None, None).
    A softmax over -inf alone is NaN, so such a query gets every key here. The caller sets its result to zero."""
    if position_bias is not None:
        visible = with_dense_bias(visible, position_bias, query.dtype)
    bias, (tq, sk) = visible.attn_bias, (query.shape[2], key.shape[2])
    hidden = None
    if visible.is_causal:
        places = torch.arange(sk, device=query.device)
        hidden = places > torch.arange(tq, device=query.device)[:, None] + sk - tq
    if visible.padding_mask is not None:
        padded = ~visible.padding_mask[:, None, None]
        hidden = padded if hidden is None else hidden | padded
    if packed is not None:
        text = torch.bucketize(torch.arange(tq, device=query.device), packed[0], right=True)
        other = text[:, None] != text
        hidden = other if hidden is None else hidden | other
    if visible.relative_bias is not None:
        table, bidirectional, distance = visible.relative_bias
        dense = materialise(table, tq, sk, bidirectional=bidirectional, max_distance=distance, query_offset=sk - tq)
        bias = _sum(dense.to(query.dtype), bias)
    bias = bias if hidden is None else _sum(additive(~hidden, query.dtype), bias)
    if bias is None:
        return None, None
    bias = bias[(None,) * (4 - bias.dim())]
    dead = (bias == -torch.inf).all(-1, keepdim=True)
    return bias.masked_fill(dead, 0.0), dead


def reason_to_scale(module: Any) -> str:
    """Why a scaling of None does not mean 1 / sqrt(D) in this layer; "" if it does. Older releases have GPT-2's other scales in
    its eager code alone."""
    if hasattr(module, "scaling") or getattr(module, "reorder_and_upcast_attn", False):
        return ""
    if getattr(module, "scale_attn_weights", True) and not getattr(module, "scale_attn_by_inverse_layer_idx", False):
        return ""
    return "scale_attn_weights and scale_attn_by_inverse_layer_idx count only in eager code in this release of transformers"


def _sum(a, b):
    return a if b is None else a + b


def _read_head_mask(module, head_mask, heads):
    """(H,): the factor for each head's output."""
    if head_mask is None:
        return None
    if not isinstance(head_mask, Tensor):
        raise TypeError(f"head_mask is {its_kind(head_mask)}; it takes a torch.Tensor")
    if head_mask.shape == (1, heads, 1, 1):  # this layer's, as older releases pass it
        return head_mask[0, :, 0, 0]
    config = getattr(module, "config", None)
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        raise ValueError(
            "head_mask: the model has cross-attention, which transformers does not pass it to; it takes None"
        )
    layer = getattr(module, "layer_idx", None)
    if head_mask.dim() == 2 and head_mask.shape[0] == 1:
        head_mask = head_mask[0]
    elif head_mask.dim() == 2:
        if layer is None:
            raise ValueError(
                f"head_mask has shape {tuple(head_mask.shape)}, but {type(module).__name__} does not know which layer it "
                f"is; it takes ({heads},)"
            )
        if layer >= head_mask.shape[0]:
            raise ValueError(
                f"head_mask has {head_mask.shape[0]} rows; it takes one a layer, and this is layer {layer}"
            )
        head_mask = head_mask[layer]
    if head_mask.shape != (heads,):
        raise ValueError(f"head_mask has shape {tuple(head_mask.shape)}; it takes ({heads},) or (layers, {heads})")
    return head_mask


def _read_packing(kwargs, query, key):
    """(cu_seqlens, max_seqlen) of several texts packed into one row."""
    of_query, of_key = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    if of_query is None and of_key is None:
        return None
    if of_query is None or of_key is None:
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k go together; one of them is None")
    same = of_query is of_key or (of_query.shape == of_key.shape and torch.equal(of_query, of_key))
    if not same or query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise ValueError(
            f"cu_seq_lens_q, cu_seq_lens_k: queries {tuple(query.shape)} and keys {tuple(key.shape)} are packed differently; "
            "they take one row of the same texts"
        )
    longest = kwargs.get("max_length_q")
    return of_query.to(query.device), int(longest) if isinstance(longest, Tensor) else longest


_asked: ContextVar[bool] = ContextVar("whether a layer's caller wants attention weights", default=False)


def original_telling(module, args, kwargs):
    """Runs the class's own forward, which does not tell its attention function whether the weights are wanted."""
    if not named(module, args, kwargs).get("output_attentions"):
        return original(module, *args, **kwargs)
    with set_to(_asked, True):
        return original(module, *args, **kwargs)


def attentions_wanted(module, kwargs):
    """Whether the caller of a layer wants its attention weights."""
    if not torch.compiler.is_compiling() and _asked.get():
        return True
    if output_capturing is None and getattr(getattr(module, "config", None), "output_attentions", False):
        return True
    return bool(kwargs.get("output_attentions")) or any("attentions" in name for name in _collected())


def collects(kwargs):
    """Whether this call of a model asks for hidden states or attentions on the way."""
    return any(kwargs.get(name) for name in ("output_attentions", "output_hidden_states")) or bool(_collected())


def _collected():
    """The names of the outputs that transformers collects in this call."""
    collector = getattr(output_capturing, "_active_collector", None)
    if collector is None:
        return ()
    if torch.compiler.is_compiling():  # reading a ContextVar cannot be traced
        return (collector.global_var or ()) if collector.compiling else ()
    return collector.get() or ()
