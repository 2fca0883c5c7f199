"""How do torch.nn's transformer layers run on pyfused's operators? The drop-ins and fuse_ share one function per layer.

    norm first:  x += attention(norm1(x));  x += feed_forward(norm2(x))
    else:        x = norm1(x + attention(x));  x = norm2(x + feed_forward(x))

A decoder layer also attends to `memory` between the two. Each addition happens inside the product before it, or, if
dropout comes between, inside the next norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..activations import name_of
from ..ops import ffn, layer_norm, linear
from ..own_forward import fused_forward, is_bare, is_fused
from ..rules import its_kind, with_article
from ..tracing import tracing
from .attention import Visibility
from .layers import LayerNorm, Linear
from .multihead import MultiheadAttention, _sizes, attend, attends, takes, visible_keys
from .packing import packing_of, without_padding

Branch = Callable[[Tensor, "Tensor | None"], Tensor]  # (input, residual) -> branch(input) + residual
Site = tuple[Branch, nn.Dropout, nn.LayerNorm]  # a branch, the dropout behind it, and its norm


def activation_of(activation: Any) -> str | None:
    """The kernels' name for an `activation` of torch.nn's layers. None for an unknown function or a module with hooks."""
    return None if isinstance(activation, nn.Module) and not is_bare(activation) else name_of(activation)


# The fused forwards read these children without calling them. Each may have the forward of one of two classes
_ATTENTIONS: tuple[Any, Any] = (nn.MultiheadAttention, MultiheadAttention)
_ENCODER_CHILDREN: dict[str, tuple[Any, Any]] = {
    "self_attn": _ATTENTIONS,
    **dict.fromkeys(("linear1", "linear2"), (nn.Linear, Linear)),
    **dict.fromkeys(("norm1", "norm2"), (nn.LayerNorm, LayerNorm)),
    **dict.fromkeys(("dropout", "dropout1", "dropout2"), (nn.Dropout, nn.Dropout)),
}
_DECODER_CHILDREN = {
    **_ENCODER_CHILDREN, "multihead_attn": _ATTENTIONS, "norm3": (nn.LayerNorm, LayerNorm),
    "dropout3": (nn.Dropout, nn.Dropout),
}  # fmt: skip


def reason_against(layer: nn.Module) -> str:
    """Why a layer must keep torch's forward at present; empty if it need not. Every call asks, as children may change."""
    decoder = isinstance(layer, nn.TransformerDecoderLayer)
    base: Any = nn.TransformerDecoderLayer if decoder else nn.TransformerEncoderLayer
    kind: Any = type(layer)
    for name in ("_sa_block", "_ff_block", "_mha_block") if decoder else ("_sa_block", "_ff_block"):
        if getattr(kind, name) is not getattr(base, name) or name in layer.__dict__:
            return f"has a {name} of its own"
    children = layer._modules  # an attribute of a module takes 0.5 us to find
    for name, (theirs, ours) in (_DECODER_CHILDREN if decoder else _ENCODER_CHILDREN).items():
        child = children.get(name)
        forward = getattr(type(child), "forward", None)
        if child is None or (forward is not theirs.forward and forward is not ours.forward):
            return f"has {its_kind(child)} in place of {theirs.__name__}"
        if theirs is nn.LayerNorm and (_weight(child) is None or len(child.normalized_shape) != 1):  # type: ignore[arg-type]
            return "has a LayerNorm without weight, or over several dimensions"
    if not is_bare(*children.values()):
        names = {type(child).__name__ for child in children.values() if not is_bare(child)}
        return f"has {' and '.join(map(with_article, sorted(names)))} with hooks or a forward of its own"
    return ""


def _weight(norm: nn.Module) -> Any:
    """nn.DataParallel's replicas hold parameters as plain attributes."""
    weight = norm._parameters.get("weight")
    return vars(norm).get("weight") if weight is None else weight


def _parameters(layer: nn.Module) -> Iterator[Tensor | None]:
    """The layer's parameters, in a third of parameters()' time. torch keeps a replica's in _former_parameters."""
    for child in layer._modules.values():
        if child is not None:
            yield from (child._parameters or vars(child).get("_former_parameters", child._parameters)).values()


def _dropped(y: Tensor, dropout: nn.Dropout) -> Tensor:
    return F.dropout(y, dropout.p) if dropout.training and dropout.p else y


