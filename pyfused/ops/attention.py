"""attention: softmax(scale * query key^T + biases) value, over the keys that a query may see (Vaswani et al. 2017).

An online softmax over tiles of keys (Dao et al. 2022, arXiv:2205.14135): no Sq x Sk tensor, forward or backward.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch

from ..arguments import AttentionBackward, AttentionForward, schema, taking
from ..rules import its_kind
from ..tracing import tracing
from .autocast import autocast_is_on, autocasts, in_lower_precision, to
from .checks import as_float, check_dense, check_floating, check_like, check_shape, may_look, name_of
from .cost import Cost, size
from .registration import Operator
from .relative_bias import EACH, DistanceBias, RelativeBias, by_distance, check_buckets

MAX_HEAD_SIZE = 256
_is_compiling = torch.compiler.is_compiling


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    is_causal: bool = False,
    padding_mask: torch.Tensor | None = None,
    relative_bias: RelativeBias | DistanceBias | None = None,
    attn_bias: torch.Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
) -> torch.Tensor:
    """Scaled dot-product attention with its masks, bias and dropout inside one kernel.

    The packed form puts sequences of several lengths one behind the other, with no padding between them: query
    (1, H, T, D), key and value (1, Hkv, T, D). cu_seqlens says where each begins. A token sees only its own sequence. The
    results are those of a batch of N padded sequences, and only the real tokens cost time.

    torch.autocast casts query, key, value and attn_bias to its dtype, but not a float32 bias table.

    No backend reads padding. NaN or inf in keys and values that padding_mask hides, or in another packed sequence, changes
    no result and no gradient; the gradients there are zero. The same holds for query rows that padding and causality leave
    no key. Keys hidden by is_causal or by a bias of -inf only get a probability of zero: NaN or inf among their values may
    reach queries that do not see them, as in PyTorch.

    A finite number hides no key, however small: if all keys of a query have the bias torch.finfo(dtype).min, it attends to all
    of them equally, as in PyTorch, and has that softmax's gradient. In half precision on a GPU this has two limits. Numbers
    below -2.3e38 count as -inf. A query whose log-sum-exp is beyond 2^20 has zero gradient, and passes none to its keys and
    values; below that, the gradient has the rounding of a float32 log-sum-exp, one part in 2^24.

    Gradients are differentiable: with create_graph=True the backward runs in plain PyTorch, in O(Sq Sk) memory.

    Args:
        query: (B, H, Sq, D), float32, float16, bfloat16 (float64 runs on the reference); D at most 256. Any strides
            are used in place; a last dimension that is not contiguous is copied.
        key, value: (B, Hkv, Sk, D) of query's dtype and device; Hkv divides H, and query head h reads head h * Hkv // H.
        is_causal: query i sees key j when j <= i + Sk - Sq (aligned at the bottom right).
        padding_mask: (B, Sk), any dtype; nonzero marks a real token.
        relative_bias: T5's bias, computed inside the kernel from its table (num_buckets, H) of query's dtype or float32.
            There is no Sq x Sk tensor, forward or backward, and the table's gradient is bitwise repeatable. Query i has
            position i + Sk - Sq, as after Sk - Sq cached tokens. DistanceBias(table) gives any bias by distance in the same
            way, from a table (H, 2 L - 1).
        attn_bias: additive bias of query's dtype, broadcastable to (B, H, Sq, Sk); -inf hides a key. Its gradient, if it
            requires one, is the only dense (B, H, Sq, Sk) tensor here.
        scale: multiplies the scores; 1/sqrt(D) if None.
        dropout_p: each probability becomes 0 with this chance, else is divided by 1 - dropout_p; 0 <= dropout_p < 1. The
            mask comes from torch's default generator of query's device (torch.manual_seed). It is the same on every
            backend, and in the packed form the same as for a padded (N, H, S, S).
        cu_seqlens: (N + 1,) integers on query's device, cumulative lengths: sequence n is the rows cu_seqlens[n] to
            cu_seqlens[n + 1] - 1. They rise from 0 to T; equal neighbours are an empty sequence. B is 1 then,
            Sq = Sk = T, and padding_mask and attn_bias are None.
        max_seqlen: the longest sequence's length, or more. None reads it from cu_seqlens, which synchronises on a GPU; in a
            trace None is T.

    Returns:
        (B, H, Sq, D) of query's dtype, stored as (B, Sq, H, D), so that merging the heads is a view. A query that sees no
        key gives zeros and has zero gradient. Any size may be 0; if Hkv is 0, H is too.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    if isinstance(attn_bias, torch.Tensor) and not _is_compiling() and attn_bias.is_neg():
        attn_bias = attn_bias.resolve_neg()  # z.conj().imag: kernels would read it with the other sign
    given = None
    if cu_seqlens is None and not autocast_is_on():
        relative: Any = (None, True, 128) if relative_bias is None else relative_bias
        if relative.__class__ is DistanceBias:
            _check_distances(relative.table, query, key)
            relative = by_distance(relative)
        elif relative_bias is not None and (relative.__class__ is not RelativeBias or relative.max_distance == EACH):
            relative = None  # bind() has the error
        if relative is not None:
            # AttentionForward's fields as given; a plain tuple saves 0.4 us
            given = (
                *(query, key, value, is_causal, padding_mask, attn_bias, scale, dropout_p, None, False),
                *(*relative, None, max_seqlen),
            )
            outputs = _ATTENTION.call_prepared(given)
            if outputs is not None:
                return outputs[0]
    options: dict[str, Any] = {
        "is_causal": is_causal, "padding_mask": padding_mask, "attn_bias": attn_bias, "scale": scale,
        "dropout_p": dropout_p, "cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen,
    }  # fmt: skip
    if autocast_is_on() and autocasts(query):
        dtype = torch.get_autocast_dtype(query.device.type)
        kinds = RelativeBias, DistanceBias
        if isinstance(relative_bias, kinds) and getattr(relative_bias.table, "dtype", None) != torch.float32:
            relative_bias = relative_bias._replace(table=to(relative_bias.table, dtype))
        options |= {"attn_bias": to(attn_bias, dtype), "relative_bias": relative_bias}
        return in_lower_precision(attention, query, key, value, **options)
    bound = bind(query, key, value, relative_bias=relative_bias, **options)
    return (_ATTENTION(*bound) if given is None else _ATTENTION.call_checked(given, bound))[0]


