"""attention by cuDNN: the two operators that scaled_dot_product_attention runs with SDPBackend.CUDNN_ATTENTION.

Refused is what cuDNN lacks, and what torch 2.10 to 2.13 gets wrong with it. The numbers below are of issues of pytorch, or of
cudnn-frontend where that is said. Whether this GPU and this cuDNN have the rest, torch says itself. Its answer depends on
settings of the process, so every call of a prepared launch reads settings(), in 0.2 us. The question itself takes 40.

torch compiles a graph for each shape of query, key and value and keeps it. The key it is kept by leaves out the strides of
`out` and `grad_out`, so both have one layout here: (B, S, H, D), for queries whose `out` torch itself would store so.
"""

import os

import torch
from torch.backends.cuda import SDPAParams

from pyfused.arguments import AttentionBackward, AttentionForward, backward_launch, forward_launch, taking
from pyfused.kernels.shared.attention_layout import by_rows
from pyfused.kernels.shared.prepared import maker, prepares_launch

_MOST = 65535  # of batches and of heads
_MOST_WITH_GRADIENT = 128  # of a head's size
SETTINGS_FORBID = "torch says no; torch.backends.cuda.can_use_cudnn_attention(..., debug=True) says why"
_C = torch._C


def settings():
    """What torch's answer depends on besides the call, the GPU and the libraries: whether the user wants cuDNN's attention
    (enable_cudnn_sdp, sdpa_kernel), and only algorithms that give the same bits each time."""
    deterministic, warns_only = _C._get_deterministic_algorithms(), _C._get_deterministic_algorithms_warn_only()
    return _C._get_cudnn_sdp_enabled(), _C._get_cudnn_enabled(), deterministic, warns_only


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
        return SETTINGS_FORBID
    return None


def _aligned(tensor):
    """Whether every row begins at a multiple of 16 bytes, which cuDNN's graphs take for granted."""
    rows = zip(tensor.shape[:3], tensor.stride())
    whole = all(stride > 0 and stride % 8 == 0 for size, stride in rows if size > 1)
    return whole and tensor.stride(3) == 1 and tensor.data_ptr() % 16 == 0


def _avoids_compilation():
    return os.environ.get("TORCH_CUDNN_SDPA_AVOID_RECOMPILE") == "1"


@prepares_launch
@taking(AttentionForward)
def forward(a):
    attend = torch._scaled_dot_product_cudnn_attention  # the same in torch.ops.aten takes 1.4 us more
    copied, (shape, strides) = _is_copied(a.query), by_rows(a.query)
    save, is_causal, scale = a.save, a.is_causal, a.scale

    @forward_launch
    def launch(query, key, value, *_absent):
        query = _by_rows(query) if copied else query
        out, lse, *_ = attend(query, key, value, None, save, 0.0, is_causal, False, scale=scale)
        return _stored(out, strides), lse.reshape(shape[:3]) if save else None

    return launch


@prepares_launch
@taking(AttentionBackward)
def backward(a):
    gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default
    copied, of_query, of_key = _is_copied(a.query), by_rows(a.query)[1], by_rows(a.key)[1]
    numbers = a.query.shape[2], a.key.shape[2], 0.0, a.is_causal
    new_seed, scale = maker((), torch.int64, None, a.query.device), a.scale  # nobody reads a seed without dropout

    @backward_launch
    def launch(grad_out, query, key, value, out, lse, *_absent):
        seed, query = new_seed(), _by_rows(query) if copied else query
        grad_out, out, lse = _stored(grad_out, of_query), _stored(out, of_query), lse.contiguous().unsqueeze(3)
        of_forward = grad_out, query, key, value, out, lse
        grads = gradients(*of_forward, seed, seed, None, None, None, *numbers, scale=scale)
        return _stored(grads[0], of_query), _stored(grads[1], of_key), _stored(grads[2], of_key), None, None

    return launch


def _is_copied(query):
    """Whether torch would not store the `out` of this query as (B, S, H, D). Such a query is copied."""
    return not torch.empty_like(query, device="meta").transpose(1, 2).is_contiguous()


def _stored(tensor, strides):
    """_by_rows(), where `strides` are those that it gives; most tensors have them already."""
    return tensor if tensor.stride() == strides and tensor.data_ptr() % 16 == 0 else _by_rows(tensor)


def _by_rows(tensor):
    """A (B, H, S, D) tensor stored as (B, S, H, D) from an aligned address on."""
    rows = tensor.transpose(1, 2)
    if rows.is_contiguous() and tensor.data_ptr() % 16 == 0:
        return tensor
    return rows.clone(memory_format=torch.contiguous_format).transpose(1, 2)
