"""Which modules replace transformers' T5Attention, T5DenseActDense and T5DenseGatedActDense by hand?

They have the same constructors, parameter names and results. A config is any object with T5Config's attributes; transformers
is not imported. The drop-in class and fuse_ share `attend`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..activations import ACTIVATIONS, SPELLINGS, canonical
from ..kernels.reference.relative_bias import buckets
from ..ops import RelativeBias, relative_bias
from ..rules import its_kind
from .attention import Visibility, additive
from .layers import Linear, feed_forward, gated_feed_forward
from .quantized import dtype_of

# Keywords that transformers' layers pass to every attention and that do not change it
_INERT = frozenset({
    "use_cache", "output_hidden_states", "output_router_logits", "num_items_in_batch", "position_ids", "return_dict",
})  # fmt: skip


# (query, key, value (B, H, S, d), position bias) -> (B, Sq, H, d) and, on request, the probabilities
Compute = Callable[[Tensor, Tensor, Tensor, "RelativeBias | Tensor | None"], "tuple[Tensor, Tensor | None]"]


def attend(
    module: Any,
    hidden_states: Tensor,
    key_value_states: Tensor | None,
    position_bias: RelativeBias | Tensor | None,
    cache: Any,
    compute: Compute,
    *,
    hands_on_table: bool = True,
    reads_table: bool = True,
    cache_position: Tensor | None = None,
) -> tuple[Tensor, RelativeBias | Tensor | None, Tensor | None]:
    """T5Attention's forward without its output projection.

    Args:
        module: transformers' T5Attention or ours.
        hidden_states, key_value_states, position_bias, cache: as T5Attention's.
        compute: the attention itself.
        hands_on_table: whether later layers can read a RelativeBias. reads_table: whether `compute` can.
        cache_position: (Sq,), the queries' positions, which older transformers releases pass to caches and compute_bias.

    Returns:
        (B, Sq, H * d), the position bias for later layers, and the probabilities that `compute` returned, or None.
    """
    past = cache.get_seq_length(module.layer_idx) if cache is not None else 0
    past = past.clone() if isinstance(past, Tensor) else past  # a StaticCache's own counter; its update changes it
    query = _heads(module.q(hidden_states), module.key_value_proj_dim)
    key, value = _keys_and_values(module, hidden_states, key_value_states, cache, cache_position)
    if position_bias is None and module.has_relative_attention_bias:
        # Not a copy: layers that are recomputed in the backward then give the parameter their gradients.
        table = module.relative_attention_bias.weight
        if hands_on_table and _kernel_reads(table, past, query, key):
            position_bias = RelativeBias(table, not module.is_decoder, module.relative_attention_max_distance)
        else:
            sizes = query.shape[2], key.shape[2]
            where = {"past_seen_tokens": past} if cache_position is None else {"cache_position": cache_position}
            position_bias = module.compute_bias(*sizes, device=query.device, **where)
    bias = position_bias
    if isinstance(bias, RelativeBias) and not (reads_table and _kernel_reads(bias.table, past, query, key)):
        table, bidirectional, distance = bias
        options: dict[str, Any] = {"bidirectional": bidirectional, "max_distance": distance}
        bias = relative_bias(table, query.shape[2], key.shape[2], query_offset=int(past), **options)
    seen, weights = compute(query, key, value, bias)
    return seen.flatten(2), position_bias, weights


def _keys_and_values(module, hidden_states, key_value_states, cache, cache_position) -> tuple[Tensor, Tensor]:
    """(B, H, Sk, d) each, through the cache if there is one. Cross-attention writes its keys into the cache only once."""
    is_cross, index, both = key_value_states is not None, module.layer_idx, hasattr(cache, "cross_attention_cache")
    if both and is_cross and cache.is_updated.get(index):
        layer = cache.cross_attention_cache.layers[index]
        return layer.keys, layer.values
    states = key_value_states if is_cross else hidden_states
    key, value = (_heads(projection(states), module.key_value_proj_dim) for projection in (module.k, module.v))
    if cache is not None:
        own = (cache.cross_attention_cache if is_cross else cache.self_attention_cache) if both else cache
        where = () if cache_position is None or is_cross else ({"cache_position": cache_position},)
        key, value = own.update(key, value, index, *where)
        if both and is_cross:
            cache.is_updated[index] = True
    return key, value


def _heads(x: Tensor, size: int) -> Tensor:
    """(B, S, H * d) -> (B, H, S, d)."""
    return x.view(*x.shape[:2], x.shape[2] // size, size).transpose(1, 2)  # -1 would be ambiguous for an empty tensor


def _kernel_reads(table: Tensor, past: Any, query: Tensor, key: Tensor) -> bool:
    """Whether the kernel can compute the bias: the last query has the last key's position. A StaticCache has more keys."""
    if isinstance(past, Tensor) or past + query.shape[2] != key.shape[2]:
        return False
    return table.dtype in (torch.float32, query.dtype)