def bind(
    query,
    key,
    value,
    *,
    is_causal=False,
    padding_mask=None,
    relative_bias=None,
    attn_bias=None,
    scale=None,
    dropout_p=0.0,
    cu_seqlens=None,
    max_seqlen=None,
) -> AttentionForward:
    """Checks the arguments and puts them in the schema's order."""
    check_floating(query, "query")
    check_like(key, "key", query, "query")
    check_like(value, "value", query, "query")
    of_query, of_key = query.shape, key.shape
    if len(of_query) != 4:
        raise ValueError(f"query has shape {tuple(of_query)}; it takes (B, H, Sq, D)")
    if len(of_key) != 4:
        raise ValueError(f"key has shape {tuple(of_key)}; it takes (B, Hkv, Sk, D)")
    b, h, sq, d = of_query
    kb, hkv, sk, kd = of_key
    if kb != b or kd != d:
        raise ValueError(f"key has shape {tuple(of_key)}; it takes (B, Hkv, Sk, D) with query's B = {b} and D = {d}")
    if value.shape != of_key:
        raise ValueError(f"value has shape {tuple(value.shape)}; it takes key's shape, {tuple(of_key)}")
    if h % hkv if hkv else h:
        raise ValueError(f"key has {hkv} heads; it takes a number that divides query's {h}")
    if d > MAX_HEAD_SIZE:
        raise ValueError(f"query has head size {d}; it takes at most {MAX_HEAD_SIZE}")
    table, bidirectional, max_distance = None, True, 128
    if relative_bias is not None:
        table, bidirectional, max_distance = _bind_relative_bias(relative_bias, query, key)
    if cu_seqlens is not None:
        for name, given in (("padding_mask", padding_mask), ("attn_bias", attn_bias)):
            if given is not None:
                raise ValueError(f"{name} is given beside cu_seqlens; packed sequences take None")
        cu_seqlens, max_seqlen = _bind_sequences(cu_seqlens, max_seqlen, query, key)
    elif max_seqlen is not None:
        raise ValueError(f"max_seqlen is {max_seqlen} without cu_seqlens; it takes None then")
    dropout_p = as_float(dropout_p, "dropout_p")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p is {dropout_p}; it takes 0 <= dropout_p < 1")
    if padding_mask is not None:
        check_dense(padding_mask, "padding_mask")
        check_shape(padding_mask, "padding_mask", (b, sk), "(B, Sk)")
        if padding_mask.device != query.device:
            raise ValueError(f"padding_mask is on {padding_mask.device}; it takes query's device, {query.device}")
        padding_mask = (padding_mask if padding_mask.dtype == torch.bool else padding_mask != 0).contiguous()
    if attn_bias is not None:
        if isinstance(attn_bias, torch.Tensor) and attn_bias.dtype == torch.bool:
            raise TypeError(
                f"attn_bias is bool; it is added to the scores and takes {name_of(query.dtype)} (-inf hides)"
            )
        check_like(attn_bias, "attn_bias", query, "query")
        try:
            attn_bias = attn_bias if attn_bias.shape == (b, h, sq, sk) else attn_bias.expand(b, h, sq, sk)
        except RuntimeError:
            shape = tuple(attn_bias.shape)
            raise ValueError(f"attn_bias has shape {shape}; it takes one that broadcasts to {(b, h, sq, sk)}") from None
    seed = None
    if dropout_p > 0.0:
        seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=query.device)
    save = torch.is_grad_enabled() and (
        query.requires_grad
        or key.requires_grad
        or value.requires_grad
        or (attn_bias is not None and attn_bias.requires_grad)
        or (table is not None and table.requires_grad)
    )
    scale = 1.0 / math.sqrt(max(d, 1)) if scale is None else as_float(scale, "scale")
    if d != 1:
        query = query if query.stride()[3] == 1 else query.contiguous()
        key = key if key.stride()[3] == 1 else key.contiguous()
        value = value if value.stride()[3] == 1 else value.contiguous()
    return AttentionForward(
        *(query, key, value, bool(is_causal), padding_mask, attn_bias, scale, dropout_p, seed, save),
        *(table, bidirectional, max_distance, cu_seqlens, max_seqlen or 0),
    )


