"""How do tokens attend to each other, and to an encoder? Multi-head attention with fused projections and a KV cache."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.reference import attention as reference
from ..ops import DistanceBias, RelativeBias, attention
from ..ops.relative_bias import check_buckets
from .kv_cache import KVCache
from .layers import Linear
from .packing import Packing, packing_of, without_padding


def bias_in(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """An additive bias in another dtype. Finite values stay finite and -inf stays -inf. A query whose keys all have float32's
    least number sees them all alike; as -inf in half precision they would be hidden."""
    if bias.dtype == dtype:
        return bias
    least = max(torch.finfo(dtype).min, torch.finfo(bias.dtype).min)
    return bias.clamp(min=least).masked_fill(bias == -torch.inf, -torch.inf).to(dtype)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask, bool (True: may look) or additive, as a bias of this dtype. False becomes -inf, so a query that sees nothing
    gives zeros. A float mask only changes its dtype."""
    if mask.dtype != torch.bool:
        return bias_in(mask, dtype)
    zero, hidden = (torch.full((), value, dtype=dtype, device=mask.device) for value in (0.0, -torch.inf))
    return torch.where(mask, zero, hidden)


@dataclass(frozen=True, slots=True)
class Visibility:
    """Which keys a query may see, and with which bias. All masks reach pyfused.attention in this form."""

    is_causal: bool = False
    padding_mask: Tensor | None = None
    attn_bias: Tensor | None = None
    relative_bias: RelativeBias | DistanceBias | None = None
    packing: Packing | None = None  # the layers' inputs are packed like this, without padding
    blank: bool = False  # unpacked() writes zeros at padding
    keys: int | None = None  # only this many first keys count; the caller selects them from a larger cache

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None, dropout_p: float = 0.0
    ) -> Tensor:
        """pyfused.attention: query (B, H, S, d), key and value (B, Hkv, Sk, d) -> (B, H, S, d)."""
        packing = self.packing
        return attention(
            query,
            key,
            value,
            is_causal=self.is_causal,
            padding_mask=self.padding_mask,
            relative_bias=self.relative_bias,
            attn_bias=self.attn_bias,
            scale=scale,
            dropout_p=dropout_p,
            cu_seqlens=None if packing is None else packing.cu_seqlens,
            max_seqlen=None if packing is None else packing.max_seqlen,
        )

    def probabilities(self, query: Tensor, key: Tensor, scale: float) -> Tensor:
        """(B, H, S, Sk), before dropout, by the reference. The operator never stores them."""
        mask = None if self.padding_mask is None else self.padding_mask != 0
        relative = self.relative_bias or ()
        scores = reference.scores(query, key, self.is_causal, mask, self.attn_bias, scale, *relative)
        return reference.probabilities(scores).to(query.dtype)

    def skip_padding(self, possible: bool = True, *, unbroken: bool = False) -> Visibility:
        """The same, with the padding of padding_mask left out. Where that is not possible (`possible` is False, the bias is
        dense, or packing_of returns None) padding is computed, and unpacked() writes zeros there."""
        if self.padding_mask is None:
            return self
        packing = packing_of(self.padding_mask, unbroken=unbroken) if possible and self.attn_bias is None else None
        if packing is None:
            return replace(self, blank=True)
        return replace(self, padding_mask=None, packing=packing)

    def packed(self, x: Tensor) -> Tensor:
        """(B, S, ...) -> the layers' input: x itself, or (1, T, ...)."""
        return x if self.packing is None else self.packing.pack(x)

    def unpacked(self, x: Tensor) -> Tensor:
        """The layers' output -> (B, S, ...)."""
        if self.packing is not None:
            return self.packing.unpack(x)
        if self.blank and self.padding_mask is not None:
            return without_padding(x, self.padding_mask[:, -x.shape[1] :])  # the mask covers cached tokens too
        return x


EVERYTHING = Visibility()
CAUSAL = Visibility(is_causal=True)


class _Attention(nn.Module):
    """Self- and cross-attention share the sizes, the operator call, and the output projection (D, H * d)."""

    projects: tuple[tuple[str, int], ...]  # the projections' names, and how many parts of (H * d, D) each has

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        head_size: int | None = None,
        *,
        scale: float | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        head_size = head_size or hidden_dim // num_heads
        inner = num_heads * head_size
        self.num_heads, self.head_size = num_heads, head_size
        self.scale = 1.0 / math.sqrt(head_size) if scale is None else scale
        self.dropout = dropout
        self.output = Linear(inner, hidden_dim, bias, device=device, dtype=dtype)
        for name, parts in self.projects:
            self.add_module(name, Linear(hidden_dim, parts * inner, bias, device=device, dtype=dtype))

    def _parts(self, projected: Tensor, count: int) -> Tensor:
        """A packed projection (B, S, count * H * d) -> (B, S, count, H, d)."""
        return projected.view(*projected.shape[:2], count, self.num_heads, self.head_size)

    def _attend(self, query, key, value, visible, probabilities):
        """query (B, H, S, d), key and value (B, H, Sk, d) -> (B, S, D)."""
        if probabilities is not None:
            probabilities.append(visible.probabilities(query, key, self.scale))
        dropout = self.dropout if self.training else 0.0
        out = visible.attend(query, key, value, scale=self.scale, dropout_p=dropout)
        return self.output(out.transpose(1, 2).flatten(2))  # a view: (B, H, S, d) is stored as (B, S, H, d)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_size={self.head_size}, scale={self.scale:.6g}, dropout={self.dropout}"


