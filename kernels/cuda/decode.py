"""decode on CUDA: launches csrc/cuda/decode.cu, one persistent kernel for a step of a few rows, and one that draws tokens.

More rows run in groups, a launch for each. A group reads all weights again: a step of 16 rows takes twice as long as one of 8.
"""

import ctypes
from typing import NamedTuple

import torch

from pyfused.decode_plan import Matrix
from pyfused.extensions import DTYPE_CODES, cuda
from pyfused.kernels.shared.decode_plan import CCall, CPlan, is_transposed, misfit
from pyfused.weight_format import INT4, format_of

from ._launch import multiprocessors, shared_memory, where

MOST_ROWS = 64
_MOST_TOGETHER = 8  # rows of a launch: kernel_of() of decode.cu
_MOST_HEAD_SIZE = 256  # kMostHeadSize of decode_attention.cuh


class _Prepared(NamedTuple):
    """What calls need of a plan. `c_plan` points to the layers' structs in device memory, `layers`."""

    c_plan: CPlan
    layers: torch.Tensor
    by_columns: bool  # whether memory holds a weight transposed
    wide: bool  # whether 16-byte accesses to every weight's rows of memory are aligned and end with the row
    form: int  # a Form of csrc/cuda/decode_product.cuh
    blocks: dict[tuple[int, int], int]  # of a launch, by rows and sources; -1 where shared memory is too small
    together: dict[tuple[int, int], int]  # rows of a group, by a step's rows and sources; 0 if not even one row fits


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
    sources = _sources(step)
    if not (together := _together(like, plan, rows, sources)):
        return "a row of this model does not fit into a block's shared memory"
    return None if _blocks(like, plan, *_size(rows, sources, 0, together)) else "the device has no cooperative launch"


def _layout(plan):
    """Why no call runs here, or ""."""
    if plan.head_size > _MOST_HEAD_SIZE:
        return f"takes heads of at most {_MOST_HEAD_SIZE}"
    tables = plan.token_embedding, plan.position_embedding, plan.head
    if not all(m.weight is None or m.weight.stride()[1] == 1 for m in tables):
        return "takes tables and a head whose rows are contiguous"
    for matrix in (*plan.matrices(), *tables):
        if format_of(matrix.scale) is INT4:
            return "takes no int4 weights"
        if matrix.weight is not None and matrix.weight.stride()[1] != 1 and _is_by_rows(matrix):
            return "takes weights whose rows or columns are contiguous"
    for layer in plan.layers:
        for names in ("query, key and value", "gate and inner"):  # in one product
            matrices = [getattr(layer, name) for name in names.replace(" and ", ", ").split(", ")]
            matrices = [m for m in matrices if m.weight is not None]
            if len({m.scale is None for m in matrices}) > 1:
                return f"takes {names} weights that are all int8 or all not"
            if len(set(map(_is_by_rows, matrices))) > 1:
                return f"takes {names} weights that are all stored by rows or all by columns"
    return ""


def _is_by_rows(matrix):
    """Integers are stored by rows alone."""
    return matrix.scale is not None or not is_transposed(matrix)


def _prepared(plan):
    found = plan.prepared.get("cuda")
    if found is None:
        c_plan, device = CPlan.of(plan), plan.dtype_and_device.device
        structs = c_plan.held[0]
        layers = torch.frombuffer(bytearray(structs) or bytearray(1), dtype=torch.uint8).to(device)
        c_plan.layer = layers.data_ptr()
        wide = all(_is_wide(m.weight if _is_by_rows(m) else m.weight.t()) for m in plan.matrices())
        by_columns = not all(map(_is_by_rows, plan.matrices()))
        found = plan.prepared["cuda"] = _Prepared(c_plan, layers, by_columns, wide, _form(plan, wide), {}, {})
    return found


def _form(plan, wide):
    """2 where the layers' weights are all stored by columns, 1 by rows, 0 for a mixture, integers or narrow accesses."""
    if not wide or any(matrix.scale is not None for matrix in plan.matrices()):
        return 0
    of_layers = {_is_by_rows(m) for layer in plan.layers for m in layer if isinstance(m, Matrix) and m.weight is not None}
    return 0 if len(of_layers) > 1 else 1 if of_layers <= {True} else 2


