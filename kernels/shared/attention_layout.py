"""How do attention's CPU and CUDA kernels receive a call? As one struct of sizes, strides and options.

Launchers of several backends also find T5's buckets and the strides of a result here.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from .buckets import distance_buckets


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class AttentionLayout(ctypes.Structure):
    """The struct of csrc/include/pyfused/attention_layout.h, which explains each field. A launch that holds its address must
    hold the struct too."""

    _fields_ = (
        *_fields(ctypes.c_int64, "batch heads kv_heads query_length key_length head_size longest"),
        *_fields(ctypes.c_int64 * 3, "query key value out grad_out"),
        *_fields(ctypes.c_int64 * 4, "bias"),
        *_fields(ctypes.c_int64, "chunk table_bucket table_head table_float32 span is_causal"),
        *_fields(ctypes.c_double, "scale dropout_p"),
    )

    @classmethod
    def of(cls, call: Any, out: Any, *, grad_out: Any = (0, 0, 0), chunk: int = 0) -> AttentionLayout:
        """The layout of an AttentionForward or AttentionBackward. `out` and `grad_out` are strides."""
        (b, h, sq, d), packed, table = call.query.shape, call.cu_seqlens is not None, call.bias_table
        layout = cls(
            batch=call.cu_seqlens.shape[0] - 1 if packed else b,
            heads=h,
            kv_heads=call.key.shape[1],
            query_length=sq,
            key_length=call.key.shape[2],
            head_size=d,
            longest=call.max_seqlen if packed else sq,
            query=call.query.stride()[:3],
            key=call.key.stride()[:3],
            value=call.value.stride()[:3],
            out=out[:3],
            grad_out=grad_out[:3],
            chunk=chunk,
            is_causal=call.is_causal,
            scale=call.scale,
            dropout_p=call.dropout_p,
        )
        if call.attn_bias is not None:
            layout.bias = call.attn_bias.stride()
        if table is not None:
            layout.table_bucket, layout.table_head = table.stride()
            layout.table_float32 = table.dtype == torch.float32
            layout.span = span(call)
        return layout

    @property
    def address(self) -> int:
        return ctypes.addressof(self)


def buckets(call: Any) -> Tensor | None:
    """The distance_buckets() of the call's T5 table, on the table's device. None without a table."""
    table = call.bias_table
    if table is None:
        return None
    return distance_buckets(call.bidirectional, table.shape[0], call.max_distance, table.device)


def span(call: Any) -> int:
    """How many distances T5's bias tells apart on one side; 0 without a table."""
    found = buckets(call)
    return 0 if found is None else found.shape[0] // 2


def by_rows(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of a (B, H, S, D) tensor stored as (B, S, H, D). Merging its heads is then a view."""
    b, h, s, d = tensor.shape
    return (b, h, s, d), (s * h * d, d, h * d, 1)
