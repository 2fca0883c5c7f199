"""What does a dense mask hold? csrc/cpu/mask_structure.cpp reads it at memory speed, which is cheap enough for every layer:
so nothing that was seen is ever kept, and a mask may change in ways that no version counter counts."""

import torch

from pyfused.extensions import cpu, missing

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(dtype):
    """The bits that hide a key in a float mask: finfo.min and -inf."""
    hidden = torch.tensor([torch.finfo(dtype).min, -torch.inf], dtype=dtype, device="cpu")
    return tuple(hidden.view(_INTEGERS[dtype.itemsize]).tolist())


# The bits of a visible key, and those that hide one, each of which may be the only one in a mask.
_VALUES = {
    torch.bool: (1, (0,)),
    **{dtype: (0, _bits(dtype)) for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)},
}


def structure(mask, all_see):
    """(end, padded) of a mask (B, 1, Sq, Sk) that is only padding, with or without causality; None for any other one, and
    for one that cannot be read here. end is 0 without causality, else the last query sees the first `end` keys, and each
    query before it one less. padded: whether padding hides some of these. all_see: each query must see some key."""
    visible, hidden = _VALUES.get(mask.dtype, (0, ()))
    if not _readable(mask) or mask.stride(3) != 1 or not mask.numel():
        return None
    b, _, sq, sk = mask.shape
    for bits in hidden:
        found = cpu().mask_structure(
            mask, b, sq, sk, mask.stride(0), mask.stride(2), mask.itemsize, visible, bits, all_see
        )
        if found >= 0:
            return divmod(found, 2)
    return None


def all_zero(tensor):
    """Whether a tensor is known to hold nothing but zeros. The first other element ends the look."""
    if not _readable(tensor) or not tensor.is_contiguous():
        return False
    return bool(cpu().all_zero(tensor, tensor.numel() * tensor.itemsize))


def _readable(tensor):
    return type(tensor) is torch.Tensor and tensor.is_cpu and not missing("_cpu")
