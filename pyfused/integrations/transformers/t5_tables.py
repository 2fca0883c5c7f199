"""May the layers of a transformers T5 stack read the table of biases, and may a layer add its residual in a product?"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ...kernels.shared.buckets import exact_buckets
from ...ops import linear
from ...own_forward import is_bare, is_fused
from . import alike
from .config import NAME
from .plain_modules import drops, is_plain_linear


def is_ours(attention: Any) -> bool:
    """Whether a fused attention's implementation is "pyfused" at present. One that does without the interface has no other."""
    config = getattr(attention, "config", None)
    return config is None or config._attn_implementation == NAME


def all_read_tables(stack: Any) -> bool:
    """Whether every layer's attention is ours and other layers can read the first layer's table.

    Blocks of a subclass do not count: FSDP makes such blocks, and their parameters exist only while the block runs.
    """
    if any(alike.reason(block.__class__, "Block") for block in stack.block):
        return False
    attentions = [block.layer[0].SelfAttention for block in stack.block]
    if not attentions or not all(is_fused(attention) and is_ours(attention) for attention in attentions):
        return False
    if any(getattr(attention, "pruned_heads", None) for attention in attentions):
        return False
    return has_plain_table(attentions[0])


def has_plain_table(attention: Any) -> bool:
    """Whether the kernels can read this attention's table of biases instead of calling its embedding."""
    embedding = attention.relative_attention_bias
    weight = embedding.weight
    return (
        type(embedding) is nn.Embedding
        and is_bare(embedding)
        and embedding.max_norm is None
        and weight.shape[0] == attention.relative_attention_num_buckets
        and not is_traceable_wrapper_subclass(weight)
        and exact_buckets(not attention.is_decoder, weight.shape[0])
        in range(1, attention.relative_attention_max_distance)
    )


def adds_residual(layer: Any, attention: Any, hidden_states: Tensor) -> bool:
    """Whether the layer may bypass the attention module's forward and add the residual in its output projection."""
    return (
        is_fused(attention)
        and is_bare(attention)
        and is_ours(attention)
        and not drops(layer.dropout)
        and is_plain_linear(hidden_states, attention.o)
    )


def projected(out: nn.Linear, seen: Tensor, residual: Tensor) -> Tensor:
    """residual + out(seen)"""
    if seen.dtype != residual.dtype:
        return residual + out(seen)
    return linear(seen, out.weight, out.bias, residual=residual)
