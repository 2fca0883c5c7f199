"""What is a backbone's decoder as data? The plan that the operator `decode` reads (pyfused/decode_plan.py).

A plan skips the modules, so it exists only for a model whose modules are as pyfused made them: no hook, nothing replaced.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ..decode_plan import DecodeLayer, DecodePlan, Matrix, Norm
from ..models.backbone import Backbone
from ..models.gpt2 import GPT2Backbone
from ..models.pre_norm import PreNormLayer, RelativeLayer
from ..models.t5 import T5Backbone, T5Stack
from ..nn import (
    CrossAttention,
    Embedding,
    GatedMlp,
    LayerNorm,
    Linear,
    Mlp,
    QuantizedEmbedding,
    QuantizedLinear,
    RelativeSelfAttention,
    ReversibleEmbedding,
    RMSNorm,
    SelfAttention,
)
from ..notices import once
from ..ops.checks import is_dense
from ..rules import its_kind
from ..spread import has_spread_weights

_KNOWN = {
    GPT2Backbone, T5Backbone, T5Stack, PreNormLayer, RelativeLayer, nn.ModuleList, LayerNorm, RMSNorm, Linear, SelfAttention,
    RelativeSelfAttention, CrossAttention, Mlp, GatedMlp, Embedding, ReversibleEmbedding, QuantizedLinear,
    QuantizedEmbedding,
}  # fmt: skip


def plan_of(model: Backbone) -> DecodePlan | None:
    """The plan of a GPT2Backbone or a T5Backbone with its present weights, for pyfused.decode. None where modules have hooks or
    were replaced, and for GPT-2 with cross-attention. TypeError, ValueError: a model that cannot generate."""
    if not isinstance(model, (GPT2Backbone, T5Backbone)):
        raise TypeError(f"model is {its_kind(model)}; it takes a GPT2Backbone or a T5Backbone")
    model.check_decoder("plan_of")
    if has_spread_weights(model):
        once(
            "the model's weights are spread over a mesh: generation calls its modules, since `decode` reads whole weights"
        )
        return None
    stack: Any = model if isinstance(model, GPT2Backbone) else model.decoder
    if not _is_plain(model) or not _are_alike(list(stack.layers)):
        return None
    if isinstance(model, GPT2Backbone):
        if any(layer.cross_attention is not None for layer in stack.layers):
            return None
        plan = _plan(model, stack, position_embedding=Matrix.of(model.position_embedding))
    else:
        first = stack.layers[0].attention
        plan = _plan(
            *(model, stack),
            logits_scale=model.logits_scale,
            bias_table=first.relative_bias.detach(),
            max_distance=first.max_distance,
        )
    try:
        plan.check()
    except ValueError:  # weights of several dtypes, or changed shapes: the modules run, and say what is wrong
        return None
    return plan


def _is_plain(model: nn.Module) -> bool:
    """Whether skipping the modules changes nothing: no hook, no replaced or patched module, no tensor subclass, no sparse
    weight."""
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return False
    if "logits" in model.__dict__:
        return False
    for m in model.modules():
        if type(m) not in _KNOWN or m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__:
            return False
    plain = all(type(p) is nn.Parameter for p in model.parameters()) and all(type(b) is Tensor for b in model.buffers())
    return plain and all(map(is_dense, model.parameters()))


def _are_alike(layers: list[Any]) -> bool:
    """Whether the layers differ in their weights alone, and use the cache in their order. A plan says the rest once."""
    kinds = {
        (
            *(layer.attention.num_heads, layer.attention.head_size, layer.cross_attention is None),
            *(type(layer.attention_norm), type(layer.feed_forward), layer.feed_forward.activation),
        )
        for layer in layers
    }
    return len(kinds) == 1 and [layer.index for layer in layers] == list(range(len(layers)))


def _plan(model: Any, stack: Any, **options: Any) -> DecodePlan:
    layers, embedding = list(stack.layers), model.token_embedding
    tokens = Matrix.of(embedding)
    attention = layers[0].attention
    return DecodePlan(
        layers=tuple(map(_layer, layers)),
        token_embedding=tokens,
        head=tokens if embedding.tie_weights else _own_head(embedding),
        final_norm=Norm.of(stack.final_norm),
        heads=attention.num_heads,
        kv_heads=attention.num_heads,
        head_size=attention.head_size,
        is_rms=isinstance(stack.final_norm, RMSNorm),
        activation=layers[0].feed_forward.activation,
        **options,
    )


def _layer(layer: Any) -> DecodeLayer:
    attention, cross, feed_forward = layer.attention, layer.cross_attention, layer.feed_forward
    query, key, value = Matrix.of(attention.query_key_value).split(3)
    gated = isinstance(feed_forward, GatedMlp)
    found = DecodeLayer(
        attention_norm=Norm.of(layer.attention_norm),
        query=query,
        key=key,
        value=value,
        output=Matrix.of(attention.output),
        feed_forward_norm=Norm.of(layer.feed_forward_norm),
        inner=Matrix.of(feed_forward.up if gated else feed_forward.inner),
        outer=Matrix.of(feed_forward.outer),
        gate=Matrix.of(feed_forward.gate) if gated else Matrix(),
        scale=attention.scale,
    )
    if cross is None:
        return found
    return found._replace(
        cross_norm=Norm.of(layer.cross_attention_norm),
        cross_query=Matrix.of(cross.query),
        cross_output=Matrix.of(cross.output),
        cross_scale=cross.scale,
    )


def _own_head(embedding: Any) -> Matrix:
    if isinstance(embedding, QuantizedEmbedding):
        return Matrix.of(embedding.reverse)
    return Matrix(embedding.reverse_weight.detach())
