"""attention's forward for Hopper, by hand: launches _attention_forward.py. An H200 found it right, and not faster than
Triton's.

So it is no candidate for a call, whatever evidence says; `with pyfused.backend("gluon")` or PYFUSED_BACKEND=gluon runs it.
The gradient is in _attention_backward.py.
"""

import torch
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from pyfused.arguments import AttentionBackward, AttentionForward, taking
from pyfused.kernels.shared.attention_layout import by_rows, span
from pyfused.kernels.shared.prepared import maker
from pyfused.kernels.triton._launch import settle_cache_key
from pyfused.kernels.triton.attention import in_units, least_scale, spread
from pyfused.kernels.triton.attention import unsupported_backward as unsupported_by_triton

from ._attention_backward import gradients
from ._attention_forward import ROWS, forward_kernel

_ROWS = ROWS.value
_BLOCK_N, _STAGES = 128, 2  # they fill the registers of two warpgroups, and at D = 128 the shared memory
_HEAD_SIZES = (64, 128)
TURNS = True  # benchmarks/gpu_peers.py times both


NOT_CHOSEN = " (not faster than Triton's)"


def remark_forward(*args):
    return NOT_CHOSEN.strip(" ()")


@taking(AttentionForward)
def unsupported_forward(a):
    return _unsupported(a)


def _unsupported(a):
    (_, _, sq, d), sk = a.query.shape, a.key.shape[2]
    biased = a.bias_table is not None
    reasons = {
        "padding": a.padding_mask is not None,
        "a dense bias": a.attn_bias is not None,
        "packed sequences": a.cu_seqlens is not None,
        "dropout": a.seed is not None,
        "float32": a.query.dtype == torch.float32,
        f"a head size other than {_HEAD_SIZES}": d not in _HEAD_SIZES,
        "a bias by distance at a head size of 128: it would spill registers": biased and d == _HEAD_SIZES[1],
        "a scale that is not positive, or too small to divide a bias by": not a.scale > (least_scale if biased else 0),
        "2^30 queries or keys": max(sq, sk) >= 2**30,
        "tensors that are not aligned to 16 bytes, or are expanded": not all(map(_aligned, (a.query, a.key, a.value))),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _aligned(tensor):
    """Whether a copy engine takes this tensor."""
    rows = zip(tensor.shape[:3], tensor.stride())
    whole = all(stride > 0 and stride % 8 == 0 for size, stride in rows if size > 1)
    return whole and tensor.stride(3) == 1 and tensor.data_ptr() % 16 == 0


def _descriptor(tensor, rows):
    """Tiles of `rows` rows of one head. A dimension of size 1 may have any stride; a descriptor wants multiples of 16 bytes."""
    strides = [stride if size > 1 else 8 for size, stride in zip(tensor.shape[:3], tensor.stride())]
    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return TensorDescriptor(tensor, list(tensor.shape), [*strides, 1], [1, 1, rows, tensor.shape[3]], layout)


def start(kernel, grid, *args, **options):
    settle_cache_key(kernel)
    kernel[grid](*args, **options)


@taking(AttentionForward)
def forward(a):
    (b, h, sq, d), (hkv, sk), dtype, device = a.query.shape, a.key.shape[1:3], a.query.dtype, a.query.device
    shape, strides = by_rows(a.query)
    out = maker(shape, dtype, strides, device)()
    lse = maker((b, h, sq), torch.float32, None, device)() if a.save else None
    center, by_distance = spread(a, {"BLOCK_M": _ROWS, "BLOCK_N": _BLOCK_N})
    start(
        forward_kernel,
        (b * h * -(-sq // (2 * _ROWS)),),
        _descriptor(a.query, _ROWS),
        *(_descriptor(tensor, _BLOCK_N) for tensor in (a.key, a.value)),
        out,
        lse,
        None if by_distance is None else by_distance(a.bias_table),
        in_units(a.scale, dtype),
        span(a),
        center,
        *strides[:3],
        h,
        sq,
        sk,
        D=d,
        BLOCK_N=_BLOCK_N,
        STAGES=_STAGES,
        GROUP=h // hkv,
        IS_CAUSAL=a.is_causal,
        TURNS=TURNS,
        num_warps=4,
    )
    return out, lse


@taking(AttentionBackward)
def unsupported_backward(a):
    sq, sk, d = a.query.shape[2], a.key.shape[2], a.query.shape[3]
    reasons = {
        "a head size other than 64": d != _HEAD_SIZES[0],
        "more queries than keys under a causal mask: rows without a key may hold anything": a.is_causal and sq > sk,
        "one key": sk == 1,
    }
    found = next((reason for reason, holds in reasons.items() if holds), None)
    return found or _unsupported(a) or unsupported_by_triton(*a)


@taking(AttentionBackward)
def backward(a):
    whole = {name: _copied(getattr(a, name)) for name in ("grad_out", "out")}
    return gradients(a._replace(**whole), start, _descriptor)


def _copied(tensor):
    return tensor if _aligned(tensor) else tensor.clone(memory_format=torch.contiguous_format)
