"""What does fuse_ replace in transformers' T5 and its kin? Norm, feed-forward, attention with its bias, and the residuals.

Models whose classes have T5's code under other names get the same forwards; alike.py compares the code.

If every layer of a stack is fused, the relative position bias is never a (1, H, S, S) tensor. The first layer's attention
passes its table on as a RelativeBias, which the kernel reads. If some layer cannot read the table, it passes the tensor on, as
the original does. That happens with a layer that filter_fn left out, a sharded stack, or a StaticCache with unused room.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn
from transformers.models.t5 import modeling_t5

from ...decode_plan import DecodeLayer, DecodePlan, Matrix, Norm
from ...nn.t5 import attend
from ...ops import RelativeBias
from ...ops.attention import MAX_HEAD_SIZE
from ...own_forward import Adapter, Forward, fused_forward, original
from ...tracing import tracing
from . import alike, kin, t5_inline
from .activations import kernel_activation
from .decode import Ready, one_token, same
from .plain_modules import overridden
from .releases import interface
from .t5_tables import adds_residual, all_read_tables, is_ours, projected
from .unchanged import Kind, Kinds, Watch, known


@fused_forward
def attention(
    module: Any,
    hidden_states: Tensor,
    mask: Tensor | None = None,
    key_value_states: Tensor | None = None,
    position_bias: Any = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> Any:
    """pyfused.attention, the bias by relative position inside the kernel"""
    given = (hidden_states, mask, key_value_states, position_bias, past_key_values)
    if not is_ours(module) and not isinstance(position_bias, RelativeBias):
        return original(module, *given, **kwargs)
    seen, position_bias, weights = _attended(module, *given, **kwargs)
    return module.o(seen), position_bias, weights


@fused_forward
def self_attention_layer(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_bias: Any = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> Any:
    """the norm, then the attention with pyfused.linear and the residual"""
    if not adds_residual(module, module.SelfAttention, hidden_states):
        return original(module, hidden_states, attention_mask, position_bias, past_key_values, **kwargs)
    seen, position_bias, weights = _attended(
        *(module.SelfAttention, module.layer_norm(hidden_states), attention_mask, None, position_bias, past_key_values),
        **kwargs,
    )
    return projected(module.SelfAttention.o, seen, hidden_states), position_bias, weights


@fused_forward
def cross_attention_layer(
    module: Any,
    hidden_states: Tensor,
    key_value_states: Tensor,
    attention_mask: Tensor | None = None,
    position_bias: Any = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> Any:
    """the norm, then the attention with pyfused.linear and the residual"""
    inner = module.EncDecAttention
    if not adds_residual(module, inner, hidden_states):
        return original(
            module, hidden_states, key_value_states, attention_mask, position_bias, past_key_values, **kwargs
        )
    seen, position_bias, weights = _attended(
        *(inner, module.layer_norm(hidden_states), attention_mask, key_value_states, position_bias, past_key_values),
        **kwargs,
    )
    return projected(inner.o, seen, hidden_states), position_bias, weights


def _attended(
    module: Any,
    hidden_states: Tensor,
    mask: Tensor | None,
    key_value_states: Tensor | None,
    position_bias: Any,
    past_key_values: Any,
    hands_on_table: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Any, Tensor | None]:
    """T5Attention's forward without the output projection: (B, S, H * d), the bias for the next layer, the weights."""
    function = interface(module.config._attn_implementation, modeling_t5.eager_attention_forward)

    def compute(query, key, value, bias):
        return function(
            *(module, query, key, value, mask),
            dropout=module.dropout if module.training else 0.0,
            scaling=module.scaling,
            **({"relative_bias": bias} if isinstance(bias, RelativeBias) else {"position_bias": bias}),
            **kwargs,
        )

    return attend(
        *(module, hidden_states, key_value_states, position_bias, past_key_values, compute),
        hands_on_table=hands_on_table,
        reads_table=is_ours(module),
    )


@fused_forward
def stack(module: Any, *args: Any, **kwargs: Any) -> Any:
    """as it is; hands the table of the bias from layer to layer"""
    if not all_read_tables(module):
        return original(module, *args, **kwargs)
    if alike.HAS_INTERFACE:
        return original(module, *args, **kwargs, hands_on_table=True)  # through T5Block to every attention
    if tracing() or (module.gradient_checkpointing and module.training):  # the backward calls the layers alone
        return original(module, *args, **kwargs)
    with t5_inline.hands_on_table(module):
        return original(module, *args, **kwargs)


@fused_forward
def decoder_stack(module: Any, *args: Any, **kwargs: Any) -> Any:
    """pyfused.decode for steps of one token; else hands the table of the bias from layer to layer"""
    found = _one_token(module, *args, **kwargs)
    return stack(module, *args, **kwargs) if found is None else found


def _one_token(
    module: Any,
    input_ids: Any = None,
    attention_mask: Any = None,
    encoder_hidden_states: Any = None,
    encoder_attention_mask: Any = None,
    inputs_embeds: Any = None,
    past_key_values: Any = None,
    use_cache: Any = None,
    **kwargs: Any,
) -> Any:
    encoder = None if encoder_hidden_states is None else (encoder_hidden_states, encoder_attention_mask)
    others = {"inputs_embeds": inputs_embeds, **kwargs}
    return one_token(*(module, _plan, input_ids, past_key_values, attention_mask, use_cache, others), encoder=encoder)


