"""What does a dense mask or bias hold? It is read at memory speed (masks by csrc/cpu/mask_structure.cpp), cheap enough for
every layer. No result is kept, because a tensor can change without a change of its version counter."""

import torch

from pyfused.extensions import cpu, missing

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(dtype):
    """The bits that hide a key in a float mask: finfo.min and -inf."""
    hidden = torch.tensor([torch.finfo(dtype).min, -torch.inf], dtype=dtype, device="cpu")
    return tuple(hidden.view(_INTEGERS[dtype.itemsize]).tolist())


# By dtype: (the bits of a visible key, the values that hide a key). One mask uses only one hiding value.
_VALUES = {
    torch.bool: (1, (0,)),
    **{dtype: (0, _bits(dtype)) for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)},
}


def structure(mask, all_see):
    """(end, padded) of a mask (B, 1, Sq, Sk) that holds only padding, with or without causality. None for other masks and
    for masks that cannot be read here. In a float mask 0.0 and -0.0 are both a visible key.

    end is 0 without causality. Otherwise the last query sees the first `end` keys, and each query before it sees one key
    less. padded says whether padding hides some of these keys. With all_see every query must see a key.
    """
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
    """Whether a float tensor is known to hold only zeros, of either sign. Reading stops at the first other element."""
    if not _readable(tensor) or tensor.dtype not in _VALUES or not tensor.is_contiguous():
        return False
    return bool(cpu().all_zero(tensor, tensor.numel(), tensor.itemsize))


def distances(bias):
    """The table (H, 2 S - 1) of a bias (1, H, S, S) whose finite values depend on the head and on the key's position minus the
    query's alone, as a DistanceBias has it. None for other biases and for those that cannot be read here.

    Each row is compared with the one before it, moved by one key. Reading stops at the first other element.
    """
    if not _readable(bias) or bias.dim() != 4 or bias.shape[0] != 1 or not 1 < bias.shape[2] == bias.shape[3]:
        return None
    rows = bias[0].permute(1, 2, 0)  # how transformers' T5 lays it out: the heads side by side
    words, bits = rows, 8 * rows.shape[2] * rows.itemsize
    if bits and rows.is_contiguous() and bits % 64 == 0 and rows.storage_offset() * rows.itemsize % 8 == 0:
        words = rows.view(torch.int64)  # fewer comparisons, of the same bits
    if not torch.equal(words[1:, 1:], words[:-1, :-1]):
        return None
    table = torch.cat((bias[0, :, 1:, 0].flip(1), bias[0, :, 0]), 1)
    return table if table.isfinite().all() else None


def slopes(bias, real):
    """ALiBi's slopes (H, 1): a bias (B or 1, H, 1, Sk) in float32 is slope * place, bit by bit. None for other biases and for
    those that cannot be read here.

    Places begin at the first key, or end at the last one; or real (B, Sk), True at a real token, counts them, as BLOOM does.
    Then real tokens must be neighbours, so that the difference of two places is their distance.
    """
    if not _readable(bias) or bias.dtype != torch.float32 or bias.shape[2] != 1 or bias.shape[3] < 2:
        return None
    rows, places = bias[:, :, 0], torch.arange(bias.shape[3], device="cpu")
    for first, slope in ((0, rows[0, :, 1:2]), (1 - bias.shape[3], -rows[0, :, -2:-1])):
        if torch.equal(rows, (slope * (places + first)).expand_as(rows)):
            return slope
    if real is None or len(real) != len(rows) or bool((real[:, 1:] > real[:, :-1]).sum(1).add(real[:, 0]).gt(1).any()):
        return None
    counted = (real.cumsum(1) - 1) * real
    row, key = divmod(int((counted == 1).int().argmax()), len(places))
    slope = rows[row, :, key : key + 1]
    return slope if torch.equal(rows, slope * counted[:, None]) else None


def _readable(tensor):
    return type(tensor) is torch.Tensor and tensor.is_cpu and not missing("_cpu")
