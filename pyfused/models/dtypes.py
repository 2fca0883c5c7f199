"""Which dtypes does a name stand for? Keras's mixed policies have two."""

from __future__ import annotations

import torch

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
MIXED = ("mixed_float16", "mixed_bfloat16")  # Keras's policies: float32 parameters, computation in the other dtype


def resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    """The torch.dtype for a name such as "bfloat16" or "torch.bfloat16". None stands for torch's default dtype.

    Takes float32, bfloat16, float16 and, for reference computations, float64. Raises ValueError for another dtype or name,
    TypeError for another type.
    """
    dtype = torch.get_default_dtype() if dtype is None else dtype
    takes = f"one of {', '.join(_DTYPES)}, as a name or a torch.dtype"
    if isinstance(dtype, torch.dtype):
        if dtype not in _DTYPES.values():
            raise ValueError(f"dtype is {dtype}; it takes {takes}")
        return dtype
    if not isinstance(dtype, str):
        raise TypeError(f"dtype is of type {type(dtype).__name__}; it takes {takes}")
    name = dtype.removeprefix("torch.")
    if name not in _DTYPES:
        mixed = f", and in from_preset and from_config {' and '.join(MIXED)}" if name in MIXED else ""
        raise ValueError(f"dtype is {dtype!r}; it takes {takes}{mixed}")
    return _DTYPES[name]


def resolve_policy(dtype: str | torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes of the parameters and of the computation."""
    if isinstance(dtype, str) and dtype in MIXED:
        return torch.float32, _DTYPES[dtype.removeprefix("mixed_")]
    return resolve_dtype(dtype), resolve_dtype(dtype)
