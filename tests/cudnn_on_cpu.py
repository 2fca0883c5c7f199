"""What would torch's cuDNN attention do with a call? A stand-in for CPU tensors refuses what cuDNN cannot take, and computes.

torch checks the arguments against the operators' own schemas. The backward gets its probabilities from the log-sum-exps, as
cuDNN does. Like torch, the stand-in keeps a graph by the strides of query, key and value alone.
"""

import contextlib

import torch

from pyfused import dispatch, extensions

FORWARD, BACKWARD = "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_cudnn_attention_backward"
calls: list[str] = []  # the operators' names, in the order of the calls
_graphs: dict[tuple, tuple] = {}  # strides of (out, grad_out), by the key of torch's MHACacheKeyWrapper
_library = None


def install(library=None):
    """Emulates cuDNN in this process, or as long as the given torch.library.Library of "aten" lives. Call it before any
    operator runs."""
    global _library
    _library = library or torch.library.Library("aten", "IMPL")
    _library.impl(FORWARD, forward, "CPU")
    _library.impl(BACKWARD, backward, "CPU")
    torch.backends.cuda.can_use_cudnn_attention = lambda params, debug=False: True
    extensions.emulate_cudnn()


@contextlib.contextmanager
def installed():
    """install(), inside the block."""
    before = torch.backends.cuda.can_use_cudnn_attention

    def forget():
        dispatch.missing.cache_clear()
        dispatch.forget()

    with torch.library._scoped_library("aten", "IMPL") as library:
        install(library)
        forget()
        calls.clear()
        try:
            yield
        finally:
            torch.backends.cuda.can_use_cudnn_attention = before
            extensions._emulated_cudnn = False
            forget()


def _check(query, key, value, attn_bias, dropout_p):
    (b, h, sq, d), (hkv, sk) = query.shape, key.shape[1:3]
    assert value.shape == key.shape == (b, hkv, sk, d)
    assert h % hkv == d % 8 == 0
    assert min(sq, sk) > 1
    assert (attn_bias, dropout_p) == (None, 0.0)
    for t in (query, key, value):
        assert t.dtype == query.dtype in (torch.float16, torch.bfloat16)
        assert (t.stride(3), t.data_ptr() % 16) == (1, 0)
        assert all(stride % 8 == 0 for stride in t.stride()[:3])


def _strides(tensor):
    """Those that lead to another element."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride()) if size > 1]


def _compiled(query, key, value, is_causal, *others):
    """A graph is compiled for the strides of its first call; calls with the same key must have the same."""
    given = (query.dtype, is_causal, len(others), *((t.shape, t.stride()) for t in (query, key, value)))
    strides = tuple(map(_strides, others))
    assert _graphs.setdefault(given, strides) == strides


def _probabilities(query, key, is_causal, scale, lse=None):
    """(probabilities, log-sum-exps (B, H, Sq, 1)); the causal mask is aligned at the top left."""
    s = query.float() @ key.float().repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(-1, -2) * scale
    if is_causal:
        s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    lse = s.logsumexp(-1, keepdim=True) if lse is None else lse
    return (s - lse).exp(), lse


def forward(
    query,
    key,
    value,
    attn_bias,
    compute_log_sumexp,
    dropout_p=0.0,
    is_causal=False,
    return_debug_mask=False,
    *,
    scale=None,
):
    calls.append(FORWARD)
    _check(query, key, value, attn_bias, dropout_p)
    assert not return_debug_mask
    p, lse = _probabilities(query, key, is_causal, scale)
    out = torch.empty_like(query)
    _compiled(query, key, value, is_causal, out)
    out.copy_(p @ value.float().repeat_interleave(query.shape[1] // key.shape[1], 1))
    seed = torch.zeros((), dtype=torch.int64)
    lse = lse if compute_log_sumexp else lse.new_empty(0)
    return out, lse, None, None, query.shape[2], key.shape[2], seed, seed, None


def backward(
    grad_out, query, key, value, out, logsumexp, philox_seed, philox_offset, attn_bias,
    cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, *, scale=None,
):  # fmt: skip
    calls.append(BACKWARD)
    _check(query, key, value, attn_bias, dropout_p)
    (b, h, sq, _), (hkv, sk) = query.shape, key.shape[1:3]
    assert (max_q, max_k, cum_seq_q, cum_seq_k) == (sq, sk, None, None)
    assert philox_seed.dtype == philox_offset.dtype == torch.int64  # on sm_100 torch converts both
    assert (logsumexp.shape, logsumexp.dtype) == ((b, h, sq, 1), torch.float32)
    assert logsumexp.is_contiguous()
    assert _strides(grad_out) == _strides(out) == _strides(torch.empty_like(query))
    assert grad_out.data_ptr() % 16 == out.data_ptr() % 16 == 0
    _compiled(query, key, value, is_causal, out, grad_out)
    p, _ = _probabilities(query, key, is_causal, scale, logsumexp)
    wide_key, wide_value = (t.float().repeat_interleave(h // hkv, 1) for t in (key, value))
    grad_s = p * (
        grad_out.float() @ wide_value.transpose(-1, -2) - (grad_out.float() * out.float()).sum(-1, keepdim=True)
    )
    found = (
        grad_s @ wide_key * scale,
        grad_s.transpose(-1, -2) @ query.float() * scale,
        p.transpose(-1, -2) @ grad_out.float(),
    )
    grads = [torch.empty_like(t) for t in (query, key, value)]
    for grad, wide in zip(grads, found, strict=True):
        grad.copy_(wide.unflatten(1, (grad.shape[1], -1)).sum(2))
    return tuple(grads)
