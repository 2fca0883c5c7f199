"""Which modules take the place of transformers' T5Attention, T5DenseActDense and T5DenseGatedActDense, by hand?

Their constructors, parameter names and results. A config is anything that has T5Config's attributes: transformers itself is
not imported.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..activations import ACTIVATIONS, SPELLINGS, canonical
from ..kernels.reference import attention as reference
from ..kernels.reference.relative_bias import buckets
from ..ops import RelativeBias, attention
from .attention import bias_in
from .layers import Linear, feed_forward, gated_feed_forward

# What transformers' layers hand down to every attention, and what has no bearing on it
_INERT = frozenset({
    "use_cache", "output_hidden_states", "output_router_logits", "num_items_in_batch", "position_ids", "return_dict",
})  # fmt: skip


class T5Attention(nn.Module):
    """transformers' T5Attention (Raffel et al. 2020, section 2.1): no biases, scores that are not scaled, and a bias of the
    scores by relative position, which is computed inside the kernel.

    Args:
        config: d_model, d_kv, num_heads, dropout_rate, is_decoder, relative_attention_num_buckets and
            relative_attention_max_distance.
        has_relative_attention_bias: whether this layer has the table, as the first of a stack does. The parameters are
            q, k, v.weight (H * d, D), o.weight (D, H * d) and relative_attention_bias.weight (num_buckets, H).
        layer_idx: this layer's place in a cache.
        is_causal: what holds without a mask: a query of several sees the keys up to its own.
    """

    def __init__(
        self,
        config: Any,
        has_relative_attention_bias: bool = False,
        layer_idx: int | None = None,
        is_causal: bool = False,
    ):
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, is_causal
        self.is_decoder = bool(config.is_decoder)
        self.has_relative_attention_bias = has_relative_attention_bias
        self.relative_attention_num_buckets = config.relative_attention_num_buckets
        self.relative_attention_max_distance = config.relative_attention_max_distance
        self.d_model, self.key_value_proj_dim, self.n_heads = config.d_model, config.d_kv, config.num_heads
        self.dropout = config.dropout_rate
        self.inner_dim = self.n_heads * self.key_value_proj_dim
        self.q = Linear(self.d_model, self.inner_dim, bias=False)
        self.k = Linear(self.d_model, self.inner_dim, bias=False)
        self.v = Linear(self.d_model, self.inner_dim, bias=False)
        self.o = Linear(self.inner_dim, self.d_model, bias=False)
        if has_relative_attention_bias:
            self.relative_attention_bias = nn.Embedding(self.relative_attention_num_buckets, self.n_heads)

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        position_bias: RelativeBias | Tensor | None = None,
        past_key_values: Any = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, RelativeBias | Tensor | None, Tensor | None]:
        """Self-attention, or with key_value_states attention to an encoder.

        Args:
            hidden_states: (B, Sq, D).
            mask: (B or 1, H or 1, Sq or 1, Sk), bool (True: may look), or added to the scores. Where it is None, is_causal
                decides.
            key_value_states: (B, Sk, D), what keys and values are computed of.
            position_bias: what an earlier layer returned: a pyfused.RelativeBias, or a dense (B or 1, H, Sq, Sk). If
                None, this layer's table counts, if it has one.
            past_key_values: transformers' Cache, EncoderDecoderCache included; gets this layer's keys and values.
            output_attentions: computes the probabilities, by plain PyTorch, to return them.

        Returns:
            The result (B, Sq, D). The position bias for the layers after this one: position_bias itself; else a
            RelativeBias of this layer's table, which stays a table until it is inside a kernel; else None, where
            transformers returns zeros. With a cache of fixed size, whose keys reach beyond the tokens so far, it is dense.
            And the probabilities (B, H, Sq, Sk) before dropout, or None. A query that may see no key gets zeros from the
            attention, where transformers' result depends on its implementation.

        Raises:
            TypeError: a keyword that says something about attention which this module does not know. ValueError: a mask
            of another rank.
        """
        for name, value in kwargs.items():
            if name not in _INERT and value is not None:
                raise TypeError(f"{name} is {type(value).__name__}; T5Attention does not know it and takes None")
        if mask is not None and mask.dim() != 4:
            raise ValueError(f"mask has shape {tuple(mask.shape)}; it takes (B or 1, H or 1, Sq or 1, Sk)")
        past = past_key_values.get_seq_length(self.layer_idx) if past_key_values is not None else 0
        past = past.clone() if isinstance(past, Tensor) else past  # a StaticCache counts in place
        query = self._heads(self.q(hidden_states))
        key, value = self._keys(hidden_states, key_value_states, past_key_values)
        sq, sk = query.shape[2], key.shape[2]
        if position_bias is None and self.has_relative_attention_bias:
            table = self.relative_attention_bias.weight
            position_bias = RelativeBias(table, not self.is_decoder, self.relative_attention_max_distance)
            if isinstance(past, Tensor) or past + sq != sk:  # the kernel takes the last key for the last query's
                position_bias = _dense(position_bias, sq, sk, past)
        options = _masked(query, mask, position_bias, self.is_causal and mask is None and sq > 1)
        dropout = self.dropout if self.training else 0.0
        out = attention(query, key, value, scale=1.0, dropout_p=dropout, **options)
        weights = _probabilities(query, key, options) if output_attentions else None
        return self.o(out.transpose(1, 2).flatten(2)), position_bias, weights

    def _heads(self, x: Tensor) -> Tensor:
        """(B, S, H * d) -> (B, H, S, d)."""
        return x.unflatten(-1, (self.n_heads, self.key_value_proj_dim)).transpose(1, 2)

    def _keys(self, hidden_states, key_value_states, cache) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, Sk, d), with those that the cache has, or from it alone: an encoder's stay the same."""
        is_cross = key_value_states is not None
        both = hasattr(cache, "cross_attention_cache")
        own = cache
        if both:
            own = cache.cross_attention_cache if is_cross else cache.self_attention_cache
        if is_cross and both and cache.is_updated.get(self.layer_idx):
            return own.layers[self.layer_idx].keys, own.layers[self.layer_idx].values
        states = key_value_states if is_cross else hidden_states
        key, value = self._heads(self.k(states)), self._heads(self.v(states))
        if own is not None:
            key, value = own.update(key, value, self.layer_idx)
            if is_cross and both:
                cache.is_updated[self.layer_idx] = True
        return key, value

    def extra_repr(self) -> str:
        return f"num_heads={self.n_heads}, head_size={self.key_value_proj_dim}, dropout={self.dropout}"


