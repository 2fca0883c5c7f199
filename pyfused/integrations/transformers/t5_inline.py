"""What does fuse_ replace in the T5 of older transformers releases, whose attention does without transformers' interface?

There the first layer adds the mask to the bias by relative position and hands the sum to the other layers. Layers return
attention weights only if asked, and the stack hands no further arguments on. So `hands_on_table` tells the first layer by a
context variable that all layers of this call read the table.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from ...nn.t5 import attend as attend_of_t5
from ...ops import RelativeBias, relative_bias
from ...own_forward import fused_forward, original
from ...setting import set_to
from ...tracing import tracing
from .attention import attend
from .releases import named, parameters
from .t5_tables import adds_residual, projected

_first: ContextVar[Any] = ContextVar("the first attention of a T5 stack whose layers all read the table", default=None)


def hands_on_table(stack: Any) -> AbstractContextManager[None]:
    """For one call of a stack: its first layer hands on the table in place of a tensor."""
    return set_to(_first, stack.block[0].layer[0].SelfAttention)


@fused_forward
def attention(module: Any, *args: Any, **kwargs: Any) -> Any:
    """pyfused.attention, the bias by relative position inside the kernel"""
    given = named(module, args, kwargs)
    found = _attended(module, **given)
    if found is None:
        return original(module, **_with_dense_bias(given))
    seen, *others = found
    return module.o(seen), *others


@fused_forward
def self_attention_layer(module: Any, *args: Any, **kwargs: Any) -> Any:
    """the norm, then the attention with pyfused.linear and the residual"""
    return _layer(module, module.SelfAttention, named(module, args, kwargs))


@fused_forward
def cross_attention_layer(module: Any, *args: Any, **kwargs: Any) -> Any:
    """the norm, then the attention with pyfused.linear and the residual"""
    return _layer(module, module.EncDecAttention, named(module, args, kwargs))


def _layer(module: Any, inner: Any, given: dict[str, Any]) -> Any:
    x = given["hidden_states"]
    if not adds_residual(module, inner, x):
        return original(module, **given)
    more = {name: value for name, value in given.items() if name not in ("hidden_states", "attention_mask")}
    found = _attended(inner, x, given.get("attention_mask"), norm=module.layer_norm, **more)
    if found is None:
        return original(module, **given)
    seen, *others = found
    return projected(inner.o, seen, x), *others


def _attended(
    module: Any,
    hidden_states: Tensor,
    mask: Tensor | None = None,
    key_value_states: Tensor | None = None,
    position_bias: Any = None,
    past_key_values: Any = None,
    layer_head_mask: Tensor | None = None,
    output_attentions: bool = False,
    cache_position: Tensor | None = None,
    query_length: Any = None,
    use_cache: bool = False,
    norm: Any = None,
    **others: Any,
) -> tuple[Any, ...] | None:
    """T5Attention's forward behind `norm`, if there is one, without the output projection: (B, S, H * d), the bias for the next
    layer, and the weights if they are asked for. None if the class's own forward must run; then no child has run yet."""
    makes_bias = position_bias is None and module.has_relative_attention_bias
    known = parameters(type(module))
    if getattr(module, "pruned_heads", None) or ("kwargs" not in known and others):
        return None
    if makes_bias and cache_position is None and "cache_position" in known:  # the class counts from query_length then
        return None
    is_dense = isinstance(position_bias, Tensor)  # then it has the mask

    def compute(query, key, value, bias):
        return attend(
            *(module, query, key, value, None if is_dense or mask is None else mask[..., : key.shape[2]]),
            dropout=module.dropout if module.training else 0.0,
            scaling=1.0,
            is_causal=False,
            head_mask=layer_head_mask,
            output_attentions=output_attentions,
            **({"relative_bias": bias} if isinstance(bias, RelativeBias) else {"position_bias": bias}),
        )

    if norm is not None:
        hidden_states = norm(hidden_states)
    seen, handed_on, weights = attend_of_t5(
        *(module, hidden_states, key_value_states, position_bias, past_key_values, compute),
        hands_on_table=makes_bias and not tracing() and _first.get() is module,
        cache_position=cache_position,
    )
    if makes_bias and isinstance(handed_on, Tensor) and mask is not None:
        handed_on = handed_on + mask[..., : handed_on.shape[-1]]
    return (seen, handed_on, weights) if output_attentions else (seen, handed_on)


def _with_dense_bias(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments with a tensor in place of a table."""
    bias, mask, x = given.get("position_bias"), given.get("mask"), given["hidden_states"]
    if not isinstance(bias, RelativeBias):
        return given
    cache, queries = given.get("past_key_values"), x.shape[1]
    past = 0 if cache is None else int(cache.get_seq_length())
    table, bidirectional, distance = bias
    options: dict[str, Any] = {"bidirectional": bidirectional, "max_distance": distance, "query_offset": past}
    dense = relative_bias(table, queries, past + queries, **options).to(x.dtype)
    return {**given, "position_bias": dense if mask is None else dense + mask[..., : past + queries]}
