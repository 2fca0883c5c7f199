"""How does torch.nn.MultiheadAttention run on pyfused's operators? The drop-in class and fuse_ share one function."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..notices import once
from ..ops import linear
from ..ops.attention import MAX_HEAD_SIZE
from ..ops.checks import is_dense
from ..own_forward import fused_forward
from ..spread import is_spread
from .attention import Visibility, bias_in

_STRIDED = torch.strided
_PLAIN = frozenset({Tensor, nn.Parameter})
_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})


def takes(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels take these tensors; `others` are weights. torch's own functions are better for float64, other
    devices, nested and sparse tensors, weights of a tensor subclass and, outside of torch.autocast, mixed dtypes."""
    dtype = x.dtype
    if dtype not in _DTYPES or not (x.is_cpu or x.is_cuda) or not is_dense(x):
        return False
    mixed = torch.is_autocast_enabled("cpu" if x.is_cpu else "cuda")
    for t in others:  # faster than all(...): a layer of torch.nn asks about 13 weights at each call
        if t is None:
            continue
        if t.layout is not _STRIDED or (t.dtype not in _DTYPES if mixed else t.dtype is not dtype):
            return False
        if type(t) not in _PLAIN and is_traceable_wrapper_subclass(t) and not is_spread(t):
            return False  # such as torchao's weights; the operators can read a DTensor
    return True


def visible_keys(
    like: Tensor,
    sizes: tuple[int, int, int, int],
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
) -> Visibility | None:
    """Converts torch.nn's masks, in which True hides a key, for pyfused.attention.

    Args:
        like: gives a bias its dtype.
        sizes: B, H, Sq, Sk.
        attn_mask: (Sq, Sk) or (B * H, Sq, Sk), bool or added to the scores.
        key_padding_mask: (B, Sk), bool or added to the scores.
        is_causal: the caller says that attn_mask is the causal mask.

    Returns:
        None for masks that do not fit, or for which torch has its own error or rule.
    """
    b, h, sq, sk = sizes
    padding_mask = attn_bias = None
    if key_padding_mask is not None:
        if key_padding_mask.shape != (b, sk):
            return None
        if key_padding_mask.dtype == torch.bool:
            padding_mask = ~key_padding_mask
        elif key_padding_mask.is_floating_point():
            attn_bias = bias_in(key_padding_mask, like.dtype)[:, None, None]
        else:
            return None
    if is_causal and (attn_mask is None or sq != sk):
        return None
    if attn_mask is not None and not is_causal:
        if attn_mask.dtype == torch.bool:
            hidden, attn_mask = attn_mask, like.new_zeros(attn_mask.shape)
            attn_mask = attn_mask.masked_fill(hidden, float("-inf"))
        elif not attn_mask.is_floating_point():
            return None
        if attn_mask.shape == (sq, sk):
            attn_mask = attn_mask[None, None]
        elif attn_mask.shape == (b * h, sq, sk):
            attn_mask = attn_mask.reshape(b, h, sq, sk)
        else:
            return None
        attn_mask = bias_in(attn_mask, like.dtype)
        attn_bias = attn_mask if attn_bias is None else attn_bias + attn_mask
    return Visibility(is_causal, padding_mask, attn_bias)