class T5Attention(nn.Module):
    """transformers' T5Attention (Raffel et al. 2020, section 2.1). It has no linear biases and does not scale the scores. The
    kernel adds a bias by relative position to them.

    Args:
        config: d_model, d_kv, num_heads, dropout_rate, is_decoder, relative_attention_num_buckets and
            relative_attention_max_distance.
        has_relative_attention_bias: whether this layer has the table, as the first of a stack does. The parameters are
            q, k, v.weight (H * d, D), o.weight (D, H * d) and relative_attention_bias.weight (num_buckets, H).
        layer_idx: this layer's place in a cache.
        is_causal: without a mask, each of several queries sees the keys up to its own.
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
            mask: (B or 1, H or 1, Sq or 1, Sk), bool (True: may look), or added to the scores. If it is None, is_causal
                decides.
            key_value_states: (B, Sk, D), the source of keys and values.
            position_bias: an earlier layer's: a pyfused.RelativeBias, or a dense (B or 1, H, Sq, Sk). None means this
                layer's table, if it has one.
            past_key_values: transformers' Cache, EncoderDecoderCache included; gets this layer's keys and values.
            output_attentions: also returns the probabilities, computed in plain PyTorch.

        Returns:
            A triple. First the result (B, Sq, D). A query that may see no key gets zeros from the attention; transformers'
            result depends on its implementation. Second the position bias for later layers: position_bias itself; else a
            RelativeBias of this layer's table; else None, where transformers returns zeros. It is dense with a cache of
            fixed size, whose keys reach beyond the present tokens. Third the probabilities (B, H, Sq, Sk) before dropout,
            or None.

        Raises:
            TypeError: an unknown keyword that may concern attention. ValueError: a mask of another rank.
        """
        for name, value in kwargs.items():
            if name not in _INERT and value is not None:
                raise TypeError(f"{name} is {type(value).__name__}; T5Attention does not know it and takes None")
        if mask is not None and mask.dim() != 4:
            raise ValueError(f"mask has shape {tuple(mask.shape)}; it takes (B or 1, H or 1, Sq or 1, Sk)")

        def compute(query, key, value, bias):
            visible = _visible(query, mask, bias, self.is_causal and mask is None and query.shape[2] > 1)
            out = visible.attend(query, key, value, scale=1.0, dropout_p=self.dropout if self.training else 0.0)
            return out.transpose(1, 2), visible.probabilities(query, key, 1.0) if output_attentions else None

        out, position_bias, weights = attend(
            self, hidden_states, key_value_states, position_bias, past_key_values, compute
        )
        return self.o(out), position_bias, weights

    def compute_bias(
        self, query_length: int, key_length: int, device: Any = None, past_seen_tokens: int | Tensor = 0
    ) -> Tensor:
        """The table's bias, (1, H, Sq, Sk), for queries from position past_seen_tokens on. The position may be a tensor, so
        that the host need not wait for its value."""
        sizes = self.relative_attention_num_buckets, not self.is_decoder, self.relative_attention_max_distance
        bucket = buckets(query_length, key_length, *sizes, past_seen_tokens, device)
        return self.relative_attention_bias(bucket).permute(2, 0, 1)[None]

    def extra_repr(self) -> str:
        return f"num_heads={self.n_heads}, head_size={self.key_value_proj_dim}, dropout={self.dropout}"


