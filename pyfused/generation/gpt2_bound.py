"""How does GPT-2 feed one token per row at the cost of its kernels alone? It looks up and checks everything once.

A step of 12 layers calls 88 modules and checks the arguments of 49 operators. In a small model this Python takes longer than
the kernels. BoundStep collects the parameters once per generation, and its arguments fit by construction.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..models.gpt2 import GPT2Backbone
from ..models.pre_norm import PreNormLayer
from ..nn import Embedding, KVCache, LayerNorm, Linear, Mlp, ReversibleEmbedding, SelfAttention
from ..ops.attention import _ATTENTION
from ..ops.ffn import _FFN
from ..ops.layer_norm import _LAYER_NORM
from ..ops.linear import _LINEAR
from .bound import matrix, plain

_PLAIN = {
    GPT2Backbone, PreNormLayer, nn.ModuleList, LayerNorm, Linear, SelfAttention, Mlp, ReversibleEmbedding,
    Embedding,
}  # fmt: skip


def bindable(model: GPT2Backbone) -> bool:
    """Whether BoundStep computes the same as calling the modules."""
    return plain(model, _PLAIN)


class BoundStep:
    """One new token per row to logits, with a KV cache. Needs a bindable model; gives no gradient."""

    def __init__(self, model: GPT2Backbone):
        self._tokens, self._positions = model.token_embedding.weight, model.position_embedding.weight
        head = model.token_embedding
        self._head = head.weight if head.tie_weights else head.reverse_weight
        self._final = _norm(model.final_norm)
        layers: Any = model.layers
        attention = layers[0].attention
        self._heads, self._head_size = attention.num_heads, attention.head_size
        self._layers = [
            (
                *_norm(layer.attention_norm),
                *matrix(layer.attention.query_key_value),
                layer.attention.scale,
                *matrix(layer.attention.output),
                *_norm(layer.feed_forward_norm),
                *matrix(layer.feed_forward.inner),
                *matrix(layer.feed_forward.outer),
                layer.feed_forward.activation,
            )
            for layer in layers
        ]

    def __call__(self, tokens: Tensor, position_ids: Tensor, cache: KVCache, padding_mask: Tensor | None) -> Tensor:
        """tokens (B, 1), position_ids (1,) or (B, 1), padding_mask (B, Sk) bool or None -> logits (B, V)."""
        norm, linear, attention, ffn = (op.direct for op in (_LAYER_NORM, _LINEAR, _ATTENTION, _FFN))
        b, h, d = tokens.shape[0], self._heads, self._head_size
        x = F.embedding(tokens, self._tokens) + F.embedding(position_ids, self._positions)
        branch = None
        for i, (w1, b1, eps, wqkv, bqkv, scale, wo, bo, w2, b2, eps2, w_in, b_in, w_out, b_out, name) in enumerate(
            self._layers
        ):
            y, total, _, _ = norm(x, w1, b1, eps, branch, False)
            x = x if branch is None else total
            qkv = linear(y, wqkv, bqkv, None)[0].view(b, 1, 3, h, d)
            key, value = cache.append(i, qkv.narrow(2, 1, 2))
            query = qkv.select(2, 0).transpose(1, 2)
            out, _ = attention(query, key, value, False, padding_mask, None, scale, 0.0, None, False)
            branch = linear(out.view(b, 1, h * d), wo, bo, None)[0]
            y, x, _, _ = norm(x, w2, b2, eps2, branch, False)
            branch = ffn(y, w_in, b_in, w_out, b_out, name, None, False)[0]
        y = norm(x, *self._final, branch, False)[0]
        return linear(y, self._head, None, None)[0][:, 0]


def _norm(norm: LayerNorm) -> tuple[Tensor, Tensor | None, float]:
    return norm.weight, norm.bias, norm.eps
