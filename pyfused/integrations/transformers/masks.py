"""How do a transformers mask and position bias become arguments of pyfused.attention? Also makes the masks.

Every model gets the mask that sdpa would get: a 4-D bool mask or None. The model's code may slice, combine or move it. A CPU
mask that holds only padding and causality needs no dense bias. Each layer reads the mask anew and caches nothing, because
numpy, shared memory and .data change a mask without changing its version counter. The same holds for a position bias.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask

from ...kernels.cpu.mask_structure import all_zero, distances, slopes, structure
from ...nn.attention import Visibility, additive
from ...ops import DistanceBias
from ...tracing import tracing
from .support import check_interface, may_leave_out_masks

# Bytes of a position bias. The kernel adds a smaller one, which a core's cache holds, sooner than it could be read here.
WORTH_A_LOOK = 1 << 22
# Scores. Of fewer ones a dense mask, with queries that see no key, costs less than to tell these from the others.
WORTH_TELLING_APART = 1 << 16


def make_mask(
    batch_size: int,
    q_length: int | None = None,
    kv_length: int = 0,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """transformers' AttentionMaskInterface "pyfused": a (B, 1, Tq, Sk) bool mask, True where a key is visible.

    Takes and returns the same as transformers' sdpa_mask, but returns None less often. A causal mask with fewer queries than
    keys is never None, because None would not say which keys are the queries' own. Older releases pass cache_position, the
    queries' positions, in place of q_length and q_offset.

    Raises:
        ValueError: models of this config do not use the attention interface, so their code would misread the mask.
    """
    plain = True
    if config is not None:
        check_interface(config)
        plain = may_leave_out_masks(config)
    positions = kwargs.get("cache_position")
    if positions is None:
        queries = {"q_length": q_length, "q_offset": q_offset}
    else:
        q_length, queries = positions.shape[0], {}
    arguments = {
        "batch_size": batch_size,
        **queries,
        "kv_length": kv_length,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        **kwargs,
        "allow_is_causal_skip": allow_is_causal_skip and plain and (q_length == 1 or q_length == kv_length),
        "allow_is_bidirectional_skip": allow_is_bidirectional_skip and plain,
    }
    return sdpa_mask(**arguments)


def read_mask(mask: Tensor, query: Tensor, key: Tensor, biased: bool = False) -> Visibility:
    """Which keys a query sees. The mask is bool (True is visible) or a float that is added to the scores. Beside a position
    bias (`biased`) sdpa turns a bool mask into the least finite number.

    Raises:
        TypeError: the mask holds integers, which could mean either.
    """
    if not mask.is_floating_point() and mask.dtype != torch.bool:
        raise TypeError(
            f"attention_mask is {mask.dtype}; it takes torch.bool (True is visible) or a float that is added"
        )
    if mask.dim() == 2:
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}; it takes four dimensions, (B, H or 1, Tq, Sk)")
    sizes = (query.shape[0], 1, query.shape[2], key.shape[2])
    zeros_if_blind = mask.dtype == torch.bool and not biased
    if zeros_if_blind and query.shape[2] == 1 and mask.shape[1:] == sizes[1:]:
        return Visibility(padding_mask=mask[:, 0, 0].expand(sizes[0], -1))
    wide = _for_each_query(mask, sizes)
    if wide is not None:
        # Eager's float masks hide keys with finite numbers: a query that sees no key attends to all keys alike.
        visible = _recognised(wide, all_see=not zeros_if_blind)
        if visible is not None:
            return visible
    if biased and mask.dtype == torch.bool:
        mask = (~mask).to(query.dtype) * torch.finfo(query.dtype).min
    return Visibility(attn_bias=additive(mask, query.dtype))


def _for_each_query(mask: Tensor, sizes: tuple[int, ...]) -> Tensor | None:
    """A mask that may be read, alike for all heads, as (B, 1, Tq, Sk), not copied. Older code has one row for all queries."""
    known = mask.dim() == 4 and all(a in (1, b) for a, b in zip(mask.shape, sizes)) and mask.shape[3] == sizes[3]
    return mask.expand(sizes) if known and not mask.requires_grad and may_look() else None


def _recognised(mask: Tensor, all_see: bool) -> Visibility | None:
    """The padding and causality of a (B, 1, Tq, Sk) mask; None if it holds anything else, or with all_see a query that sees no
    key. On a GPU, reading the mask would wait for the device in every layer, so masks there stay dense."""
    found = structure(mask, all_see)
    if found is None:
        return None
    end, padded = found
    padding = None
    if padded:
        last = mask[:, 0, -1, : end or None]
        padding = last.clone() if mask.dtype == torch.bool else last == 0
    return Visibility(end > 0, padding, keys=end or None)


def with_blind_queries(
    mask: Tensor, query: Tensor, key: Tensor, biased: bool
) -> tuple[Visibility, Tensor | None] | None:
    """(padding and causality, the queries (B, Tq) that attend to all keys alike) of a mask, float or beside a position bias,
    that hides every key from some queries; None for others. Only a finite least number does that; behind -inf they get zeros,
    and the second is None."""
    sizes = (query.shape[0], 1, query.shape[2], key.shape[2])
    # Beside float16's least number float32 scores still count, as in sdpa, which a bool mask stands for. Scores in float16, to
    # which older code adds a float mask, do not.
    half = query.dtype == torch.float16
    few = math.prod(sizes) * query.shape[1] < WORTH_TELLING_APART and not half
    wide = _for_each_query(mask, sizes) if (mask.is_floating_point() or (biased and not half)) and not few else None
    visible = None if wide is None else _recognised(wide, all_see=False)
    if visible is None or (real := visible.padding_mask) is None:
        return None
    finite = mask.dtype == torch.bool or bool(mask[:, 0, 0].amin() > -torch.inf)  # the first query sees fewest keys
    seen = real.cumsum(1)[:, -sizes[2] :] > 0 if visible.is_causal else real.any(1, keepdim=True).expand(-1, sizes[2])
    return visible, ~seen if finite else None


def is_zero(bias: Tensor) -> bool:
    """T5's cross-attention passes one tensor of zeros to all layers. Reads the values only if no device has to wait."""
    return not bias.requires_grad and may_look() and all_zero(bias)