def _visible(query: Tensor, mask: Tensor | None, bias: RelativeBias | Tensor | None, is_causal: bool) -> Visibility:
    """Visibility from transformers' mask and position bias."""
    padding = dense = None
    if mask is not None and mask.dtype == torch.bool and mask.shape[1:3] == (1, 1):
        padding = mask[:, 0, 0].expand(query.shape[0], -1)
    elif mask is not None:
        dense = additive(mask, query.dtype)
    if isinstance(bias, RelativeBias):
        return Visibility(is_causal, padding, dense, bias)
    if bias is not None:
        bias = additive(bias, query.dtype)
        dense = bias if dense is None else bias + dense
    return Visibility(is_causal, padding, dense)


class _Sizes(NamedTuple):
    """A feed-forward network's sizes and options."""

    hidden_dim: int
    intermediate_dim: int
    activation: str
    dropout: float
    bias: bool


def _sizes(config: Any, intermediate_dim: int | None, **options: Any) -> _Sizes:
    """Reads a T5Config, or the written-out sizes: `config` is hidden_dim then."""
    if intermediate_dim is not None:
        chosen: dict[str, Any] = {"activation": "gelu_tanh", "dropout": 0.0, "bias": True}
        chosen |= {name: value for name, value in options.items() if value is not None}
        return _Sizes(config, intermediate_dim, canonical(chosen["activation"]), chosen["dropout"], chosen["bias"])
    if not hasattr(config, "dense_act_fn"):
        raise TypeError(
            f"config is {its_kind(config)}; it takes a T5Config, or hidden_dim beside intermediate_dim"
        )
    for name, value in options.items():
        if value is not None:
            raise TypeError(f"{name} is {value!r} beside a config, which says it; it takes None then")
    row = SPELLINGS.get(config.dense_act_fn)
    name = canonical(config.dense_act_fn if row is None else row.name)
    return _Sizes(config.d_model, config.d_ff, name, config.dropout_rate, False)


class FeedForward(nn.Module):
    """wo(dropout(activation(wi(x)))): transformers' T5DenseActDense. It is one operator without dropout.

    Args:
        config: a T5Config; its d_model, d_ff, dense_act_fn and dropout_rate give all but device and dtype. Or hidden_dim,
            D, together with the next arguments.
        intermediate_dim: F. The parameters are wi.{weight (F, D), bias (F,)} and wo.{weight (D, F), bias (D,)}.
        activation: "relu", "silu", "tanh", "gelu" (exact), "gelu_tanh" (alias "gelu_new") or "quick_gelu"; None
            is "gelu_tanh".
        bias: of both maps; True if None. With a config there is no bias.
        dropout: of the activation's output, in training; 0 if None.

    Raises:
        ValueError: an unknown activation. TypeError: config is neither of the two, or sets what another argument sets
            too.
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
        """(..., D), and a residual (..., D) to add, or None -> (..., D)."""
        dropout = self.dropout if self.training else 0.0
        if dtype_of(self.wo) != dtype_of(self.wi):
            hidden = ACTIVATIONS[self.activation].function(self.wi(hidden_states))
            return _wide(hidden, self.wo, dropout, residual)
        return feed_forward(hidden_states, self.wi, self.wo, self.activation, dropout, residual)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, dropout={self.dropout}"


class GatedFeedForward(nn.Module):
    """wo(dropout(activation(wi_0(x)) * wi_1(x))): transformers' T5DenseGatedActDense. It is one operator without dropout.

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
        """(..., D), and a residual (..., D) to add, or None -> (..., D)."""
        dropout = self.dropout if self.training else 0.0
        if dtype_of(self.wo) != dtype_of(self.wi_0):
            hidden = ACTIVATIONS[self.activation].function(self.wi_0(hidden_states)) * self.wi_1(hidden_states)
            return _wide(hidden, self.wo, dropout, residual)
        maps = self.wi_0, self.wi_1, self.wo
        return gated_feed_forward(hidden_states, *maps, self.activation, dropout, residual)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, dropout={self.dropout}"


def _wide(hidden: Tensor, wo: nn.Module, dropout: float, residual: Tensor | None) -> Tensor:
    """In float16 models transformers keeps T5's wo in float32. Its input is converted, and its result is float32."""
    hidden = nn.functional.dropout(hidden, dropout) if dropout else hidden
    out: Tensor = wo(hidden.to(dtype_of(wo)))
    return out if residual is None else out + residual
