"""How does T5's decoder feed one token per row at the cost of its kernels alone? It looks up and checks everything once.

As in gpt2_bound.py, BoundStep collects the parameters once per generation, and its arguments fit by construction.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.pre_norm import PreNormLayer
from ..models.t5 import T5Backbone, T5Stack
from ..nn import (
    CrossAttention,
    GatedMlp,
    KVCache,
    Linear,
    Mlp,
    RelativeSelfAttention,
    ReversibleEmbedding,
    RMSNorm,
)
from ..nn.wide import widened
from ..ops.attention import _ATTENTION
from ..ops.ffn import _FFN
from ..ops.gated_ffn import _GATED_FFN
from ..ops.linear import _LINEAR
from ..ops.rms_norm import _RMS_NORM
from .bound import plain

_KNOWN = {
    T5Backbone, T5Stack, PreNormLayer, nn.ModuleList, RMSNorm, Linear, RelativeSelfAttention, CrossAttention, Mlp,
    GatedMlp, ReversibleEmbedding,
}  # fmt: skip


def bindable(model: T5Backbone) -> bool:
    """Whether BoundStep computes the same as calling the modules."""
    return plain(model, _KNOWN)


class BoundStep:
    """One new token per row to logits, with a KV cache that holds the encoder's keys. Needs a bindable model; gives no
    gradient."""

    def __init__(self, model: T5Backbone):
        embedding = model.token_embedding
        self._tokens = embedding.weight
        self._head = embedding.weight if embedding.tie_weights else embedding.reverse_weight
        self._wide = model.dtype == torch.float16  # residual stream and norms are then float32
        # The final norm's weight includes the scale of the logits.
        weight, eps = _norm(model.decoder.final_norm)
        self._final = weight * model.logits_scale, eps
        layers: Any = model.decoder.layers
        self._heads, self._head_size = layers[0].attention.num_heads, layers[0].attention.head_size
        self._gated = isinstance(layers[0].feed_forward, GatedMlp)
        self._layers = [
            (
                *_norm(layer.attention_norm),
                layer.attention.query_key_value.weight,
                layer.attention.output.weight,
                *_norm(layer.cross_attention_norm),
                layer.cross_attention.query.weight,
                layer.cross_attention.output.weight,
                *_norm(layer.feed_forward_norm),
                self._feed_forward(layer.feed_forward),
                layer.feed_forward.activation,
                layer.feed_forward,
            )
            for layer in layers
        ]

    def _feed_forward(self, module: Any) -> tuple[Tensor | None, ...]:
        if self._gated:
            return module.gate.weight, module.up.weight, module.outer.weight
        return module.inner.weight, None, module.outer.weight, None

    def __call__(self, tokens: Tensor, bias: Tensor, cache: KVCache) -> Tensor:
        """tokens (B,), relative position bias (1, H, 1, Sk) -> logits (B, V)."""
        wide, linear, attention = self._wide, _LINEAR.direct, _ATTENTION.direct
        norm = _wide_norm if wide else _RMS_NORM.direct
        feed_forward = (_GATED_FFN if self._gated else _FFN).direct
        b, h, d, mask = tokens.shape[0], self._heads, self._head_size, cache.encoder_mask
        cross: list[Any] = cache.cross
        bias = bias.expand(b, h, 1, bias.shape[3])
        x, branch = widened(F.embedding(tokens, self._tokens)[:, None]), None
        for i, (w1, e1, wqkv, wo, w2, e2, wq, wo2, w3, e3, weights, name, module) in enumerate(self._layers):
            y, total, _ = norm(x, w1, e1, branch, False)
            x = x if branch is None else total
            qkv = linear(y, wqkv, None, None)[0].view(b, 1, 3, h, d)
            key, value = cache.append(i, qkv.narrow(2, 1, 2))
            query = qkv.select(2, 0).transpose(1, 2)
            out, _ = attention(query, key, value, False, None, bias, 1.0, 0.0, None, False)
            branch = linear(out.view(b, 1, h * d), wo, None, None)[0]
            y, x, _ = norm(x, w2, e2, branch, False)
            key, value = cross[i]  # each (Bs, H, Se, d), Bs sources
            query = linear(y, wq, None, None)[0].view(key.shape[0], -1, h, d).transpose(1, 2)
            out, _ = attention(query, key, value, False, mask, None, 1.0, 0.0, None, False)
            branch = linear(out.transpose(1, 2).reshape(b, 1, h * d), wo2, None, None)[0]
            y, x, _ = norm(x, w3, e3, branch, False)
            branch = module(y, wide=True) if wide else feed_forward(y, *weights, name, None, False)[0]
        y = norm(x, *self._final, branch, False)[0]
        return linear(y, self._head, None, None)[0][:, 0]


def _norm(norm: RMSNorm) -> tuple[Tensor, float | None]:
    return widened(norm.weight), norm.eps


def _wide_norm(x: Tensor, weight: Tensor, eps: float | None, branch: Tensor | None, save: bool) -> tuple[Any, ...]:
    """The norm's operator for a float32 stream x: (float16, float32 sum, None)."""
    y, total, rstd = _RMS_NORM.direct(x, weight, eps, None if branch is None else branch.float(), save)
    return y.to(torch.float16), total, rstd
