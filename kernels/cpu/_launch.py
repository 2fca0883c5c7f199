"""How does a CPU kernel cost little Python? Its launch is prepared once for arguments of some shapes, and used again for others
of the same: pyfused.ops finds it by the signature of a call (csrc/include/pyfused/python_call.h)."""

import functools
import math

import torch

CPU = torch.device("cpu")  # for every new tensor: torch.set_default_device may say something else
_empty_strided = getattr(torch._C._dynamo.guards, "_empty_strided_cpu", None)


def launched(prepare):
    """Makes `forward(*args)` of `prepare(*args)`, which returns the launch for such arguments: a function of all of them
    that reads of them the tensors' memory alone, and serves every call that differs from this one in values only. Behind them
    it takes tensors for the results, of the shapes and strides that it would make, and makes them where there are none. Where
    prepare returns None, because strides do not fit, forward copies them first."""

    def forward(*args):
        launch = prepare(*args)
        if launch is None:
            args = tuple(a.contiguous() if isinstance(a, torch.Tensor) else a for a in args)
            launch = prepare(*args)
        return launch(*args)

    forward.prepare = prepare
    return forward


def maker(shape, dtype, strides=None):
    """A function that returns a new tensor, contiguous unless strides are given. What torch.compile's programs make theirs
    with takes 1.0 us, where torch.empty, which parses and dispatches, takes 1.8; it is no public name of torch."""
    if strides is None:
        strides = [math.prod(max(size, 1) for size in shape[i + 1 :]) for i in range(len(shape))]
    if _empty_strided is None:
        return functools.partial(torch.empty_strided, shape, strides, dtype=dtype, device=CPU)
    return functools.partial(_empty_strided, tuple(shape), tuple(strides), dtype)


def library_norm(norm):
    """A function of (parameters, x, residual, y, total) that gives (y, total) by a norm of torch: norm(x + residual,
    *parameters)."""

    def launch(parameters, x, residual, y, total):
        if residual is not None:
            x = total = torch.add(x, residual, out=total)
        normalised = norm(x, *parameters).contiguous()
        return normalised if y is None else y.copy_(normalised), total

    return launch


def rows_of(x):
    """(rows, N, row stride) of x (..., N) as a kernel takes it, or None where no single stride leads from row to row."""
    *outer, n = x.shape
    if x.is_contiguous():
        return math.prod(outer), n, n
    *strides, within = x.stride()
    if within != 1 and n != 1:
        return None
    stride = following = None
    for size, step in zip(reversed(outer), reversed(strides)):
        if size == 1:
            continue
        if stride is None:
            stride = step
        elif step != following:
            return None
        following = step * size
    return math.prod(outer), n, n if stride is None else stride


def dense(*tensors):
    """Whether all of them, None aside, are contiguous."""
    return all(t is None or t.is_contiguous() for t in tensors)
