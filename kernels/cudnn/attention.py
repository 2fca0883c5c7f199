"""attention by cuDNN: the two operators that scaled_dot_product_attention runs with SDPBackend.CUDNN_ATTENTION.

Refused is what cuDNN lacks, and what torch 2.10 to 2.13 gets wrong with it. The numbers below are of issues of pytorch, or of
cudnn-frontend where that is said. Whether this GPU and this cuDNN have the rest, torch says itself. Its answer may change from
call to call (torch.backends.cuda.enable_cudnn_sdp, deterministic algorithms), so no launch is prepared.

torch compiles a graph for each shape of query, key and value and keeps it. The key it is kept by leaves out the strides of
`out` and `grad_out`, so both have one layout here: (B, S, H, D), for queries whose `out` torch itself would store so.
"""

import os

import torch
from torch.backends.cuda import SDPAParams

from pyfused.arguments import AttentionBackward, AttentionForward, taking

_MOST = 65535  # of batches and of heads
_MOST_WITH_GRADIENT = 128  # of a head's size


@taking(AttentionForward)
def unsupported_forward(a):
    return _unsupported(a)


@taking(AttentionBackward)
def unsupported_backward(a):
    if a.query.shape[3] > _MOST_WITH_GRADIENT:
        return f"gradients for a head size above {_MOST_WITH_GRADIENT}"
    return _unsupported(a)


def _unsupported(a):
    (b, h, sq, d), sk = a.query.shape, a.key.shape[2]
    reasons = {
        "a bias by distance would have to be dense": a.bias_table is not None,
        "a dense bias: gradients were NaN up to cuDNN 9.25 (196678)": a.attn_bias is not None,
        "padding: it would have to be a dense bias, and cuDNN reads the keys behind it": a.padding_mask is not None,
        "packed sequences": a.cu_seqlens is not None,
        "dropout: its mask would not be that of the other backends": a.seed is not None,
        "float32": a.query.dtype == torch.float32,
        "one query: wrong on some GPUs (193893), and NaN in the gradient (cudnn-frontend 1072)": sq == 1,
        "a causal mask for fewer or more queries than keys: its own is aligned at the top left": a.is_causal and sq != sk,
        "one key": sk == 1,
        "a head size that is no multiple of 8": d % 8 != 0,
        f"more than {_MOST} batches or heads": max(b, h) > _MOST,
        "tensors that are not aligned to 16 bytes, or are expanded": not all(map(_aligned, (a.query, a.key, a.value))),
        "TORCH_CUDNN_SDPA_AVOID_RECOMPILE=1 stores the log-sum-exps in another order": _avoids_compilation(),
    }
    for reason, holds in reasons.items():
        if holds:
            return reason
    options = SDPAParams(a.query, a.key, a.value, None, 0.0, a.is_causal, h != a.key.shape[1])
    if not torch.backends.cuda.can_use_cudnn_attention(options):
        return "torch says no; torch.backends.cuda.can_use_cudnn_attention(..., debug=True) says why"
    return None


def _aligned(tensor):
    """Whether every row begins at a multiple of 16 bytes, which cuDNN's graphs take for granted."""
    rows = zip(tensor.shape[:3], tensor.stride())
    whole = all(stride > 0 and stride % 8 == 0 for size, stride in rows if size > 1)
    return whole and tensor.stride(3) == 1 and tensor.data_ptr() % 16 == 0


def _avoids_compilation():
    return os.environ.get("TORCH_CUDNN_SDPA_AVOID_RECOMPILE") == "1"


@taking(AttentionForward)
def forward(a):
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention.default(
        _query(a), a.key, a.value, None, a.save, 0.0, a.is_causal, False, scale=a.scale
    )
    return _by_rows(out), lse.reshape(out.shape[:3]) if a.save else None


@taking(AttentionBackward)
def backward(a):
    sq, sk = a.query.shape[2], a.key.shape[2]
    no_seed = torch.zeros((), dtype=torch.int64, device=a.query.device)
    grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default(
        *(_by_rows(a.grad_out), _query(a), a.key, a.value, _by_rows(a.out), a.lse.contiguous()[..., None]),
        *(no_seed, no_seed, None, None, None, sq, sk, 0.0, a.is_causal),
        scale=a.scale,
    )
    return *map(_by_rows, grads), None, None


def _query(a):
    """The query, copied if torch would not store this query's `out` as (B, S, H, D)."""
    out = torch.empty_like(a.query, device="meta")
    return a.query if out.transpose(1, 2).is_contiguous() else _by_rows(a.query)


def _by_rows(tensor):
    """A (B, H, S, D) tensor stored as (B, S, H, D) from an aligned address on."""
    rows = tensor.transpose(1, 2)
    if rows.is_contiguous() and tensor.data_ptr() % 16 == 0:
        return tensor
    return rows.clone(memory_format=torch.contiguous_format).transpose(1, 2)
