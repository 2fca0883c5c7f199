"""What does fuse_ replace in transformers' SqueezeBERT? Its layers as a whole.

A layer's states are (B, N, S), channels before words, and its products are convolutions of one word, in groups of channels.
Here they are (B, S, N), and each group has a product of its own: what the kernels read as it lies in memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ... import notices
from ...ops import ffn, layer_norm, linear
from ...ops.attention import MAX_HEAD_SIZE
from ...own_forward import Adapter, Forward, fused_forward, is_bare, is_fused, original
from ..torch_nn import go_together
from .activations import activation_reason, kernel_activation
from .attention import attend, attentions_wanted
from .plain_modules import drops
from .releases import full_name


@fused_forward
def layer(module: Any, hidden_states: Tensor, attention_mask: Tensor | None, output_attentions: bool = False) -> Any:
    """pyfused.attention, pyfused.linear with the residual, pyfused.ffn by groups, and the norms"""
    of, first, inner, last = module.attention, module.post_attention, module.intermediate, module.output
    plain = _fits(module, hidden_states) and _attends(of, hidden_states, attention_mask, output_attentions)
    if not plain or drops(of.dropout) or not is_bare(of):
        return original(module, hidden_states, attention_mask, output_attentions)
    x = hidden_states.transpose(1, 2)
    x = _normed(first, _product(first.conv1d, _attended(of, x, attention_mask), x))
    return {"feature_map": _normed(last, _feed_forward(inner, last.conv1d, x)).transpose(1, 2)}


@fused_forward
def attention(
    module: Any, hidden_states: Tensor, attention_mask: Tensor | None, output_attentions: bool = False
) -> Any:
    """pyfused.attention"""
    if not _attends(module, hidden_states, attention_mask, output_attentions):
        return original(module, hidden_states, attention_mask, output_attentions)
    return {"context_layer": _attended(module, hidden_states.transpose(1, 2), attention_mask).transpose(1, 2)}


@fused_forward
def norm(module: Any, x: Tensor) -> Any:
    """pyfused.layer_norm"""
    if x.dim() != 3 or not go_together(module, x):
        return original(module, x)
    y: Any = layer_norm(x.transpose(1, 2), module.weight, module.bias, eps=module.eps)
    return y.transpose(1, 2)


def _attended(module: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    """(B, S, N) -> (B, S, N)"""
    heads = module.num_attention_heads
    q, k, v = (
        _product(conv, x).unflatten(-1, (heads, -1)).transpose(1, 2)
        for conv in (module.query, module.key, module.value)
    )
    dropout = module.dropout.p if drops(module.dropout) else 0.0
    seen, _ = attend(module, q, k, v, mask, dropout=dropout, is_causal=False)
    return seen.flatten(2)


def _feed_forward(inner: Any, last: Any, x: Tensor) -> Tensor:
    """last(act(inner(x))) + x, one group of channels after the other."""
    groups: int = last.groups
    activation: Any = kernel_activation(inner.act)
    if inner.conv1d.groups != groups:
        return _product(last, inner.act(_product(inner.conv1d, x)), x)
    found = [
        ffn(one, *of_inner, *of_last, activation=activation, residual=one)
        for one, of_inner, of_last in zip(x.chunk(groups, -1), _groups(inner.conv1d), _groups(last))
    ]
    return found[0] if groups == 1 else torch.cat(found, -1)


def _product(conv: Any, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """conv(x) + residual on (B, S, N)."""
    groups = conv.groups
    residuals = [None] * groups if residual is None else residual.chunk(groups, -1)
    found = [
        linear(one, weight, bias, residual=added)
        for one, (weight, bias), added in zip(x.chunk(groups, -1), _groups(conv), residuals)
    ]
    return found[0] if groups == 1 else torch.cat(found, -1)


def _groups(conv: Any) -> Any:
    """The weight and the bias of each group."""
    return zip(conv.weight.squeeze(-1).chunk(conv.groups), conv.bias.chunk(conv.groups))


def _normed(module: Any, x: Tensor) -> Tensor:
    norm = module.layernorm
    found: Tensor = layer_norm(x, norm.weight, norm.bias, eps=norm.eps)  # type: ignore[assignment]
    return found


def _fits(module: Any, x: Tensor) -> bool:
    """Whether the kernels stand for all but the attention: no child of another kind, with a hook or a dropout that drops."""
    first, inner, last = module.post_attention, module.intermediate, module.output
    norms = first.layernorm, last.layernorm
    if drops(first.dropout) or drops(last.dropout) or kernel_activation(inner.act) is None:
        return False
    bare = is_bare(first, inner, last, *norms) and all(is_fused(n) and go_together(n, x) for n in norms)
    return bare and _are_products(x, first.conv1d, inner.conv1d, last.conv1d)


def _attends(module: Any, x: Tensor, mask: Tensor | None, wanted: bool) -> bool:
    """Whether the kernels stand for the attention."""
    if attentions_wanted(module, {"output_attentions": wanted}):
        notices.once("output_attentions: attention runs in transformers' own code, which has the scores")
        return False
    steps = module.matmul_qk, module.softmax, module.dropout, module.matmul_qkv
    plain = type(module.dropout) in (nn.Dropout, nn.Identity) and type(module.softmax) is nn.Softmax and is_bare(*steps)
    return plain and (mask is None or mask.dim() == 4) and _are_products(x, module.query, module.key, module.value)


def _are_products(x: Tensor, *convolutions: Any) -> bool:
    """Whether each of them is a product for each word alone, and the kernels take it."""
    return (
        x.dim() == 3
        and is_bare(*convolutions)
        and all(
            type(conv) is nn.Conv1d
            and (conv.kernel_size, conv.stride, conv.padding) == ((1,), (1,), (0,))
            and conv.bias is not None
            and go_together(conv, x)
            for conv in convolutions
        )
    )


def _attention(module: Any) -> Forward | str:
    size = module.attention_head_size
    return f"has heads of size {size}; the kernels take {MAX_HEAD_SIZE}" if size > MAX_HEAD_SIZE else attention


def _layer(module: Any) -> Forward | str:
    reason = _attention(module.attention)
    return reason if isinstance(reason, str) else activation_reason(module.intermediate.act) or layer


ADAPTERS: dict[str, Adapter] = {
    full_name("squeezebert.SqueezeBertModule"): _layer,
    full_name("squeezebert.SqueezeBertSelfAttention"): _attention,
    full_name("squeezebert.SqueezeBertLayerNorm"): lambda module: norm,
}