class SelfAttention(_Attention):
    """Multi-head self-attention (Vaswani et al. 2017, section 3.2) with one projection for query, key and value.

    Args:
        hidden_dim, num_heads: D and H.
        head_size: d; D // H if None. The parameters are query_key_value.{weight (3 * H * d, D), bias}, rows in that
            order, and output.{weight (D, H * d), bias}.
        scale: multiplies the scores; 1 / sqrt(d) if None.
        dropout: of the probabilities, in training.
    """

    projects = (("query_key_value", 3),)
    query_key_value: nn.Module

    def forward(
        self,
        x: Tensor,
        visible: Visibility = EVERYTHING,
        cache: KVCache | None = None,
        layer: int = 0,
        probabilities: list[Tensor] | None = None,
    ) -> Tensor:
        """x (B, S, D) -> (B, S, D).

        visible: which keys count; its masks cover the cached tokens too. With a packing, x is (1, T, D) and the cache is
        empty. cache: keys and values of earlier tokens; x's are appended to its layer `layer`.
        probabilities: a list that gets this layer's (B, H, S, Sk).
        """
        qkv = self._parts(self.query_key_value(x), 3)
        if cache is None or visible.packing is not None:
            query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            if cache is not None:
                cache.append(layer, visible.unpacked(qkv.narrow(2, 1, 2)))
        else:
            query = qkv.select(2, 0).transpose(1, 2)
            key, value = cache.append(layer, qkv.narrow(2, 1, 2))
        return self._attend(query, key, value, visible, probabilities)


class RelativeSelfAttention(SelfAttention):
    """T5's self-attention (Raffel et al. 2020, section 2.1). It has no linear biases, does not scale the scores, and adds a
    bias by relative position to them.

    Args:
        hidden_dim, num_heads, head_size, dropout: as SelfAttention's. The parameters are query_key_value.weight,
            output.weight and, with num_buckets, the table relative_bias (num_buckets, H).
        bidirectional: whether the table tells keys before the query from keys after it, as in an encoder.
        num_buckets: None leaves out the table. T5's layers share the first layer's table: they get its `position_bias()`
            in `visible`.
        max_distance: distances from here on share the last bucket.

    Raises:
        ValueError: num_buckets and max_distance do not fit together.
    """

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        head_size: int | None = None,
        *,
        bidirectional: bool,
        num_buckets: int | None = None,
        max_distance: int = 128,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        factory: dict = {"device": device, "dtype": dtype}
        super().__init__(hidden_dim, num_heads, head_size, scale=1.0, dropout=dropout, bias=False, **factory)
        self.bidirectional, self.max_distance = bidirectional, max_distance
        self.relative_bias: nn.Parameter | None = None
        if num_buckets is not None:
            table = torch.empty(num_buckets, num_heads, **factory)
            check_buckets(table, bidirectional, max_distance)
            self.relative_bias = nn.Parameter(table.normal_(0.0, hidden_dim**-0.5))

    def position_bias(self) -> RelativeBias | None:
        """The bias by relative position as pyfused.attention takes it, for this layer and those that share it."""
        if self.relative_bias is None:
            return None
        return RelativeBias(self.relative_bias, self.bidirectional, self.max_distance)

    def forward(self, x: Tensor, visible: Visibility = EVERYTHING, *more: Any, **names: Any) -> Tensor:
        """As SelfAttention's. A table or a bias in `visible` replaces this layer's own table."""
        if visible.relative_bias is None and visible.attn_bias is None and self.relative_bias is not None:
            visible = replace(visible, relative_bias=self.position_bias())
        return super().forward(x, visible, *more, **names)


class CrossAttention(_Attention):
    """Multi-head attention from one sequence to another, with one projection for key and value.

    Args: as SelfAttention's. The parameters are query.{weight (H * d, D), bias}, key_value.{weight
    (2 * H * d, D), bias} and output.{weight (D, H * d), bias}.
    """

    projects = (("query", 1), ("key_value", 2))
    query: nn.Module
    key_value: nn.Module

    def project(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's output (B, Se, D) as keys and values, views (B, H, Se, d)."""
        key, value = self._parts(self.key_value(memory), 2).permute(2, 0, 3, 1, 4).unbind(0)
        return key, value

    def forward(
        self,
        x: Tensor,
        key_value: tuple[Tensor, Tensor],
        visible: Visibility = EVERYTHING,
        probabilities: list[Tensor] | None = None,
    ) -> Tensor:
        """x (B, S, D), and the keys and values from `project` -> (B, S, D).

        x may have several consecutive rows for each row of the keys, such as the beams of one source. Their queries are
        joined into one row, so the keys are neither copied nor read again for each.
        """
        rows = key_value[0].shape[0]
        length = x.shape[0] // max(rows, 1) * x.shape[1]
        query = self.query(x).view(rows, length, self.num_heads, self.head_size).transpose(1, 2)
        return self._attend(query, *key_value, visible, probabilities).view(x.shape)
