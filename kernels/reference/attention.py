"""attention in plain PyTorch: the definition of truth. It materialises the scores; every other backend must not.

The backward is written out, because autograd records nothing inside a registered operator (torch.compile, opcheck). gradcheck
compares it with the forward. Packed sequences are padded here.
"""

import torch

from pyfused.arguments import AttentionBackward, AttentionForward, taking

from . import relative_bias
from ._philox import keep_mask


def group_of(query, key):
    """How many query heads share a key head. Without heads any number will do."""
    return query.shape[1] // max(key.shape[1], 1)


def hidden_pairs(is_causal, padding_mask, sq, sk, device):
    """True where causality or padding hides a key from a query, broadcastable to (B, H, Sq, Sk). None hides nothing."""
    hidden = None
    if is_causal:
        i = torch.arange(sq, device=device)[:, None]
        j = torch.arange(sk, device=device)[None]
        hidden = (j > i + sk - sq)[None, None]
    if padding_mask is not None:
        padded = ~padding_mask[:, None, None, :]
        hidden = padded if hidden is None else hidden | padded
    return hidden


def zeroed(tensor, rows):
    """(B, H, S, D) with zeros in these rows. Rows that must not count may hold NaN, and 0 * NaN would reach a sum."""
    return tensor if rows is None else tensor.masked_fill(rows, 0.0)


def unread(query, key, is_causal, padding_mask):
    """(blind, padding), rows for zeroed(): blind queries see no key, padding keys are not real."""
    sq, sk = query.shape[2], key.shape[2]
    blind = padding = None
    if padding_mask is not None:
        padding = ~padding_mask[:, None, :, None]
    if padding_mask is not None or (is_causal and sq > sk):
        blind = hidden_pairs(is_causal, padding_mask, sq, sk, query.device).all(-1, keepdim=True)
    return blind, padding


def relative(call):
    """T5's bias as scores() takes it."""
    return call.bias_table, call.bidirectional, call.max_distance


def scores(
    query, key, is_causal, padding_mask, attn_bias, scale, bias_table=None, bidirectional=True, max_distance=128
):
    """(B, H, Sq, Sk) scores, -inf where a query may not look; float32 at least."""
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    group = group_of(query, key)
    s = query.to(wide) @ key.to(wide).repeat_interleave(group, 1).transpose(-1, -2) * scale
    if attn_bias is not None:
        s = s + attn_bias.to(wide)
    sq, sk = s.shape[-2:]
    if bias_table is not None:
        s = s + relative_bias.forward(bias_table.to(wide), sq, sk, bidirectional, max_distance, sk - sq)[0]
    hidden = hidden_pairs(is_causal, padding_mask, sq, sk, s.device)
    return s if hidden is None else s.masked_fill(hidden, -torch.inf)


def probabilities(s):
    """Softmax over the keys; a row with no visible key is zeros, with zero gradient."""
    dead = (s == -torch.inf).all(-1, keepdim=True)
    return torch.softmax(s.masked_fill(dead, 0.0), -1).masked_fill(dead, 0.0)


def real_rows(cu_seqlens, max_seqlen):
    """(N, max_seqlen): True where the padded batch has a row of a packed sequence."""
    return torch.arange(max_seqlen, device=cu_seqlens.device) < cu_seqlens.diff()[:, None]


def padded(packed, real):
    """(1, H, T, D) -> (N, H, S, D) with zeros behind each sequence."""
    rows = packed.new_zeros((*real.shape, packed.shape[1], packed.shape[3]))
    rows[real] = packed[0].transpose(0, 1)
    return rows.transpose(1, 2)


def repacked(rows, real):
    """(N, H, S, D) -> (1, H, T, D), stored as (1, T, H, D)."""
    return rows.transpose(1, 2)[real].transpose(0, 1)[None]


@taking(AttentionForward)
def forward(a):
    """(out, lse); lse (B, H, Sq) is the log-sum-exp of a row's scores, +inf for a row with no visible key."""
    query, key, value = a.query, a.key, a.value
    if a.cu_seqlens is not None:
        real = real_rows(a.cu_seqlens, a.max_seqlen)
        query, key, value = (padded(t, real) for t in (query, key, value))
        out, lse = forward(*a._replace(query=query, key=key, value=value, padding_mask=real, cu_seqlens=None))
        return repacked(out, real), None if lse is None else repacked(lse[..., None], real)[..., 0].contiguous()
    blind, padding = unread(query, key, a.is_causal, a.padding_mask)
    query, key, value = zeroed(query, blind), zeroed(key, padding), zeroed(value, padding)
    s = scores(query, key, a.is_causal, a.padding_mask, a.attn_bias, a.scale, *relative(a))
    p = probabilities(s)
    if a.dropout_p > 0.0:
        p = p * keep_mask(a.seed, a.dropout_p, p.shape) / (1.0 - a.dropout_p)
    group = group_of(query, key)
    out = zeroed(p @ value.to(p.dtype).repeat_interleave(group, 1), blind)
    out = out.to(query.dtype).transpose(1, 2).contiguous().transpose(1, 2)
    if not a.save:
        return out, None
    lse = torch.logsumexp(s, -1)
    return out, lse.masked_fill(lse == -torch.inf, torch.inf).float()


@taking(AttentionBackward)
def backward(a):
    """(grad_query, grad_key, grad_value, grad_bias, grad_table)."""
    grad_out, query, key, value = a.grad_out, a.query, a.key, a.value
    if a.cu_seqlens is not None:
        real = real_rows(a.cu_seqlens, a.max_seqlen)
        rows = {name: padded(getattr(a, name), real) for name in ("grad_out", "query", "key", "value", "out")}
        *grads, _, grad_table = backward(*a._replace(**rows, padding_mask=real, cu_seqlens=None))
        return *(repacked(t, real) for t in grads), None, grad_table
    blind, padding = unread(query, key, a.is_causal, a.padding_mask)
    query, key, value = zeroed(query, blind), zeroed(key, padding), zeroed(value, padding)
    p = probabilities(scores(query, key, a.is_causal, a.padding_mask, a.attn_bias, a.scale, *relative(a)))
    keep = torch.ones_like(p)
    if a.dropout_p > 0.0:
        keep = keep * keep_mask(a.seed, a.dropout_p, p.shape) / (1.0 - a.dropout_p)
    group = group_of(query, key)
    wide_key, wide_value = (t.to(p.dtype).repeat_interleave(group, 1) for t in (key, value))
    grad_out = zeroed(grad_out, blind).to(p.dtype)
    grad_p = grad_out @ wide_value.transpose(-1, -2) * keep
    grad_s = p * (grad_p - (p * grad_p).sum(-1, keepdim=True))
    grad_query = grad_s @ wide_key * a.scale
    grad_key = grad_s.transpose(-1, -2) @ query.to(p.dtype) * a.scale
    grad_value = (p * keep).transpose(-1, -2) @ grad_out
    b, hkv, sk, d = key.shape
    grad_key, grad_value = (t.reshape(b, hkv, group, sk, d).sum(2) for t in (grad_key, grad_value))
    grads = (t.to(query.dtype).transpose(1, 2).contiguous().transpose(1, 2) for t in (grad_query, grad_key, grad_value))
    grad_table = None
    if a.wants_table:
        sq, sk = grad_s.shape[2:]
        options = a.bias_table.shape[0], a.bidirectional, a.max_distance, sk - sq
        grad_table = relative_bias.grad_table(grad_s, *options).to(a.bias_table.dtype)
    return *grads, grad_s.to(query.dtype) if a.wants_bias else None, grad_table