def _normed(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    y: Any = layer_norm(x, norm.weight, norm.bias, eps=norm.eps)
    return y


def _added(x: Tensor, of: Tensor, branch: Branch, dropout: nn.Dropout, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """The pair (norm(total), total) with total = x + dropout(branch(of))."""
    if dropout.training and dropout.p:
        dropped = F.dropout(branch(of, None), dropout.p)
        pair: Any = layer_norm(dropped, norm.weight, norm.bias, eps=norm.eps, residual=x)
        return pair
    total = branch(of, x)
    return _normed(total, norm), total


def _through(x: Tensor, norm_first: bool, sites: Sequence[Site]) -> Tensor:
    if not norm_first:
        for branch, dropout, norm in sites:
            x, _ = _added(x, x, branch, dropout, norm)
        return x
    y = _normed(x, sites[0][2])
    for (branch, dropout, _), (_, _, norm) in pairwise(sites):
        y, x = _added(x, y, branch, dropout, norm)
    branch, dropout, _ = sites[-1]
    if dropout.training and dropout.p:
        return x + F.dropout(branch(y, None), dropout.p)
    return branch(y, x)


def _self_attention(attention: nn.MultiheadAttention, visible: Visibility, batch_first: bool) -> Branch:
    return lambda y, residual: attend(attention, y, y, y, visible, batch_first, residual)


def _feed_forward(layer: Any) -> Branch:
    inner, outer = layer.linear1, layer.linear2
    name = None if layer.dropout.training and layer.dropout.p else activation_of(layer.activation)

    def branch(y, residual):
        if name is not None:
            return ffn(y, inner.weight, inner.bias, outer.weight, outer.bias, activation=name, residual=residual)
        hidden = _dropped(layer.activation(linear(y, inner.weight, inner.bias)), layer.dropout)
        return linear(hidden, outer.weight, outer.bias, residual=residual)

    return branch


def _encode(layer: Any, x: Tensor, visible: Visibility, batch_first: bool) -> Tensor:
    """One encoder layer: (B, S, E) or (S, B, E) -> the same; or packed, (1, T, E)."""
    sites = [
        (_self_attention(layer.self_attn, visible, batch_first), layer.dropout1, layer.norm1),
        (_feed_forward(layer), layer.dropout2, layer.norm2),
    ]
    return _through(x, layer.norm_first, sites)


def _runs(layer: Any, x: Tensor) -> bool:
    fits = x.dim() in (2, 3) and takes(x, *_parameters(layer)) and attends(layer.self_attn, x, x, x)
    return fits and not reason_against(layer)


@fused_forward
def encoder_layer_forward(
    module: nn.TransformerEncoderLayer,
    src: Tensor,
    src_mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """pyfused.attention, ffn, linear and layer_norm"""
    if _runs(module, src) and src.shape[-1] == module.self_attn.embed_dim:
        x, padding, batch_first = _batched(src, src_key_padding_mask, module.self_attn.batch_first)
        b, s = _sizes(x, batch_first)
        visible = visible_keys(x, (b, module.self_attn.num_heads, s, s), src_mask, padding, is_causal)
        if visible is not None:
            x = _encode(module, x, visible, batch_first)
            return x if src.dim() == 3 else x[0]
    return nn.TransformerEncoderLayer.forward(module, src, src_mask, src_key_padding_mask, is_causal)


def _batched(x, padding, batch_first) -> tuple[Tensor, Tensor | None, bool]:
    """(S, E) becomes (1, S, E), with batch_first=True."""
    if x.dim() == 3:
        return x, padding, batch_first
    return x[None], None if padding is None else padding[None], True


@fused_forward
def decoder_layer_forward(
    module: nn.TransformerDecoderLayer,
    tgt: Tensor,
    memory: Tensor,
    tgt_mask: Tensor | None = None,
    memory_mask: Tensor | None = None,
    tgt_key_padding_mask: Tensor | None = None,
    memory_key_padding_mask: Tensor | None = None,
    tgt_is_causal: bool = False,
    memory_is_causal: bool = False,
) -> Tensor:
    """pyfused.attention, ffn, linear and layer_norm"""
    own, cross = module.self_attn, module.multihead_attn
    widths = {tgt.shape[-1], memory.shape[-1], own.embed_dim, cross.embed_dim, cross.kdim, cross.vdim}
    if (
        _runs(module, tgt)
        and memory.dim() == tgt.dim()
        and attends(cross, tgt, memory, memory)
        and own.batch_first == cross.batch_first
        and len(widths) == 1
    ):
        x, padding, batch_first = _batched(tgt, tgt_key_padding_mask, own.batch_first)
        seen, memory_padding, _ = _batched(memory, memory_key_padding_mask, own.batch_first)
        (b, s), (of_memory, t) = _sizes(x, batch_first), _sizes(seen, batch_first)
        visible = visible_keys(x, (b, own.num_heads, s, s), tgt_mask, padding, tgt_is_causal)
        sizes = (b, cross.num_heads, s, t)
        memory_visible = visible_keys(x, sizes, memory_mask, memory_padding, memory_is_causal)
        if b == of_memory and visible is not None and memory_visible is not None:

            def to_memory(y, residual):
                return attend(cross, y, seen, seen, memory_visible, batch_first, residual)

            sites = [
                (_self_attention(own, visible, batch_first), module.dropout1, module.norm1),
                (to_memory, module.dropout2, module.norm2),
                (_feed_forward(module), module.dropout3, module.norm3),
            ]
            x = _through(x, module.norm_first, sites)
            return x if tgt.dim() == 3 else x[0]
    return nn.TransformerDecoderLayer.forward(
        *(module, tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask),
        *(tgt_is_causal, memory_is_causal),
    )


@fused_forward
def encoder_forward(
    module: nn.TransformerEncoder,
    src: Tensor,
    mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool | None = None,
) -> Tensor:
    """its layers on the real tokens alone, where torch's own would give zeros at padding"""
    layers: Any = module.layers
    fused = all(is_fused(m) or type(m).forward is TransformerEncoderLayer.forward for m in layers)
    if not fused or src.is_nested or src.dim() != 3:
        return nn.TransformerEncoder.forward(module, src, mask, src_key_padding_mask, is_causal)
    batch_first = layers[0].self_attn.batch_first
    b, s = _sizes(src, batch_first)
    padding = src_key_padding_mask
    if padding is not None and (padding.shape != (b, s) or padding.dtype not in (torch.bool, src.dtype)):
        return nn.TransformerEncoder.forward(module, src, mask, src_key_padding_mask, is_causal)
    real = None
    if padding is not None and mask is None and _leaves_padding_out(module, src):
        real = ~padding if padding.dtype == torch.bool else padding == 0
        if getattr(module, "mask_check", True) and bool((real[:, 1:] & ~real[:, :-1]).any()):
            real = None
    if is_causal is None:
        is_causal = mask is not None and not tracing() and _is_causal(mask, s)
    packing = None
    if real is not None and all(is_bare(m) and _runs(m, src) for m in layers):
        packing = packing_of(real)
    x = src
    if packing is not None:
        x, visible = packing.pack(x), Visibility(packing=packing)
        for layer in layers:
            x = _encode(layer, x, visible, True)
        x = packing.unpack(x)
    else:
        for layer in layers:
            x = layer(x, src_mask=mask, is_causal=is_causal, src_key_padding_mask=padding)
        x = x if real is None else without_padding(x, real)
    return x if module.norm is None else module.norm(x)


def _leaves_padding_out(module: Any, src: Tensor) -> bool:
    """Whether torch would turn a padded batch into a nested tensor. It does in plain inference."""
    first = module.layers[0]
    return (
        getattr(module, "use_nested_tensor", False)
        and torch.backends.mha.get_fastpath_enabled()
        and first.self_attn.batch_first
        and not first.training
        and not (getattr(module, "mask_check", True) and tracing())
        and not torch.is_autocast_enabled()
        and not (torch.is_grad_enabled() and (src.requires_grad or any(p.requires_grad for p in first.parameters())))
    )


def _is_causal(mask: Tensor, s: int) -> bool:
    if mask.shape != (s, s):
        return False
    hidden = torch.ones(s, s, dtype=torch.bool, device=mask.device).triu(1)
    if mask.dtype == torch.bool:
        return torch.equal(mask, hidden)
    return torch.equal(mask, torch.zeros_like(mask).masked_fill(hidden, float("-inf")))


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """torch.nn.TransformerEncoderLayer, its constructor, state dict, masks and results, on pyfused's operators.

    torch's own forward runs where the kernels cannot: nested tensors, float64, mixed dtypes, other devices; and if a child
    has hooks or was replaced by another class. Queries that may see no key get zeros from the attention, not NaN.
    """

    forward = encoder_layer_forward
    """As torch.nn.TransformerEncoderLayer.forward: (B, S, E) with batch_first, else (S, B, E); or (S, E)."""


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """torch.nn.TransformerDecoderLayer, its constructor, state dict, masks and results, on pyfused's operators.

    The notes of TransformerEncoderLayer apply here too.
    """

    forward = decoder_layer_forward
    """As torch.nn.TransformerDecoderLayer.forward: (B, S, E) with batch_first, else (S, B, E); or (S, E)."""
