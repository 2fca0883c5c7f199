"""Which products run on a processor's instructions for dot products? Those that csrc/cpu/dot/kernels.h lists, where evidence or
the user asks for them (pyfused.evidence.dot_products)."""

import torch

from pyfused import evidence, extensions


def _has(kernel):
    """Whether the set that may be used has this kernel."""
    name = extensions.dot_products()
    return name is not None and hasattr(extensions.cpu(name), kernel)


def _by_rows(*weights):
    return all(w.stride()[1] == 1 for w in weights)


def of_floats(operator, rows, *weights):
    """evidence.Instructions about the products by an operator's weights in floating point; None if no set has them."""
    if weights[0].dtype != torch.bfloat16 or not _by_rows(*weights) or not _has("linear_forward"):
        return None
    shapes, size = evidence.product_shapes(rows, *weights)
    return evidence.dot_products(operator, "forward", weights[0].dtype, shapes, size)


def of_integers(x, weight, scale):
    """The same about rows of x rounded to int8, times an int8 weight."""
    if not _by_rows(weight) or not _has("linear_dynamic_forward"):
        return None
    shapes, size = evidence.product_shapes(x.shape[:-1].numel(), weight, scale=scale)
    return evidence.dot_products("linear", "forward", x.dtype, f"{shapes}, dynamic", size)


def chosen(instructions):
    """The kernels that `instructions` chooses; None if it chooses none."""
    return extensions.cpu(instructions.name) if instructions is not None and instructions.used else None


def remark(instructions):
    """What explain() adds, or None."""
    if instructions is None:
        return None
    how = "with" if instructions.used else "without"
    return f"{how} {instructions.name}: {instructions.reason}"