def attends(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `attend` takes this module and these tensors, with any masks."""
    weights = (module.in_proj_weight, module.q_proj_weight, module.in_proj_bias, module.bias_k, module.out_proj.weight)
    return (
        takes(query, key, value, *weights)
        and not (key.is_nested or value.is_nested)
        and module.head_dim <= MAX_HEAD_SIZE
        and not (module.training and module.dropout >= 1.0)
    )


def attend(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Visibility,
    batch_first: bool,
    residual: Tensor | None = None,
    probabilities: list[Tensor] | None = None,
) -> Tensor:
    """Projections, attention, and the output projection plus a residual.

    Args:
        query: (B, Sq, E), or (Sq, B, E) without batch_first, like residual and the result.
        key, value: the same with Sk and their own features. If all three are one tensor, one product projects it.
        visible: which keys count; a packing has B = 1.
        probabilities: a list that gets (B, H, Sq, Sk), behind the dropout. Attention is plain PyTorch then, and takes no
            packing.
    """
    q, k, v = _projected(module, query, key, value, batch_first)
    if module.bias_k is not None and module.bias_v is not None:
        k, v = _appended(k, module.bias_k, module), _appended(v, module.bias_v, module)
        visible = _with_one_key_more(visible)
    if module.add_zero_attn:
        zero = k.new_zeros(module.embed_dim)
        k, v = _appended(k, zero, module), _appended(v, zero, module)
        visible = _with_one_key_more(visible)
    if probabilities is not None:
        weights = visible.probabilities(q, k, module.head_dim**-0.5)
        probabilities.append(F.dropout(weights, module.dropout, module.training))
        out = probabilities[0] @ v
    else:
        out = visible.attend(q, k, v, dropout_p=module.dropout if module.training else 0.0)
    merged = out.transpose(1, 2) if batch_first else out.permute(2, 0, 1, 3)
    return linear(merged.flatten(2), module.out_proj.weight, module.out_proj.bias, residual=residual)


def _projected(module, query, key, value, batch_first) -> tuple[Tensor, ...]:
    """Queries, keys and values, each (B, H, S, d). Inputs that are the same tensor share one product."""
    e, weight, bias = module.embed_dim, module.in_proj_weight, module.in_proj_bias

    def heads(x, matrix, vector, count=1):
        """(B, S, ...) or (S, B, ...) -> `count` views (B, H, S, d)."""
        y = linear(x, matrix, vector)
        y = y.view(*y.shape[:2], count, module.num_heads, module.head_dim)
        return y.permute((2, 0, 3, 1, 4) if batch_first else (2, 1, 3, 0, 4)).unbind(0)

    if weight is not None and query is key and key is value:
        return heads(query, weight, bias, 3)
    b = (None, None, None) if bias is None else bias.chunk(3)
    if weight is None:
        matrices = module.q_proj_weight, module.k_proj_weight, module.v_proj_weight
    elif key is value:
        return (
            *heads(query, weight[:e], b[0]),
            *heads(key, weight[e:], None if bias is None else bias[e:], 2),
        )
    else:
        matrices = weight.chunk(3)
    return tuple(heads(x, w, v)[0] for x, w, v in zip((query, key, value), matrices, b, strict=True))


def _appended(x, row, module) -> Tensor:
    """(B, H, S, d) with one more key or value, row (..., E), for all of B."""
    row = row.view(1, module.num_heads, 1, module.head_dim)
    return torch.cat((x, row.expand(x.shape[0], -1, -1, -1)), 2)


def _with_one_key_more(visible: Visibility) -> Visibility:
    padding, bias = visible.padding_mask, visible.attn_bias
    return replace(
        visible,
        padding_mask=None if padding is None else F.pad(padding, (0, 1), value=True),
        attn_bias=None if bias is None else F.pad(bias, (0, 1)),
    )


@fused_forward
def multihead_forward(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """pyfused.attention, where need_weights=False"""
    probabilities: list[Tensor] | None = None
    if need_weights:
        once(
            "MultiheadAttention was called with need_weights=True, its default: the probabilities are computed and "
            "averaged by plain PyTorch; the fused path needs need_weights=False"
        )
        probabilities = []
        is_causal = is_causal and attn_mask is None  # torch ignores the hint if it returns probabilities
    out = _fused(module, query, key, value, key_padding_mask, attn_mask, is_causal, probabilities)
    if out is not None:
        if not probabilities:
            return out, None
        weights = probabilities[0].mean(1) if average_attn_weights else probabilities[0]
        return out, weights if query.dim() == 3 else weights[0]
    return nn.MultiheadAttention.forward(
        *(module, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
    )


def _fused(module, query, key, value, key_padding_mask, attn_mask, is_causal, probabilities) -> Tensor | None:
    """None leaves the call to torch, errors included."""
    rank = query.dim()
    if not (attends(module, query, key, value) and rank in (2, 3) and key.dim() == rank and value.dim() == rank):
        return None
    if is_causal and (module.bias_k is not None or module.add_zero_attn):
        return None  # torch's rules differ with and without the hint
    batch_first = module.batch_first or rank == 2
    if rank == 2:
        same = query is key, key is value
        query = query[None]
        key = query if same[0] else key[None]
        value = key if same[1] else value[None]
        key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
    (b, sq), (kb, sk) = _sizes(query, batch_first), _sizes(key, batch_first)
    if kb != b or key.shape[:2] != value.shape[:2] or query.shape[2] != module.embed_dim:
        return None
    if (key.shape[2], value.shape[2]) != (module.kdim, module.vdim):
        return None
    visible = visible_keys(query, (b, module.num_heads, sq, sk), attn_mask, key_padding_mask, is_causal)
    if visible is None:
        return None
    out = attend(module, query, key, value, visible, batch_first, probabilities=probabilities)
    return out if rank == 3 else out[0]


def _sizes(x: Tensor, batch_first: bool) -> tuple[Any, Any]:
    """B and S."""
    return (x.shape[0], x.shape[1]) if batch_first else (x.shape[1], x.shape[0])


class MultiheadAttention(nn.MultiheadAttention):
    """torch.nn.MultiheadAttention, its constructor, state dict, masks and results, on pyfused.attention.

    Call it with need_weights=False. With need_weights=True, torch's default, it returns the averaged probabilities, which
    the fused path never stores: such a call attends in plain PyTorch, and a FallbackWarning says so once. torch's own code
    runs calls that the kernels do not take: float64, nested tensors, head sizes above 256, mixed dtypes.

    In bool masks True hides a key, as everywhere in torch.nn. A query that may see no key gets zeros from the attention;
    torch.nn gives NaN or zeros, depending on its path. Its probabilities are zeros too.
    """

    forward = multihead_forward
    """As torch.nn.MultiheadAttention.forward: (B, Sq, E) with batch_first, else (Sq, B, E), or (Sq, E); and None, or the
    probabilities."""