@functools.cache
def _kinds(stack: Any) -> Kinds | None:
    """What a plan knows of the classes below a stack. None if they are not T5's under other names."""
    of = alike.classes(
        stack,
        "Block Attention LayerNorm LayerSelfAttention LayerCrossAttention LayerFF DenseActDense DenseGatedActDense",
    )
    if of is None:
        return None
    settings = (
        "config layer_idx n_heads key_value_proj_dim scaling is_decoder has_relative_attention_bias "
        "relative_attention_num_buckets relative_attention_max_distance"
    )
    leaves = dict.fromkeys((of["Block"], nn.Linear, nn.Dropout, nn.ModuleList), Kind())
    layers = dict.fromkeys((of[name] for name in ("LayerSelfAttention", "LayerCrossAttention", "LayerFF")), Kind(True))
    dense = dict.fromkeys((of["DenseActDense"], of["DenseGatedActDense"]), Kind(True, "act"))
    others = {
        of["LayerNorm"]: Kind(True, "variance_epsilon"),
        of["Attention"]: Kind(True, settings),
        nn.Embedding: Kind(settings="max_norm"),
    }
    return known({**leaves, **layers, **dense, **others})


def _plan(stack: Any) -> Ready | None:
    """The plan of a decoder with cross-attention whose modules nobody changed."""
    blocks, kinds = list(stack.block), _kinds(stack.__class__)
    watch = None if kinds is None else Watch.of(stack, kinds)
    if watch is None or not blocks or not all_read_tables(stack):
        return None
    if any(len(block.layer) != 3 for block in blocks) or stack.embed_tokens.max_norm is not None:
        return None
    attentions = [a for block in blocks for a in (block.layer[0].SelfAttention, block.layer[1].EncDecAttention)]
    if any(a.layer_idx != i // 2 or not a.is_decoder for i, a in enumerate(attentions)):
        return None
    if any(a.has_relative_attention_bias != (i == 0) for i, a in enumerate(attentions)):
        return None
    if not same((a.n_heads, a.key_value_proj_dim) for a in attentions):
        return None
    dense = [block.layer[2].DenseReluDense for block in blocks]
    first = attentions[0]
    if not same((type(d), kernel_activation(d.act)) for d in dense) or first.key_value_proj_dim > MAX_HEAD_SIZE:
        return None
    plan = DecodePlan(
        layers=tuple(map(_layer, blocks)),
        token_embedding=Matrix.of(stack.embed_tokens),
        head=Matrix(),
        final_norm=Norm.of(stack.final_layer_norm),
        heads=first.n_heads,
        kv_heads=first.n_heads,
        head_size=first.key_value_proj_dim,
        is_rms=True,
        activation=kernel_activation(dense[0].act) or "",
        bias_table=first.relative_attention_bias.weight.detach(),
        max_distance=first.relative_attention_max_distance,
    )
    return Ready.of(plan, watch)


def _layer(block: Any) -> DecodeLayer:
    own, cross, feed_forward = block.layer
    attention, other, dense = own.SelfAttention, cross.EncDecAttention, feed_forward.DenseReluDense
    gated = "wi_0" in dense._modules
    return DecodeLayer(
        attention_norm=Norm.of(own.layer_norm),
        query=Matrix.of(attention.q),
        key=Matrix.of(attention.k),
        value=Matrix.of(attention.v),
        output=Matrix.of(attention.o),
        cross_norm=Norm.of(cross.layer_norm),
        cross_query=Matrix.of(other.q),
        cross_output=Matrix.of(other.o),
        feed_forward_norm=Norm.of(feed_forward.layer_norm),
        gate=Matrix.of(dense.wi_0) if gated else Matrix(),
        inner=Matrix.of(dense.wi_1 if gated else dense.wi),
        outer=Matrix.of(dense.wo),
        scale=getattr(attention, "scaling", 1.0),
        cross_scale=getattr(other, "scaling", 1.0),
    )


def _attention(module: Any) -> Forward | str:
    kind: Any = next(base for base in type(module).__mro__ if not alike.reason(base, "Attention"))
    changed = overridden(module, kind, "compute_bias", "_relative_position_bucket")
    return changed or (attention if alike.HAS_INTERFACE else t5_inline.attention)


def _stack(module: Any) -> Forward | str:
    if alike.reason(module.__class__, "Stack"):  # a plan stands for T5's alone; the layers may be T5's
        return stack
    return decoder_stack if module.is_decoder else stack


ADAPTERS: dict[str, Adapter] = kin.adapters(
    {
        "Attention": _attention,
        "LayerSelfAttention": lambda module: (
            self_attention_layer if alike.HAS_INTERFACE else t5_inline.self_attention_layer
        ),
        "LayerCrossAttention": lambda module: (
            cross_attention_layer if alike.HAS_INTERFACE else t5_inline.cross_attention_layer
        ),
    }
) | kin.stacks(_stack)
