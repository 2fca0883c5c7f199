"""decode on CUDA: launches csrc/cuda/decode.cu, one persistent kernel for a whole step."""

import ctypes
from typing import NamedTuple

import torch

from pyfused.extensions import DTYPE_CODES, cuda
from pyfused.kernels.shared.decode_plan import CCall, CPlan, is_transposed, misfit

from ._launch import multiprocessors, shared_memory, where

MOST_ROWS = 8  # kernel_of() of decode.cu
_MOST_HEAD_SIZE = 256  # kMostHeadSize of decode_attention.cuh


class _Prepared(NamedTuple):
    """What calls need of a plan. `c_plan` points to the layers' structs in device memory, `layers`."""

    c_plan: CPlan
    layers: torch.Tensor
    wide: bool  # whether 16-byte accesses to every weight's rows are aligned and end with the row
    blocks: dict[tuple[int, int], int]  # of a launch, by rows and sources; -1 where shared memory is too small


def unsupported_forward(like, plan, step):
    rows = step.tokens.shape[0]
    if rows > MOST_ROWS:
        return f"takes at most {MOST_ROWS} rows"
    reason = plan.prepared.get("cuda layout")
    if reason is None:
        reason = plan.prepared["cuda layout"] = _layout(plan)
    if reason:
        return reason
    if len(step.caches) + len(step.cross) > cuda().decode_most_addresses():
        return f"takes at most {cuda().decode_most_addresses()} keys and values of layers"
    if reason := misfit(plan, step):
        return reason
    blocks = _blocks(like, plan, step)
    if blocks < 0:
        return f"{rows} rows of this model do not fit into a block's shared memory"
    return None if blocks else "the device has no cooperative launch"


def _layout(plan):
    """Why no call runs here, or ""."""
    if plan.head_size > _MOST_HEAD_SIZE:
        return f"takes heads of at most {_MOST_HEAD_SIZE}"
    for matrix in (*plan.matrices(), plan.token_embedding, plan.position_embedding):
        if matrix.weight is not None and (is_transposed(matrix) or matrix.weight.stride()[1] != 1):
            return "takes weights whose rows are contiguous"  # the lanes of a warp share a row
    for layer in plan.layers:
        for names in ("query, key and value", "gate and inner"):  # in one product
            matrices = [getattr(layer, name) for name in names.replace(" and ", ", ").split(", ")]
            if len({m.scale is None for m in matrices if m.weight is not None}) > 1:
                return f"takes {names} weights that are all int8 or all not"
    return ""


def _prepared(plan):
    found = plan.prepared.get("cuda")
    if found is None:
        c_plan, device = CPlan.of(plan), plan.dtype_and_device.device
        structs = c_plan.held[0]
        layers = torch.frombuffer(bytearray(structs) or bytearray(1), dtype=torch.uint8).to(device)
        c_plan.layer = layers.data_ptr()
        wide = all(_is_wide(matrix.weight) for matrix in plan.matrices())
        found = plan.prepared["cuda"] = _Prepared(c_plan, layers, wide, {})
    return found


def _is_wide(weight):
    stride = weight.stride(0) if weight.shape[0] > 1 else 0
    return (weight.data_ptr() | stride * weight.element_size() | weight.shape[1] * weight.element_size()) % 16 == 0


def _blocks(like, plan, step):
    prepared = _prepared(plan)
    rows, sources = step.tokens.shape[0], step.cross[0].shape[0] if step.cross else 0
    found = prepared.blocks.get((rows, sources))
    if found is None:
        call, device, dtype = CCall(rows=rows, sources=sources), like.device, DTYPE_CODES[like.dtype]
        structs = ctypes.addressof(prepared.c_plan), ctypes.addressof(call), threads(device)
        found = -1
        if cuda().decode_shared(*structs, dtype) <= shared_memory(device):
            found = cuda().decode_blocks(*structs, multiprocessors(device), dtype, device.index or 0)
        prepared.blocks[rows, sources] = found
    return found


def threads(device):
    """Threads of a block: kDecodeWarps of decode_product.cuh, or fewer on the tests' host shim, which is slow."""
    return 64 if device.type == "cpu" else 256


def forward(like, plan, step):
    prepared, device, rows = _prepared(plan), like.device, step.tokens.shape[0]
    blocks, c_plan = _blocks(like, plan, step), ctypes.addressof(prepared.c_plan)
    logits = torch.empty(rows, plan.outputs, dtype=like.dtype, device=device)
    chosen = torch.empty(rows, dtype=torch.int64, device=device) if step.choose else None
    call = CCall.of(step, logits, chosen)
    kernels, at = cuda(), ctypes.addressof(call)
    scratch = torch.empty(kernels.decode_scratch(c_plan, at, blocks), dtype=torch.uint8, device=device)
    numbers = blocks, threads(device), prepared.wide, DTYPE_CODES[like.dtype]
    kernels.decode_forward(c_plan, at, scratch.data_ptr(), *numbers, *where(device)())
    return logits, chosen