def with_position_bias(visible: Visibility, bias: Tensor, query: Tensor, key: Tensor) -> Visibility:
    """Adds a position bias: as a table that the kernel reads, where every value is known to depend on the distance alone.

    transformers' T5 hands a (1, H, S, S) tensor from layer to layer. Only its values say what it holds: hooks and users edit
    it, and later layers know no table. A bias with a gradient stays dense: the gradient belongs to the tensor, whoever made it
    and whoever put a hook on it.

    ALiBi is (B or 1, H, 1, Sk), alike for all queries: slope * place of the key. slope * distance gives the same probabilities.
    In half precision a float32 bias keeps its precision so, however small it is.
    """
    sizes = (1, query.shape[1], query.shape[2], key.shape[2])
    readable = may_look() and visible.relative_bias is None and not bias.requires_grad
    if readable and bias.shape == sizes and bias.nbytes >= WORTH_A_LOOK and (table := distances(bias)) is not None:
        return replace(visible, relative_bias=DistanceBias(additive(table, query.dtype)))
    large = 4 * math.prod(sizes) >= WORTH_A_LOOK or bias.dtype != query.dtype
    alibi = readable and bias.dim() == 4 and bias.shape[1:] == (sizes[1], 1, sizes[3]) and sizes[2] <= sizes[3]
    if alibi and large and (slope := slopes(bias, visible.padding_mask)) is not None:
        distance = torch.arange(1 - sizes[3], sizes[3], dtype=torch.float32, device="cpu")
        return replace(visible, relative_bias=DistanceBias(slope * distance))
    return with_dense_bias(visible, bias, query.dtype)


def with_dense_bias(visible: Visibility, bias: Tensor, dtype: torch.dtype) -> Visibility:
    """Adds a bias as it is."""
    bias = additive(bias, dtype)
    return replace(visible, attn_bias=bias if visible.attn_bias is None else bias + visible.attn_bias)


def may_look() -> bool:
    """Whether code may branch on a tensor's values: not in a trace, nor in torch.func's transforms."""
    return not (tracing() or torch._C._are_functorch_transforms_active())