def _bind_sequences(cu_seqlens, max_seqlen, query, key):
    """cu_seqlens as contiguous int32, and the longest length."""
    name = "cu_seqlens"
    if not isinstance(cu_seqlens, torch.Tensor):
        raise TypeError(f"{name} is {its_kind(cu_seqlens)}; it takes a torch.Tensor")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} is {name_of(cu_seqlens.dtype)}; it takes int32 or int64")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"{name} has shape {tuple(cu_seqlens.shape)}; it takes (N + 1,)")
    if cu_seqlens.device != query.device:
        raise ValueError(f"{name} is on {cu_seqlens.device}; it takes query's device, {query.device}")
    total = query.shape[2]
    if query.shape[0] != 1 or key.shape[2] != total:
        raise ValueError(
            f"query and key have shapes {tuple(query.shape)} and {tuple(key.shape)}; with cu_seqlens they take "
            "(1, H, T, D) and (1, Hkv, T, D)"
        )
    if max_seqlen is not None and (isinstance(max_seqlen, bool) or not isinstance(max_seqlen, (int, torch.SymInt))):
        raise TypeError(f"max_seqlen is {max_seqlen!r}; it takes an int")
    if may_look(cu_seqlens):
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != total or any(a > b for a, b in pairwise(ends)):
            raise ValueError(f"{name} is {_shown(ends)}; it takes 0 first, {total} last (query's T), and never falls")
        longest = max((b - a for a, b in pairwise(ends)), default=0)
        if max_seqlen is not None and max_seqlen < longest:
            raise ValueError(f"max_seqlen is {max_seqlen}; it takes at least the longest sequence, {longest}")
        max_seqlen = longest if max_seqlen is None else max_seqlen
    elif max_seqlen is None:
        traced = tracing() or type(cu_seqlens) is not torch.Tensor
        max_seqlen = total if traced or not total else int(cu_seqlens.diff().max())
    return cu_seqlens.to(torch.int32).contiguous(), min(max_seqlen, total)


