"""How do decode's CPU and CUDA kernels receive a plan and a call? As C structs. csrc/include/pyfused/decode_plan.h explains
each field."""

from __future__ import annotations

import ctypes
from typing import Any

from torch import Tensor

from pyfused.activations import ACTIVATIONS
from pyfused.decode_plan import DecodeLayer, DecodePlan, DecodeStep, Matrix, Norm, sizes
from pyfused.weight_format import format_of

from .buckets import distance_buckets
from .layout import is_by_columns

_ADDRESS, _INT, _FLOAT = ctypes.c_size_t, ctypes.c_int64, ctypes.c_double


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class CMatrix(ctypes.Structure):
    """DecodeMatrix."""

    _fields_ = (*_fields(_ADDRESS, "weight bias scale"), *_fields(_INT, "n k stride kind"))

    @classmethod
    def of(cls, matrix: Matrix) -> CMatrix:
        weight = matrix.weight
        if weight is None:
            return cls()
        transposed = is_transposed(matrix)
        stride = weight.stride()[1 if transposed else 0]
        addresses = weight.data_ptr(), _address(matrix.bias), _address(matrix.scale)
        form = format_of(matrix.scale)
        return cls(*addresses, *sizes(matrix), stride, int(transposed) if form is None else form.bits)


class CNorm(ctypes.Structure):
    """DecodeNorm."""

    _fields_ = (*_fields(_ADDRESS, "weight bias"), *_fields(_FLOAT, "eps"))

    @classmethod
    def of(cls, norm: Norm) -> CNorm:
        return cls(_address(norm.weight), _address(norm.bias), norm.eps)


class CLayer(ctypes.Structure):
    """DecodeLayer."""

    _fields_ = (
        ("attention_norm", CNorm),
        *_fields(CMatrix, "query key value output"),
        ("cross_norm", CNorm),
        *_fields(CMatrix, "cross_query cross_output"),
        ("feed_forward_norm", CNorm),
        *_fields(CMatrix, "gate inner outer"),
        *_fields(_FLOAT, "scale cross_scale"),
    )

    @classmethod
    def of(cls, layer: DecodeLayer) -> CLayer:
        kinds: Any = {CNorm: CNorm.of, CMatrix: CMatrix.of}
        return cls(*[kinds.get(kind, float)(getattr(layer, name)) for name, kind in cls._fields_])


class CPlan(ctypes.Structure):
    """DecodePlan. It holds the tensors that its addresses point to."""

    _fields_ = (
        *_fields(_INT, "layers hidden heads kv_heads head_size intermediate is_rms activation"),
        *_fields(CMatrix, "token_embedding position_embedding head"),
        ("final_norm", CNorm),
        ("logits_scale", _FLOAT),
        *_fields(_ADDRESS, "table buckets"),
        *_fields(_INT, "table_bucket table_head table_float32 span"),
        ("layer", _ADDRESS),
    )

    @classmethod
    def of(cls, plan: DecodePlan) -> CPlan:
        layers = (CLayer * len(plan.layers))(*map(CLayer.of, plan.layers))
        made = cls(
            layers=len(layers),
            hidden=plan.hidden,
            heads=plan.heads,
            kv_heads=plan.kv_heads,
            head_size=plan.head_size,
            intermediate=sizes(plan.layers[0].inner)[0] if plan.layers else 0,
            is_rms=plan.is_rms,
            activation=ACTIVATIONS[plan.activation].code,
            token_embedding=CMatrix.of(plan.token_embedding),
            position_embedding=CMatrix.of(plan.position_embedding),
            head=CMatrix.of(plan.head),
            final_norm=CNorm.of(plan.final_norm),
            logits_scale=plan.logits_scale,
            layer=ctypes.addressof(layers),
        )
        buckets = None
        if (table := plan.bias_table) is not None:
            buckets = distance_buckets(False, table.shape[0], plan.max_distance, table.device)
            made.table, made.buckets = table.data_ptr(), buckets.data_ptr()
            made.table_bucket, made.table_head = table.stride()
            made.table_float32, made.span = table.element_size() == 4, buckets.shape[0] // 2
        made.held = layers, buckets, plan.leaves()
        return made


class CCall(ctypes.Structure):
    """DecodeCall. The caller holds the tensors."""

    _fields_ = (
        ("rows", _INT),
        *_fields(_ADDRESS, "tokens places position_ids"),
        *_fields(_INT, "place most"),
        ("mask", _ADDRESS),
        ("mask_stride", _INT),
        ("caches", _ADDRESS),
        *_fields(_INT, "batch_stride head_stride row_stride"),
        ("cross_caches", _ADDRESS),
        *_fields(_INT, "sources source_length cross_batch_stride cross_head_stride cross_row_stride"),
        *_fields(_ADDRESS, "cross_mask logits chosen uniform"),
        *_fields(_FLOAT, "temperature top_p"),
        ("top_k", _INT),
    )

    @classmethod
    def of(cls, step: DecodeStep, logits: Tensor, chosen: Tensor | None) -> CCall:
        mask, cross = step.mask, step.cross
        caches = addresses(step.caches)
        made = cls(
            step.tokens.shape[0],
            step.tokens.data_ptr(),
            _address(step.places),
            _address(step.position_ids),
            step.place,
            step.most,
            _address(mask),
            0 if mask is None else mask.stride(0),
            ctypes.addressof(caches),
            *step.caches[0].stride()[:3],
        )
        made.logits, made.chosen, made.uniform = logits.data_ptr(), _address(chosen), _address(step.uniform)
        made.temperature, made.top_k, made.top_p = step.temperature, step.top_k, step.top_p
        of_cross = None
        if cross:
            of_cross = addresses(cross)
            made.cross_caches, made.cross_mask = ctypes.addressof(of_cross), _address(step.cross_mask)
            made.sources, made.source_length = cross[0].shape[0], cross[0].shape[2]
            made.cross_batch_stride, made.cross_head_stride, made.cross_row_stride = cross[0].stride()[:3]
        made.held = caches, of_cross
        return made


def is_transposed(matrix: Matrix) -> bool:
    """Whether memory holds the weight by columns, as Hugging Face's Conv1D does."""
    return matrix.weight is not None and is_by_columns(matrix.weight)


def misfit(plan: DecodePlan, step: DecodeStep) -> str | None:
    """Why no kernel takes the step's caches, or None."""
    if plan.has_cross and not step.cross:
        return "takes a cache with the encoder's keys for a plan with cross-attention"
    for tensors in (step.caches, step.cross):
        strides = {t.stride() for t in tensors}
        if len(strides) > 1 or any(stride[3] != 1 for stride in strides):
            return "takes caches of equal strides whose last dimension is contiguous"
    return None


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def addresses(tensors: list[Tensor]) -> Any:
    return (_ADDRESS * len(tensors))(*[t.data_ptr() for t in tensors])