def _dense(bias: RelativeBias, sq: int, sk: int, past: int | Tensor) -> Tensor:
    """(1, H, Sq, Sk) for queries from position `past` on, which may be a tensor so that nothing waits for its value."""
    table, bidirectional, max_distance = bias
    bucket = buckets(sq, sk, table.shape[0], bidirectional, max_distance, past, table.device)
    return nn.functional.embedding(bucket, table).permute(2, 0, 1)[None]


def _masked(query, mask, position_bias, is_causal) -> dict[str, Any]:
    """Mask and position bias as pyfused.attention takes them."""
    options: dict[str, Any] = {"is_causal": is_causal}
    bias = None
    if isinstance(position_bias, RelativeBias):
        options["relative_bias"] = position_bias
    elif position_bias is not None:
        bias = bias_in(position_bias, query.dtype)
    if mask is not None and mask.dtype == torch.bool and mask.shape[1:3] == (1, 1):
        options["padding_mask"] = mask[:, 0, 0].expand(query.shape[0], -1)
    elif mask is not None:
        if mask.dtype == torch.bool:
            mask = query.new_zeros(mask.shape).masked_fill(~mask, float("-inf"))
        mask = bias_in(mask, query.dtype)
        bias = mask if bias is None else bias + mask
    return {**options, "attn_bias": bias}


def _probabilities(query, key, options) -> Tensor:
    """(B, H, Sq, Sk), by the reference: the operator never has them in memory."""
    padding, relative = options.get("padding_mask"), options.get("relative_bias") or ()
    scores = reference.scores(query, key, options["is_causal"], padding, options["attn_bias"], 1.0, *relative)
    return reference.probabilities(scores).to(query.dtype)


class _Sizes(NamedTuple):
    """What a feed-forward network is made of."""

    hidden_dim: int
    intermediate_dim: int
    activation: str
    dropout: float
    bias: bool


