"""decode in plain PyTorch: the layers of a plan, one after the other, for one token per row."""

import torch
import torch.nn.functional as F

from pyfused.activations import ACTIVATIONS
from pyfused.kernels.shared.buckets import distance_buckets
from pyfused.kernels.shared.draw import drawn_token, likeliest_token
from pyfused.weight_format import dequantized, format_of


def forward(like, plan, step):
    b, h, d = step.tokens.shape[0], plan.heads, plan.head_size
    places = step.places
    if places is None:
        places = torch.full((b,), step.place, dtype=torch.int64, device=like.device)
    x = _rows(plan.token_embedding, step.tokens, like.dtype)
    if plan.position_embedding.weight is not None:
        positions = places if step.position_ids is None else step.position_ids
        x = x + _rows(plan.position_embedding, positions, like.dtype)
    if like.dtype == torch.float16:
        x = x.float()  # T5's residual stream does not fit into float16
    keys = torch.arange(step.most, device=like.device)
    seen = keys <= places[:, None]
    if step.mask is not None:
        seen = seen & (step.mask[:, : step.most] != 0)
    bias = _bias(plan, places, keys)
    rows = torch.arange(b, device=like.device)
    for i, layer in enumerate(plan.layers):
        y = _norm(plan, layer.attention_norm, x, like.dtype)
        key, value = step.caches[2 * i], step.caches[2 * i + 1]
        key[rows, :, places] = _product(layer.key, y).view(b, plan.kv_heads, d)
        value[rows, :, places] = _product(layer.value, y).view(b, plan.kv_heads, d)
        query = _product(layer.query, y).view(b, h, 1, d)
        found = _attention(query, key[:, :, : step.most], value[:, :, : step.most], layer.scale, seen, bias)
        x = x + _product(layer.output, found.reshape(b, h * d))
        if layer.cross_query.weight is not None and step.cross:
            y = _norm(plan, layer.cross_norm, x, like.dtype)
            key, value = (t.repeat_interleave(b // t.shape[0], 0) for t in step.cross[2 * i : 2 * i + 2])
            mask = step.cross_mask
            mask = None if mask is None else (mask != 0).repeat_interleave(b // mask.shape[0], 0)
            found = _attention(_product(layer.cross_query, y).view(b, h, 1, d), key, value, layer.cross_scale, mask, None)
            x = x + _product(layer.cross_output, found.reshape(b, h * d))
        y = _norm(plan, layer.feed_forward_norm, x, like.dtype)
        x = x + _feed_forward(plan, layer, y)
    y = _norm(plan, plan.final_norm, x, like.dtype)
    if plan.head.weight is None:
        return y, None
    logits = (_product(plan.head, y) * plan.logits_scale).to(like.dtype)
    if not step.choose:
        return logits, None
    if step.uniform is None:
        return logits, likeliest_token(logits)
    return logits, drawn_token(logits, step.uniform, step.temperature, step.top_k, step.top_p)


def _rows(matrix, ids, dtype):
    rows = matrix.weight[ids]
    return rows if matrix.scale is None else dequantized(rows, matrix.scale[ids], dtype)


def _norm(plan, norm, x, dtype):
    weight, bias = (None if t is None else t.to(x.dtype) for t in (norm.weight, norm.bias))
    n = F.rms_norm(x, x.shape[-1:], weight, norm.eps) if plan.is_rms else F.layer_norm(x, x.shape[-1:], weight, bias, norm.eps)
    return n.to(dtype)


def _product(matrix, x):
    if matrix.scale is None:
        weight = matrix.weight.to(x.dtype)
        return F.linear(x, weight, None if matrix.bias is None else matrix.bias.to(x.dtype))
    wide = torch.promote_types(x.dtype, torch.float32)
    if format_of(matrix.scale).group:
        y = F.linear(x.to(wide), dequantized(matrix.weight, matrix.scale, wide))
    else:
        y = F.linear(x.to(wide), matrix.weight.to(wide)) * matrix.scale
    return (y if matrix.bias is None else y + matrix.bias).to(x.dtype)


def _feed_forward(plan, layer, y):
    activation = ACTIVATIONS[plan.activation].function
    if layer.gate.weight is None:
        return _product(layer.outer, activation(_product(layer.inner, y)))
    gate, inner = _product(layer.gate, y), _product(layer.inner, y)
    if y.dtype == torch.float16:  # neither the factors' product nor the result fits into float16
        gate, inner = gate.float(), inner.float()
    return _product(layer.outer, activation(gate) * inner)


def _attention(query, key, value, scale, mask, bias):
    """query (B, H, 1, d), key and value (B, Hkv, Sk, d), mask (B, Sk), bias (B, H, 1, Sk). A row that sees no key gives
    zeros."""
    wide = torch.promote_types(query.dtype, torch.float32)
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1).to(wide) for t in (key, value))
    scores = query.to(wide) @ key.transpose(2, 3) * scale
    scores = scores if bias is None else scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
        value = value.masked_fill(~mask[:, None, :, None], 0.0)  # hidden places may hold NaN
    return (torch.softmax(scores, -1).nan_to_num(0.0) @ value).to(query.dtype)


def _bias(plan, places, keys):
    """T5's bias (B, H, 1, Sk), or None."""
    if plan.bias_table is None:
        return None
    buckets = distance_buckets(False, plan.bias_table.shape[0], plan.max_distance, places.device)
    span = buckets.shape[0] // 2
    bucket = buckets[(keys - places[:, None]).clamp(-span, span) + span].long()
    table = plan.bias_table
    return table.to(torch.promote_types(table.dtype, torch.float32))[bucket].permute(0, 2, 1)[:, :, None]
