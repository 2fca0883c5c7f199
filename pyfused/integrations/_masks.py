"""What does a mask of transformers say, in the terms of pyfused.attention? And the function that makes such masks.

Every model gets what transformers' sdpa gets, a 4-D bool mask or None, which its code may slice, combine or move. A mask
that is nothing but padding and causality remembers that, so that attention needs no dense bias; a tensor made from it does
not, and is then taken as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask
from transformers.utils.import_utils import is_tracing

from ._supported import check_interface

_STRUCTURE, _BIAS = "_pyfused_structure", "_pyfused_bias"  # attributes of a mask


class Visible(NamedTuple):
    """Which keys a query sees, as pyfused.attention takes it once keys and values are cut to the first `keys`."""

    padding_mask: Tensor | None = None
    is_causal: bool = False
    attn_bias: Tensor | None = None
    keys: int | None = None


class _Structure(NamedTuple):
    visible: Visible
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
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """transformers' AttentionMaskInterface "pyfused": the mask of a call, (B, 1, Tq, Sk) bool where True is visible.

    Arguments and result are those of transformers' sdpa_mask, but for one: with fewer queries than keys a causal mask is
    never None, which would not say which of the keys are the queries' own.

    Raises:
        ValueError: a model of this config does not use the attention interface, so that its code would misread the mask.
    """
    if config is not None:
        check_interface(config)
    arguments = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        **kwargs,
        "allow_is_causal_skip": allow_is_causal_skip and (q_length == 1 or q_length == kv_length),
    }
    if _traced(attention_mask):
        return sdpa_mask(**arguments)
    with _counting_changes():
        mask = sdpa_mask(**arguments)
        if mask is None or mask.is_inference():
            return mask
        visible = _structure(q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask)
    if visible is not None:
        setattr(mask, _STRUCTURE, _Structure(visible, mask._version))
    return mask


def _structure(q_length, kv_length, q_offset, kv_offset, mask_function, padding) -> Visible | None:
    """What the mask is made of, if that is only padding and causality."""
    if type(kv_offset) is not int or kv_offset != 0:
        return None
    keys = None
    if mask_function is causal_mask_function:
        if isinstance(q_offset, Tensor):
            if not q_offset.is_cpu and q_length == 1:
                return None  # reading it would wait for the device at each step of decoding
            q_offset = int(q_offset)
        keys = q_offset + q_length  # what a static cache has behind them is not filled yet
        if keys > kv_length:
            return None
    elif mask_function is not bidirectional_mask_function:
        return None
    if padding is not None:
        if padding.dim() != 2 or padding.dtype != torch.bool:
            return None
        length = kv_length if keys is None else keys
        padding = F.pad(padding[:, :length], (0, max(0, length - padding.shape[1]))).clone()
    return Visible(padding, keys is not None and q_length > 1, None, keys)


def read_mask(mask: Tensor, query: Tensor, key: Tensor) -> Visible:
    """Which keys a query sees by a mask that an attention layer got: bool (True is visible) or added to the scores.

    Raises:
        TypeError: a mask of integers, which could mean either.
    """
    if not mask.is_floating_point() and mask.dtype != torch.bool:
        raise TypeError(
            f"attention_mask is {mask.dtype}; it takes torch.bool (True is visible) or a float that is added"
        )
    if mask.dtype == torch.bool and mask.dim() == 4:
        sizes = (query.shape[0], 1, query.shape[2], key.shape[2])
        structure = None if _traced(mask) else getattr(mask, _STRUCTURE, None)
        if structure is not None and mask.shape == sizes and not _changed(mask, structure.version):
            return structure.visible
        if query.shape[2] == 1 and mask.shape[1:] == sizes[1:]:
            return Visible(mask[:, 0, 0].expand(sizes[0], -1))
    return Visible(attn_bias=additive(mask, query.dtype))


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
    return torch.compiler.is_compiling() or is_tracing(mask)