def _is_wide(weight):
    stride = weight.stride(0) if weight.shape[0] > 1 else 0
    return (weight.data_ptr() | stride * weight.element_size() | weight.shape[1] * weight.element_size()) % 16 == 0


def _sources(step):
    return step.cross[0].shape[0] if step.cross else 0


def _together(like, plan, rows, sources):
    """How many rows of a step run in one launch: as many as fit. Rows that share a source stay together if they can."""
    prepared = _prepared(plan)
    found = prepared.together.get((rows, sources))
    if found is None:
        beams = rows // sources if sources else 1
        fits = (
            size
            for size in range(min(rows, _MOST_TOGETHER), 0, -1)
            if (size % beams == 0 or size < beams) and _blocks(like, plan, *_size(rows, sources, 0, size)) >= 0
        )
        found = prepared.together[rows, sources] = next(fits, 0)
    return found


def _size(rows, sources, first, together):
    """Rows of the group that begins with row `first`, and their sources. No group has rows of two sources but all of both."""
    beams = rows // sources if sources else 1
    if together < beams:
        return min(together, beams - first % beams), 1
    count = min(together, rows - first)
    return count, count // beams if sources else 0


def _blocks(like, plan, rows, sources):
    prepared = _prepared(plan)
    found = prepared.blocks.get((rows, sources))
    if found is None:
        call, device, dtype = CCall(rows=rows, sources=sources), like.device, DTYPE_CODES[like.dtype]
        structs = ctypes.addressof(prepared.c_plan), ctypes.addressof(call), threads(device), prepared.by_columns
        found = -1
        if cuda().decode_shared(*structs, dtype) <= shared_memory(device):
            found = cuda().decode_blocks(*structs, multiprocessors(device), dtype, device.index or 0)
        prepared.blocks[rows, sources] = found
    return found


def threads(device):
    """Threads of a block: kDecodeWarps of decode_product.cuh, or fewer on the tests' host shim, which is slow."""
    return 64 if device.type == "cpu" else 256


def forward(like, plan, step):
    device, rows, sources = like.device, step.tokens.shape[0], _sources(step)
    logits = torch.empty(rows, plan.outputs, dtype=like.dtype, device=device)
    chosen = torch.empty(rows, dtype=torch.int64, device=device) if step.choose else None
    together, first = _together(like, plan, rows, sources), 0
    while first < rows:
        count, of_sources = _size(rows, sources, first, together)
        last = first + count
        if count == rows:
            group = step
        else:
            source = first * sources // rows
            group = _group(step, slice(first, last), slice(source, source + of_sources))
        _launch(like, plan, group, logits[first:last], None if chosen is None else chosen[first:last])
        first = last
    return logits, chosen


def _group(step, rows, sources):
    """Some rows of a step."""

    def of(tensor, part=rows):
        return None if tensor is None else tensor[part]

    return step._replace(
        tokens=step.tokens[rows],
        places=of(step.places),
        position_ids=of(step.position_ids),
        mask=of(step.mask),
        caches=[t[rows] for t in step.caches],
        cross=[t[sources] for t in step.cross],
        cross_mask=of(step.cross_mask, sources),
        uniform=of(step.uniform),
    )


def _launch(like, plan, step, logits, chosen):
    prepared, device = _prepared(plan), like.device
    blocks, c_plan = _blocks(like, plan, step.tokens.shape[0], _sources(step)), ctypes.addressof(prepared.c_plan)
    call = CCall.of(step, logits, chosen)
    kernels, at = cuda(), ctypes.addressof(call)
    size = kernels.decode_scratch(c_plan, at, blocks, prepared.by_columns)
    scratch = torch.empty(size, dtype=torch.uint8, device=device)
    numbers = blocks, threads(device), prepared.by_columns, prepared.wide, prepared.form, DTYPE_CODES[like.dtype]
    kernels.decode_forward(c_plan, at, scratch.data_ptr(), *numbers, *where(device)())
