"""What does fuse_ replace in transformers' ALBERT? The feed-forward, and the residuals before the norms.

The attention itself still goes through transformers' attention interface.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from transformers.models.albert import modeling_albert
from transformers.pytorch_utils import apply_chunking_to_forward

from ...ops import ffn, linear
from ...own_forward import Adapter, Forward, fused_forward, original
from .activations import activation_reason, kernel_activation
from .own_attention import attended, wants_more
from .plain_modules import drops, is_plain_linear, overridden
from .releases import full_name, interface, named, parameters


@fused_forward
def attention(module: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
    """the attention interface, pyfused.linear with the residual, then the norm"""
    dense = module.dense
    if drops(module.output_dropout) or not is_plain_linear(hidden_states, dense):
        return original(module, hidden_states, attention_mask, **kwargs)
    rows = hidden_states.shape[:-1]
    heads = (*rows, -1, module.attention_head_size)
    query, key, value = (m(hidden_states).view(heads).transpose(1, 2) for m in (module.query, module.key, module.value))
    function = interface(module.config._attn_implementation, modeling_albert.eager_attention_forward)
    seen, weights = function(
        *(module, query, key, value, attention_mask),
        dropout=module.attention_dropout.p if module.training else 0.0,
        scaling=module.scaling,
        **kwargs,
    )
    seen = seen.reshape(*rows, -1)
    return module.LayerNorm(linear(seen, dense.weight, dense.bias, residual=hidden_states)), weights


@fused_forward
def sdpa_attention(module: Any, *args: Any, **kwargs: Any) -> Any:
    """pyfused.attention, pyfused.linear with the residual, then the norm"""
    given, dense = named(module, args, kwargs), module.dense
    x = given["hidden_states"]
    more = wants_more(module, given, "hidden_states", "attention_mask")
    if more or drops(module.output_dropout) or not is_plain_linear(x, dense):
        return original(module, **given)
    mask, size = given.get("attention_mask"), module.attention_head_size
    seen = attended(module, module.query(x), module.key(x), module.value(x), mask, size)
    return (module.LayerNorm(linear(seen, dense.weight, dense.bias, residual=x)),)


@fused_forward
def layer(module: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
    """pyfused.ffn with the residual, then the norm"""
    return _layer_forward(module, module.attention(hidden_states, attention_mask, **kwargs)[0])


@fused_forward
def layer_of_tuples(module: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """pyfused.ffn with the residual, then the norm"""
    given = named(module, (hidden_states, *args), kwargs)
    given.pop("output_hidden_states", None)  # the layer does not look at it
    attended = module.attention(**given)
    return _layer_forward(module, attended[0]), *attended[1:]


def _layer_forward(module: Any, attended: Tensor) -> Tensor:
    chunk = functools.partial(_feed_forward, module)
    chunked = apply_chunking_to_forward(chunk, module.chunk_size_feed_forward, module.seq_len_dim, attended)
    found: Tensor = module.full_layer_layer_norm(chunked)
    return found


def _feed_forward(module: Any, x: Tensor) -> Tensor:
    """The feed-forward network plus its residual. Tokens are independent, so each chunk can add its own residual."""
    w_in, w_out, activation = module.ffn, module.ffn_output, kernel_activation(module.activation)
    if activation is None or not is_plain_linear(x, w_in, w_out):
        return module.ff_chunk(x) + x
    return ffn(x, w_in.weight, w_in.bias, w_out.weight, w_out.bias, activation=activation, residual=x)


def _layer(module: Any) -> Forward | str:
    changed = overridden(module, modeling_albert.AlbertLayer, "ff_chunk") or activation_reason(module.activation)
    return changed or (layer_of_tuples if "output_attentions" in parameters(type(module)) else layer)


def _attention(module: Any) -> Forward | str:
    has_interface = hasattr(modeling_albert, "eager_attention_forward")
    return attention if has_interface else "in this release of transformers its eager attention is code of its own"


ADAPTERS: dict[str, Adapter] = {
    full_name("albert.AlbertAttention"): _attention,
    full_name("albert.AlbertSdpaAttention"): lambda module: sdpa_attention,  # of older releases
    full_name("albert.AlbertLayer"): _layer,
}
