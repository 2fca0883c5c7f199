"""What does a mask of transformers say, in the terms of pyfused.attention? And the function that makes such masks.

Every model gets what transformers' sdpa gets, a 4-D bool mask or None, which its code may slice, combine or move. A mask in
the host's memory that is nothing but padding and causality needs no dense bias. Each layer looks for itself, and nothing is
kept: masks are changed through numpy, shared memory or .data, which no version counter counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask

from ...kernels.cpu.mask_structure import structure
from ...nn.attention import Visibility, additive
from ...tracing import tracing
from .support import check_interface, may_leave_out_masks


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


def read_mask(mask: Tensor, query: Tensor, key: Tensor) -> Visibility:
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
        return Visibility(padding_mask=mask[:, 0, 0].expand(sizes[0], -1))
    if mask.shape == sizes and not mask.requires_grad and may_look():
        visible = _recognised(mask)
        if visible is not None:
            return visible
    return Visibility(attn_bias=additive(mask, query.dtype))


def _recognised(mask: Tensor) -> Visibility | None:
    """What a (B, 1, Tq, Sk) mask is made of, if it is only padding, with or without causality.

    On a GPU a look waits for the device, once a layer, so masks there are dense. Of eager's float masks, whose hidden keys are
    finite, a query that sees no key sees all of them alike: such a mask is dense too.
    """
    found = structure(mask, all_see=mask.dtype != torch.bool)
    if found is None:
        return None
    end, padded = found
    padding = None
    if padded:
        last = mask[:, 0, -1, : end or None]
        padding = last.clone() if mask.dtype == torch.bool else last == 0
    return Visibility(end > 0, padding, keys=end or None)


def may_look() -> bool:
    """Whether what a tensor holds may decide what is computed: not in a trace, nor in torch.func's transforms."""
    return not (tracing() or torch._C._are_functorch_transforms_active())
