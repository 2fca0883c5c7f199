"""Which class of shapes does a call belong to, and how large is it within the class?

Speed depends on both: a kernel may win at 16 rows and lose at 512. Each function below takes the arguments of one operator's
forward or backward, in the operator's order, and returns (class, size).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..arguments import AttentionBackward, AttentionForward, taking
from ..weight_format import format_of

# Elements of a weight. tune measures 128 x 128 and 768 x 768, and a product of 384 x 384 behaves like the larger one.
_LARGE = 1 << 17
_HUGE = 1 << 24  # a vocabulary's, larger than half of a GPU's L2 cache
MOST_ROWS_BY_COLUMNS = 8  # kMost of csrc/include/pyfused/gemv_columns.h; gemm_columns.h multiplies more
MANY_BY_COLUMNS = ", by columns, many rows"


def shapes_of(operator: str, function: str, args: tuple[Any, ...]) -> tuple[str, int]:
    """The class of shapes of a call, and its size within the class.

    Raises:
        KeyError: no evidence is kept for this function.
    """
    return SHAPES[operator, function](*args)


def product_shapes(rows: int, *weights: torch.Tensor, scale: torch.Tensor | None = None) -> tuple[str, int]:
    """x W^T by the smallest weight, "huge", "large" or "small". Without lines about huge ones those about large ones count.
    Weights are stored by rows, as in nn.Linear, or by columns, as in Conv1D, with few rows of x or many. Integers are classes
    of their own. The size is how many rows x has."""
    form = format_of(scale)
    if form is not None:
        extent = "large" if min(form.columns(w) * w.shape[0] for w in weights) >= _LARGE else "small"
        return f"{extent}, {form.name}", rows
    least = min(w.numel() for w in weights)
    extent = "huge" if least >= _HUGE else "large" if least >= _LARGE else "small"
    if all(w.stride()[1] == 1 for w in weights):
        return extent, rows
    return extent + (", by columns" if rows <= MOST_ROWS_BY_COLUMNS else MANY_BY_COLUMNS), rows


def gradient_shapes(m: int, k: int, n: int) -> tuple[str, int]:
    """The product (m, k) (k, n) of a gradient. One of the three sizes is the number of rows, and the smallest counts as it."""
    rows, *weight = sorted((m, k, n))
    return "large" if weight[0] * weight[1] >= _LARGE else "small", rows


def _attention(a: AttentionForward | AttentionBackward) -> tuple[str, int]:
    """Attention by the queries that share a key head (few or many), the head size and the bias. The size is the number of
    scores."""
    b, h, sq, d = a.query.shape
    hkv, sk = a.key.shape[1:3]
    if a.cu_seqlens is not None:
        kind = "packed"
    else:
        kind = "few queries" if h // max(hkv, 1) * sq <= 16 else "many queries"
    bias = "" if a.bias_table is None else ", relative bias"
    bias += "" if a.attn_bias is None else ", dense bias"
    return f"{kind}, D {64 if d <= 64 else 128 if d <= 128 else 256}{bias}", b * h * sq * sk


def _linear(x, weight, bias, residual, scale=None, dynamic=False):
    shapes, size = product_shapes(x.shape[:-1].numel(), weight, scale=scale)
    return f"{shapes}, dynamic" if dynamic else shapes, size


def _linear_backward(a, b):
    (m, k), n = a.shape, b.shape[1]
    return gradient_shapes(m, k, n)


def _ffn(x, w_in, b_in, w_out, *_):
    return product_shapes(x.shape[:-1].numel(), w_in, w_out)


def _ffn_backward(grad_y, x, w_in, w_out, *_):
    return product_shapes(grad_y.shape[:-1].numel(), w_in, w_out)


def _gated_ffn(x, *weights_and_more):
    return product_shapes(x.shape[:-1].numel(), *weights_and_more[:3])


def _gated_ffn_backward(grad_y, x, *weights_and_more):
    return product_shapes(grad_y.shape[:-1].numel(), *weights_and_more[:3])


def _layer_norm(x, weight, bias, eps, residual, save):
    return "plain" if residual is None else "residual", x.numel()


def _rms_norm(x, weight, eps, residual, save):
    return "plain" if residual is None else "residual", x.numel()


def _norm_backward(grad_y, grad_total, x, *saved):
    return "plain" if grad_total is None else "residual", x.numel()


def _fourier_mix(x):
    b, s, n = x.shape
    return "long" if max(s, n) >= 1024 else "short", b * min(s, n)


def _relative_bias(table, query_length, key_length, *_):
    return "plain", table.shape[1] * query_length * key_length


def _relative_bias_backward(grad_out, *_):
    return "plain", grad_out.numel()


def _decode(like, plan, step):
    """A generation step by what its plan has, its width and its rows: they decide what sets the pace, instructions or bytes."""
    weights = [matrix.weight for matrix in plan.matrices()]
    kind = "cross-attention" if plan.has_cross else "decoder"
    kind += "" if all(w.is_floating_point() for w in weights) else ", integers"
    kind += "" if all(w.stride()[1] == 1 for w in weights) else ", by columns"
    rows = step.tokens.shape[0]
    return f"{kind}, {'narrow' if plan.hidden <= 1024 else 'wide'}, {'few' if rows <= 4 else 'many'} rows", rows


# Every function that evidence may be about.
SHAPES: dict[tuple[str, str], Callable[..., tuple[str, int]]] = {
    ("linear", "forward"): _linear,
    ("linear", "backward"): _linear_backward,
    ("ffn", "forward"): _ffn,
    ("ffn", "backward"): _ffn_backward,
    ("gated_ffn", "forward"): _gated_ffn,
    ("gated_ffn", "backward"): _gated_ffn_backward,
    ("layer_norm", "forward"): _layer_norm,
    ("layer_norm", "backward"): _norm_backward,
    ("rms_norm", "forward"): _rms_norm,
    ("rms_norm", "backward"): _norm_backward,
    ("fourier_mix", "forward"): _fourier_mix,
    ("attention", "forward"): taking(AttentionForward)(_attention),
    ("attention", "backward"): taking(AttentionBackward)(_attention),
    ("relative_bias", "forward"): _relative_bias,
    ("relative_bias", "backward"): _relative_bias_backward,
    ("decode", "forward"): _decode,
}