def _sizes(config: Any, intermediate_dim: int | None, **options: Any) -> _Sizes:
    """Of a T5Config, or as they are written out: `config` is hidden_dim then."""
    if intermediate_dim is not None:
        chosen: dict[str, Any] = {"activation": "gelu_tanh", "dropout": 0.0, "bias": True}
        chosen |= {name: value for name, value in options.items() if value is not None}
        return _Sizes(config, intermediate_dim, canonical(chosen["activation"]), chosen["dropout"], chosen["bias"])
    if not hasattr(config, "dense_act_fn"):
        raise TypeError(
            f"config is a {type(config).__name__}; it takes a T5Config, or hidden_dim beside intermediate_dim"
        )
    for name, value in options.items():
        if value is not None:
            raise TypeError(f"{name} is {value!r} beside a config, which says it; it takes None then")
    row = SPELLINGS.get(config.dense_act_fn)
    name = canonical(config.dense_act_fn if row is None else row.name)
    return _Sizes(config.d_model, config.d_ff, name, config.dropout_rate, False)


class FeedForward(nn.Module):
    """wo(dropout(activation(wi(x)))): transformers' T5DenseActDense, without dropout in one operator.

    Args:
        config: a T5Config, whose d_model, d_ff, dense_act_fn and dropout_rate say all but device and dtype. Or, with the
            arguments that follow, hidden_dim, D.
        intermediate_dim: F. The parameters are wi.{weight (F, D), bias (F,)} and wo.{weight (D, F), bias (D,)}.
        activation: "relu", "silu", "tanh", "gelu" (exact) or "gelu_tanh" (alias "gelu_new"), which None is.
        bias: of both maps; True if None. By a config there is none.
        dropout: of the activation's output, in training; 0 if None.

    Raises:
        ValueError: an activation that is none of these. TypeError: config is neither of the two, or says what another
            argument says too.
    """

    def __init__(
        self,
        config: Any,
        intermediate_dim: int | None = None,
        activation: str | None = None,
        *,
        bias: bool | None = None,
        dropout: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        d, f, self.activation, self.dropout, bias = _sizes(
            config, intermediate_dim, activation=activation, dropout=dropout, bias=bias
        )
        self.wi = Linear(d, f, bias, device=device, dtype=dtype)
        self.wo = Linear(f, d, bias, device=device, dtype=dtype)

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None) -> Tensor:
        """(..., D), and a residual (..., D) that is added, or None -> (..., D)."""
        dropout = self.dropout if self.training else 0.0
        if self.wo.weight.dtype != self.wi.weight.dtype:
            hidden = ACTIVATIONS[self.activation].function(self.wi(hidden_states))
            return _wide(hidden, self.wo, dropout, residual)
        return feed_forward(hidden_states, self.wi, self.wo, self.activation, dropout, residual)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, dropout={self.dropout}"


class GatedFeedForward(nn.Module):
    """wo(dropout(activation(wi_0(x)) * wi_1(x))): transformers' T5DenseGatedActDense, without dropout in one operator.

    Args:
        config, intermediate_dim, activation, dropout: as FeedForward's. The parameters are wi_0.weight (F, D), wi_1.weight
            (F, D) and wo.weight (D, F).

    Raises:
        ValueError, TypeError: as FeedForward.
    """

    def __init__(
        self,
        config: Any,
        intermediate_dim: int | None = None,
        activation: str | None = None,
        *,
        dropout: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        d, f, self.activation, self.dropout, _ = _sizes(
            config, intermediate_dim, activation=activation, dropout=dropout
        )
        self.wi_0 = Linear(d, f, False, device=device, dtype=dtype)
        self.wi_1 = Linear(d, f, False, device=device, dtype=dtype)
        self.wo = Linear(f, d, False, device=device, dtype=dtype)

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None) -> Tensor:
        """(..., D), and a residual (..., D) that is added, or None -> (..., D)."""
        dropout = self.dropout if self.training else 0.0
        if self.wo.weight.dtype != self.wi_0.weight.dtype:
            hidden = ACTIVATIONS[self.activation].function(self.wi_0(hidden_states)) * self.wi_1(hidden_states)
            return _wide(hidden, self.wo, dropout, residual)
        maps = self.wi_0, self.wi_1, self.wo
        return gated_feed_forward(hidden_states, *maps, self.activation, dropout, residual)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, dropout={self.dropout}"


def _wide(hidden: Tensor, wo: Linear, dropout: float, residual: Tensor | None) -> Tensor:
    """transformers keeps T5's wo in float32 beside float16: what it takes is converted, and its result is float32."""
    hidden = nn.functional.dropout(hidden, dropout) if dropout else hidden
    out = wo(hidden.to(wo.weight.dtype))
    return out if residual is None else out + residual