def _shown(numbers):
    return str(numbers) if len(numbers) <= 8 else f"[{', '.join(map(str, numbers[:4]))}, ..., {numbers[-1]}]"


def _check_distances(table, query, key):
    """Checks what is special about the table of a DistanceBias."""
    if not isinstance(table, torch.Tensor):
        raise TypeError(f"relative_bias.table is {its_kind(table)}; it takes a torch.Tensor")
    if table.dim() != 2 or table.shape[1] % 2 == 0:
        raise ValueError(f"relative_bias.table has shape {tuple(table.shape)}; it takes (H, 2 L - 1)")
    longest = 0
    for t in (query, key):  # bind() checks the two
        if isinstance(t, torch.Tensor) and t.dim() == 4 and t.shape[2] > longest:
            longest = t.shape[2]
    if table.shape[1] < 2 * longest - 1:
        raise ValueError(
            f"relative_bias.table has {table.shape[1]} distances; it takes 2 L - 1 of them, and L at least {longest}, the "
            "longer of queries and keys"
        )


def _bind_relative_bias(relative_bias, query, key):
    """(table, bidirectional, max_distance)."""
    each = isinstance(relative_bias, DistanceBias)
    if each:
        _check_distances(relative_bias.table, query, key)
        relative_bias = by_distance(relative_bias)
    if not isinstance(relative_bias, RelativeBias):
        takes = "a pyfused.RelativeBias or DistanceBias"
        raise TypeError(f"relative_bias is {its_kind(relative_bias)}; it takes {takes}")
    table, bidirectional, max_distance = relative_bias
    name = "relative_bias.table"
    check_dense(table, name)
    if table.dtype != query.dtype and table.dtype != torch.float32:
        takes = " or ".join(dict.fromkeys((name_of(query.dtype), "float32")))
        raise TypeError(f"{name} is {name_of(table.dtype)}; it takes query's dtype or float32: {takes}")
    if table.device != query.device:
        raise ValueError(f"{name} is on {table.device}; it takes query's device, {query.device}")
    if not each:
        check_buckets(table, bidirectional, max_distance, "relative_bias.")
    if table.shape[1] != query.shape[1]:
        raise ValueError(f"{name} has {table.shape[1]} heads; it takes query's {query.shape[1]}")
    return table, bidirectional, max_distance


_BIAS, _TABLE = map(AttentionForward._fields.index, ("attn_bias", "bias_table"))


def _like(query):
    """A new (B, H, S, D) tensor stored as (B, S, H, D)."""
    b, h, s, d = query.shape
    return torch.empty((b, s, h, d), dtype=query.dtype, device=query.device).transpose(1, 2)


@taking(AttentionForward)
def _fake(a):
    shape, device = a.query.shape[:3], a.query.device
    return _like(a.query), torch.empty(shape, dtype=torch.float32, device=device) if a.save else a.query.new_empty(0)


