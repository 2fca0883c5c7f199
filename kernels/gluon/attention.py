"""attention for Hopper, by hand: launches _attention_forward.py; _attention_backward.py launches the gradient's kernels.

On an H100 both were right, and faster than Triton's, and than cuDNN's but for short sequences. Evidence chooses them.
"""

import functools

import torch
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from pyfused import extensions
from pyfused.arguments import AttentionBackward, AttentionForward, taking
from pyfused.kernels.cuda._launch import multiprocessors
from pyfused.kernels.shared.attention_layout import by_rows, span
from pyfused.kernels.shared.prepared import maker, prepares_launch
from pyfused.kernels.triton._launch import settle_cache_key
from pyfused.kernels.triton.attention import in_units, least_scale, spread
from pyfused.kernels.triton.attention import unsupported_backward as unsupported_by_triton

from ._attention_backward import OWN, gradients
from ._attention_forward import ROWS, forward_kernel

_ROWS = ROWS.value
_BLOCK_N = 128
# By head size: warpgroups that attend, registers of a thread of theirs, stages. They fill the registers of a multiprocessor,
# and at 128 its shared memory.
_BY_HEAD_SIZE = {64: (3, 160, 3), 128: (2, 240, 2)}
# Scores. At the rates that an H100 showed for more they take it 76 us forward and 215 backward. To describe and start the
# kernels took a host 68 and 230 us, counted without a GPU.
_WORTH_STARTING = 1 << 27
_TOGETHER = 36 << 20  # bytes of keys and values, of the L2's 50 MB


@taking(AttentionForward)
def unsupported_forward(a):
    return _unsupported(a)


def _unsupported(a):
    (_, _, sq, d), sk = a.query.shape, a.key.shape[2]
    biased = a.bias_table is not None
    sizes = tuple(_BY_HEAD_SIZE)
    reasons = {
        "a GPU that is not Hopper": a.query.is_cuda and not extensions.is_hopper(a.query.device.index),
        "padding": a.padding_mask is not None,
        "a dense bias": a.attn_bias is not None,
        "packed sequences": a.cu_seqlens is not None,
        "dropout": a.seed is not None,
        "float32": a.query.dtype == torch.float32,
        f"a head size other than {sizes}": d not in sizes,
        "a bias by distance at a head size of 128: it would spill registers": biased and d == 128,
        "a scale that is not positive, or too small to divide a bias by": not a.scale > (least_scale if biased else 0),
        "2^30 queries or keys": max(sq, sk) >= 2**30,
        "tensors that are not aligned to 16 bytes, or are expanded": not all(map(_aligned, (a.query, a.key, a.value))),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


@taking(AttentionForward)
def declined_forward(a):
    return _declined(a, a.query.shape[1], a.query.shape[2], options_for(a.query.shape[3])["CONSUMERS"] * _ROWS)


@taking(AttentionBackward)
def declined_backward(a):
    return _declined(a, a.key.shape[1], a.key.shape[2], OWN)


def _declined(a, heads, length, rows):
    """Evidence has one shape for each number of scores, and the device's time alone."""
    (b, h, sq, _), sk = a.query.shape, a.key.shape[2]
    if b * h * sq * sk < _WORTH_STARTING:
        return "so few scores that to start it takes the host longer than another backend takes the device"
    if b * heads * -(-length // rows) < multiprocessors(a.query.device):
        return "fewer blocks than the device has multiprocessors"
    return None


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


def options_for(head_size):
    return dict(zip(("CONSUMERS", "REGISTERS", "STAGES"), _BY_HEAD_SIZE[head_size]))


def start(kernel, grid, *args, **options):
    settle_cache_key(kernel)
    kernel[grid](*args, **options)


@functools.lru_cache(maxsize=1024)
def _together(rows, blocks, queries, key_length, bytes_of_head, programs):
    """How many heads' blocks come together under a causal mask (_attention_schedule.py): with which number the busiest program
    has least to do. The keys and values of so many heads stay in the L2."""
    number = torch.arange(rows * blocks, device="cpu")
    k, place = number // programs, number % programs
    program = torch.where(k % 2 == 0, place, programs - 1 - place)
    steps = ((key_length - queries * torch.arange(blocks, device="cpu")) / _BLOCK_N).ceil().clamp(min=1)
    loads = 1 + steps.clamp(max=-(-key_length // _BLOCK_N))  # to begin and to end a block takes as long as a tile

    def busiest(together):
        return torch.bincount(program, loads[number % (blocks * together) // together]).max().item()

    most = max(_TOGETHER // bytes_of_head, 1)
    return min((n for n in range(1, rows + 1) if rows % n == 0 and n <= most), key=busiest)


@prepares_launch
@taking(AttentionForward)
def forward(a):
    (b, h, sq, d), (hkv, sk), dtype, device = a.query.shape, a.key.shape[1:3], a.query.dtype, a.query.device
    options = options_for(d)
    shape, strides = by_rows(a.query)
    new_out, new_lse = maker(shape, dtype, strides, device), maker((b, h, sq), torch.float32, None, device)
    center, by_distance = spread(a, {"BLOCK_M": _ROWS, "BLOCK_N": _BLOCK_N})
    queries, programs = options["CONSUMERS"] * _ROWS, multiprocessors(device)
    of_head = -(-sq // queries)
    blocks = late = b * h * of_head
    together = 1
    if a.is_causal:
        together = _together(b * h, of_head, queries, sk, 4 * sk * d, programs)
    elif sq % queries and of_head > 1:
        of_head -= 1
        late = b * h * of_head
    numbers = in_units(a.scale, dtype), span(a), center, *strides[:3], blocks, late, of_head, together, h, h // hkv, sq, sk
    options |= {"D": d, "BLOCK_N": _BLOCK_N, "IS_CAUSAL": a.is_causal, "num_warps": 4}

    @taking(AttentionForward)
    def launch(a):
        out, lse = new_out(), new_lse() if a.save else None
        tiles = _descriptor(a.query, _ROWS), *(_descriptor(tensor, _BLOCK_N) for tensor in (a.key, a.value))
        bias = None if by_distance is None else by_distance(a.bias_table)
        start(forward_kernel, (min(blocks, programs),), *tiles, out, lse, bias, *numbers, **options)
        return out, lse

    return launch


@taking(AttentionBackward)
def unsupported_backward(a):
    sq, sk, d = a.query.shape[2], a.key.shape[2], a.query.shape[3]
    reasons = {
        "a head size other than 64": d != 64,
        "more queries than keys under a causal mask: rows without a key may hold anything": a.is_causal and sq > sk,
        "one key": sk == 1,
    }
    found = next((reason for reason, holds in reasons.items() if holds), None)
    return found or _unsupported(a) or unsupported_by_triton(*a)


@prepares_launch
@taking(AttentionBackward)
def backward(a):
    @taking(AttentionBackward)
    def launch(a):
        whole = {name: _copied(getattr(a, name)) for name in ("grad_out", "out")}
        return gradients(a._replace(**whole), start, _descriptor)

    return launch


def _copied(tensor):
    return tensor if _aligned(tensor) else tensor.clone(memory_format=torch.contiguous_format)
