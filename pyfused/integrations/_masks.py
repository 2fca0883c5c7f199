"""What does a mask of transformers say, in the terms of pyfused.attention? And the function that makes such masks.

Every model gets what transformers' sdpa gets, a 4-D bool mask or None, which its code may slice, combine or move. A mask is
looked at once: one that is nothing but padding and causality needs no dense bias. What was seen is kept as an attribute of
the tensor, so that no tensor made from it has it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask
from transformers.utils.import_utils import is_tracing

from .._tracing import tracing
from ._supported import check_interface, may_leave_out_masks

_STRUCTURE, _BIAS = "_pyfused_structure", "_pyfused_bias"  # attributes of a mask


class Visible(NamedTuple):
    """Which keys a query sees, as pyfused.attention takes it once keys and values are cut to the first `keys`."""

    padding_mask: Tensor | None = None
    is_causal: bool = False
    attn_bias: Tensor | None = None
    keys: int | None = None


class _Structure(NamedTuple):
    visible: Visible | None  # None: neither padding nor causality alone
    version: int


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """transformers' AttentionMaskInterface "pyfused": the mask of a call, (B, 1, Tq, Sk) bool where True is visible.

    Arguments and result are those of transformers' sdpa_mask, but that it is None less often: with fewer queries than keys a
    causal mask never is, as that would not say which of the keys are the queries' own.

    Raises:
        ValueError: a model of this config does not use the attention interface, so that its code would misread the mask.
    """
    plain = True
    if config is not None:
        check_interface(config)
        plain = may_leave_out_masks(config)
    arguments = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        **kwargs,
        "allow_is_causal_skip": allow_is_causal_skip and plain and (q_length == 1 or q_length == kv_length),
        "allow_is_bidirectional_skip": allow_is_bidirectional_skip and plain,
    }
    return sdpa_mask(**arguments)


def read_mask(mask: Tensor, query: Tensor, key: Tensor) -> Visible:
    """Which keys a query sees by a mask that an attention layer got: bool (True is visible) or added to the scores.

    Raises:
        TypeError: a mask of integers, which could mean either.
    """
    if not mask.is_floating_point() and mask.dtype != torch.bool:
        raise TypeError(
            f"attention_mask is {mask.dtype}; it takes torch.bool (True is visible) or a float that is added"
        )
    if mask.dim() == 2:
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}; it takes four dimensions, (B, H or 1, Tq, Sk)")
    sizes = (query.shape[0], 1, query.shape[2], key.shape[2])
    if mask.dtype == torch.bool and query.shape[2] == 1 and mask.shape[1:] == sizes[1:]:
        return Visible(mask[:, 0, 0].expand(sizes[0], -1))
    if mask.shape == sizes and not (_traced(mask) or mask.requires_grad):
        structure = getattr(mask, _STRUCTURE, None)
        if structure is None or _changed(mask, structure.version):
            structure = _Structure(_recognised(mask), 0 if mask.is_inference() else mask._version)
            if not mask.is_inference():
                setattr(mask, _STRUCTURE, structure)
        if structure.visible is not None:
            return structure.visible
    return Visible(attn_bias=additive(mask, query.dtype))


def _recognised(mask: Tensor) -> Visible | None:
    """What a (B, 1, Tq, Sk) mask is made of, if it is only padding, with or without causality. Reads it once a forward: B Tq
    Sk bytes, beside the B H Tq Sk scores of each layer; on a device that waits, as transformers' own look at the padding."""
    if mask.device.type == "meta" or (mask.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    seen = mask[:, 0]
    if mask.dtype != torch.bool:
        seen = seen == 0
        hidden = torch.finfo(mask.dtype).min
        # eager's mask: hidden keys are finite, so that a query which sees none sees all of them alike
        if not bool((seen | (mask[:, 0] <= hidden)).all()) or not bool(seen.any(-1).all()):
            return None
    queries, keys = seen.shape[1:]
    with _counting_changes():
        last = seen[:, -1].clone()
        if bool((seen == last[:, None]).all()):
            return Visible(None if bool(last.all()) else last)
        filled = int(last.any(0).nonzero().max()) + 1 if bool(last.any()) else 0
        for end in dict.fromkeys((keys, filled)):  # behind what is filled, a static cache has room
            if end < queries:
                continue
            places = torch.arange(end, device=mask.device)
            causal = places <= places[end - queries :, None]
            if torch.equal(seen[..., :end], causal & last[:, None, :end]) and not bool(seen[..., end:].any()):
                padding = last[:, :end]
                return Visible(None if bool(padding.all()) else padding.clone(), True, None, end)
    return None


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as a bias of this dtype. A bool mask is converted once for all layers; -inf hides, so that a query that sees
    nothing gives zeros. A float mask stays what it is: finfo.min is finite, and such a query sees every key alike."""
    if mask.dtype == dtype:
        return mask
    if mask.dtype != torch.bool:
        return mask.clamp(min=torch.finfo(dtype).min).to(dtype)
    if _traced(mask) or mask.is_inference():
        return _hidden(mask, dtype)
    kept = getattr(mask, _BIAS, None)
    if kept is None or kept[0] != (dtype, mask.device) or _changed(mask, kept[1]):
        with _counting_changes():
            kept = (dtype, mask.device), mask._version, _hidden(mask, dtype)
        setattr(mask, _BIAS, kept)
    return kept[2]


def _hidden(mask: Tensor, dtype: torch.dtype) -> Tensor:
    zero, hidden = (torch.full((), value, dtype=dtype, device=mask.device) for value in (0.0, -torch.inf))
    return torch.where(mask, zero, hidden)


def _counting_changes() -> AbstractContextManager[Any]:
    """Tensors made here count their in-place changes, by which a mask is known to differ from what it remembers; those of
    inference mode do not."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


def _changed(mask: Tensor, version: int) -> bool:
    return mask.is_inference() or mask._version != version


def _traced(mask: Tensor | None) -> bool:
    return tracing() or is_tracing(mask)
