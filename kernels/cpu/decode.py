"""decode on the CPU: launches csrc/cpu/decode.cpp."""

import ctypes

import torch

from pyfused.evidence import MOST_ROWS_BY_COLUMNS
from pyfused.extensions import DTYPE_CODES, cpu, missing
from pyfused.kernels.shared.decode_plan import CCall, CPlan, addresses, is_transposed, misfit
from pyfused.kernels.shared.draw import drawn_token
from pyfused.kernels.shared.prepared import CPU
from pyfused.weight_format import format_of

MOST_ROWS = 16  # the activations of so many rows stay in L1 and L2; for more, the products of whole batches are faster


def unsupported_forward(like, plan, step):
    rows = step.tokens.shape[0]
    layout = plan.prepared.get("cpu layout")
    if layout is None:
        layout = plan.prepared["cpu layout"] = _layout(plan)
    reason, by_columns = layout
    if reason:
        return reason
    if rows > (MOST_ROWS_BY_COLUMNS if by_columns else MOST_ROWS):
        return f"takes at most {MOST_ROWS} rows, {MOST_ROWS_BY_COLUMNS} if weights are stored by columns"
    return misfit(plan, step)


def _layout(plan):
    """Why no call runs here, or "", and whether a matrix is stored by columns."""
    for table in (plan.token_embedding.weight, plan.position_embedding.weight):
        if table is not None and table.stride()[1] != 1:
            return "takes tables whose rows are contiguous", False
    by_columns = [is_transposed(m) for m in plan.matrices()]
    for matrix, transposed in zip(plan.matrices(), by_columns):
        if not transposed and matrix.weight.stride()[1] != 1:
            return "takes weights whose rows or columns are contiguous", False
        if matrix.scale is not None and transposed:
            return "takes integer weights by rows", False
    for layer in plan.layers:
        kinds = {(is_transposed(m), format_of(m.scale)) for m in (layer.gate, layer.inner)}
        if layer.gate.weight is not None and len(kinds) > 1:
            return "takes gate and inner weights that are stored alike", False
    return "", any(by_columns)


def forward(like, plan, step):
    c_plan = plan.prepared.get("cpu")
    if c_plan is None:
        c_plan = plan.prepared["cpu"] = CPlan.of(plan)
    rows = step.tokens.shape[0]
    logits = torch.empty(rows, plan.outputs, dtype=like.dtype, device=CPU)
    draws = step.choose and step.uniform is not None
    chosen = torch.empty(rows, dtype=torch.int64, device=CPU) if step.choose and not draws else None
    call = CCall.of(step, logits, chosen)
    cpu().decode_forward(ctypes.addressof(c_plan), ctypes.addressof(call), DTYPE_CODES[like.dtype])
    if draws:
        chosen = drawn_token(logits, step.uniform, step.temperature, step.top_k, step.top_p)
    return logits, chosen


def with_room(caches):
    """Copies of caches (B, H, S, d) of one shape and dtype with a place more, (B, H, S + 1, d). Nothing is in that place."""
    like = caches[0]
    b, heads, length, size = like.shape
    if not like.is_cpu or missing("_cpu") or not all(t.is_contiguous() and not t.is_neg() for t in caches):
        place = like.new_empty(b, heads, 1, size)
        return [torch.cat((t, place), -2) for t in caches]
    copies, of_place = [like.new_empty(b, heads, length + 1, size) for _ in caches], size * like.itemsize
    lists = addresses(caches), addresses(copies)
    numbers = len(caches), b * heads, length * of_place, (length + 1) * of_place
    cpu().decode_copies(*map(ctypes.addressof, lists), *numbers)
    return copies