def _setup_context(ctx, inputs, output):
    a = AttentionForward(*inputs)
    optional = a.padding_mask, a.attn_bias, a.seed, a.bias_table, a.cu_seqlens
    ctx.has = [t is not None for t in optional]
    ctx.options = a.is_causal, a.scale, a.dropout_p, a.bidirectional, a.max_distance, a.max_seqlen
    ctx.save_for_backward(a.query, a.key, a.value, *output, *[t for t in optional if t is not None])


def _backward(ctx, grad_out, *_unused):
    found: list[Any] = [None] * len(AttentionForward._fields)
    if grad_out is None:
        return tuple(found)
    query, key, value, out, lse, *rest = ctx.saved_tensors
    mask, bias, seed, table, cu_seqlens = [rest.pop(0) if has else None for has in ctx.has]
    is_causal, scale, dropout_p, bidirectional, max_distance, max_seqlen = ctx.options
    wants_bias = bias is not None and ctx.needs_input_grad[_BIAS]
    wants_table = table is not None and ctx.needs_input_grad[_TABLE]
    grad_out = grad_out if grad_out.stride(3) == 1 or query.shape[3] == 1 else grad_out.contiguous()
    call = AttentionBackward(
        *(grad_out, query, key, value, out, lse, is_causal, mask, bias, scale, dropout_p, seed, wants_bias),
        *(table, bidirectional, max_distance, wants_table, cu_seqlens, max_seqlen),
    )
    grads = _ATTENTION_BACKWARD(*call)
    found[:3] = grads[:3]
    found[_BIAS], found[_TABLE] = grads[3] if wants_bias else None, grads[4] if wants_table else None
    return tuple(found)


@taking(AttentionBackward)
def _backward_fake(a):
    def dense(tensor, wanted):
        return tensor.new_empty(tensor.shape) if wanted else a.query.new_empty(0)

    of_bias, of_table = dense(a.attn_bias, a.wants_bias), dense(a.bias_table, a.wants_table)
    return _like(a.query), _like(a.key), _like(a.value), of_bias, of_table


def _pairs(a):
    """The number of (query, visible key) pairs of one head, over the whole batch. A causal mask hides half."""
    if a.cu_seqlens is not None:
        lengths = a.cu_seqlens.diff().tolist()
        return sum(n * (n + 1) // 2 if a.is_causal else n * n for n in lengths)
    (batch, _, sq, _), sk = a.query.shape, a.key.shape[2]
    real = batch * sk if a.padding_mask is None else int(a.padding_mask.count_nonzero())
    if not a.is_causal or not sk:
        return sq * real
    seen = sum(max(0, i + 1 + sk - sq) for i in range(sq)) if sq > sk else sq * sk - sq * (sq - 1) // 2
    return seen * real // sk


@taking(AttentionForward)
def _cost(a):
    """Two products of D for each pair. A relative bias is read as its table."""
    moved = size(a.query, a.key, a.value, a.padding_mask, a.attn_bias, a.bias_table) + size(a.query)
    return Cost(moved, 4 * _pairs(a) * a.query.shape[1] * a.query.shape[3])


@taking(AttentionBackward)
def _backward_cost(a):
    """Five products of D for each pair: the scores again, and two gradients for each of the forward's two products."""
    inputs = a.query, a.key, a.value
    moved = size(a.grad_out, *inputs, a.out, a.lse, a.padding_mask, a.attn_bias, a.bias_table) + size(*inputs)
    moved += size(a.attn_bias) * a.wants_bias + size(a.bias_table) * a.wants_table
    return Cost(moved, 10 * _pairs(a) * a.query.shape[1] * a.query.shape[3])


_ATTENTION = Operator(
    "attention",
    f"{schema(AttentionForward)} -> (Tensor out, Tensor lse)",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    cost=_cost,
)
_ATTENTION_BACKWARD = Operator(
    "attention_backward",
    f"{schema(AttentionBackward)}"
    " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_bias, Tensor grad_table)",
    fake=_backward_fake,
    cost=_backward_cost,
)
