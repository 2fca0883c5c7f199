"""Which inputs may a model get? All models share these checks. Each error names the input and what it takes.

Values are numpy arrays or tensors, on the host or on the model's device. Values on the host are checked: ids out of range
raise IndexError. Values on a GPU are checked only with PYFUSED_CHECK=1, since reading them synchronises.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..nn import KVCache
from ..nn.attention import additive
from ..ops.checks import may_look, name_of
from ..rules import its_kind
from ..tracing import tracing

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def gather(inputs: Any, keywords: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """One dict of a call's inputs, from Keras's dict, keywords, or both. No name may occur twice."""
    if inputs is None:
        found: dict[str, Any] = {}
    elif isinstance(inputs, Mapping):
        found = dict(inputs)
    else:
        raise TypeError(f"inputs is {its_kind(inputs)}; it takes a dict with {' and '.join(list(known)[:2])}")
    if twice := sorted(found.keys() & keywords.keys()):
        raise ValueError(f"{twice[0]} is given in the dict and as a keyword; it takes one of the two")
    found.update(keywords)
    for name in found:
        if name not in known:
            raise ValueError(f"inputs has an unknown key {name!r}; it takes {', '.join(known)}")
    return found


def tensor(value: Any, name: str) -> Tensor:
    """A numpy array as a tensor; a tensor as it is."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray):
        if value.dtype in (np.uint16, np.uint32, np.uint64):  # torch has little arithmetic for unsigned types
            value = value.astype(np.int64)
        if value.dtype.kind not in "biuf":
            raise TypeError(f"{name} is a numpy array of {value.dtype}; it takes numbers")
        return torch.tensor(value, device="cpu")  # whatever torch.set_default_device says
    raise TypeError(f"{name} is {its_kind(value)}; it takes a numpy array or a torch.Tensor")


def ids(value: Any, name: str, shape: str, size: tuple[int | None, ...], limit: int, device: torch.device) -> Tensor:
    """Integers in [0, limit) as int64 on `device`. None in `size` allows any length; `shape` is the size in letters."""
    found = tensor(value, name)
    if found.dtype not in _INTEGERS:
        raise TypeError(f"{name} is {name_of(found.dtype)}; it takes integers")
    if found.dim() != len(size) or any(s is not None and s != n for s, n in zip(size, found.shape)):
        wanted = "" if None in size else f" = {size}"
        raise ValueError(f"{name} has shape {tuple(found.shape)}; it takes {shape}{wanted}")
    if found.numel() and may_look(found):
        low, high = (int(v) for v in torch.aminmax(found))
        if low < 0 or high >= limit:
            raise IndexError(f"{name} holds {low if low < 0 else high}; it takes 0 to {limit - 1}")
    return found.to(device, torch.int64)


def positions(value: Any, size: tuple[int, int], limit: int, device: torch.device) -> Tensor:
    """position_ids, checked as in `ids`: (B, S), or (1, S) for all rows."""
    found = tensor(value, "position_ids")
    rows = 1 if found.dim() == 2 and found.shape[0] == 1 else size[0]
    return ids(found, "position_ids", "(B, S) or (1, S)", (rows, size[1]), limit, device)


def mask(value: Any, name: str, shape: str, size: tuple[int, ...], device: torch.device) -> Tensor | None:
    """A padding mask as bool on `device`. None for None, and for a mask on the host that masks nothing.

    Takes any dtype. A fraction counts as 0, since Keras casts to int32 first.
    """
    if value is None:
        return None
    found = tensor(value, name)
    if tuple(found.shape) != size:
        raise ValueError(f"{name} has shape {tuple(found.shape)}; it takes {shape} = {size}")
    if found.dtype.is_complex:
        raise TypeError(f"{name} is {name_of(found.dtype)}; it takes integers, bool or floats")
    real = found if found.dtype == torch.bool else found.trunc() != 0 if found.is_floating_point() else found != 0
    if found.device.type == "cpu" and not tracing() and bool(real.all()):
        return None
    return real.to(device)


def states(value: Any, name: str, shape: str, size: tuple[int | None, ...], like: Tensor) -> Tensor:
    """Floats of the given shape, in the dtype and on the device of `like`."""
    found = tensor(value, name)
    if not found.is_floating_point():
        raise TypeError(f"{name} is {name_of(found.dtype)}; it takes floats")
    if found.dim() != len(size) or any(s is not None and s != n for s, n in zip(size, found.shape)):
        raise ValueError(f"{name} has shape {tuple(found.shape)}; it takes {shape} with {size}")
    return found.to(like.device, like.dtype)


def score_bias(value: Any, name: str, size: tuple[int, int, int, int], like: Tensor) -> Tensor:
    """A 4-D attention mask, bool (True: may look) or additive, as an additive bias that broadcasts to `size`."""
    found = tensor(value, name)
    hint = "; a (B, S) mask of real tokens is padding_mask" if found.dim() == 2 else ""
    if found.dim() != 4 or any(n not in (1, s) for n, s in zip(found.shape, size)):
        raise ValueError(f"{name} has shape {tuple(found.shape)}; it takes (B, 1 or H, S, Sk) = {size}{hint}")
    if not (found.dtype == torch.bool or found.is_floating_point()):
        raise TypeError(f"{name} is {name_of(found.dtype)}; it takes bool, or floats that are added to the scores")
    return additive(found.to(like.device), like.dtype)


def cache(value: Any, layers: int, heads: int, size: int, like: Tensor) -> KVCache | None:
    """A call's KV cache. It must fit these layers, heads and head size, and the dtype and device of `like`."""
    if value is None:
        return None
    if not isinstance(value, KVCache):
        raise TypeError(f"cache is {its_kind(value)}; it takes what new_cache() returns")
    wanted = (layers, heads, size, like.dtype, like.device)
    if value.signature != wanted:
        meaning = "layers, heads, head size, dtype, device"
        raise ValueError(f"cache is for {value.signature}; it takes this model's {wanted}: {meaning}")
    if value.positions is not None:
        raise ValueError("cache writes at positions of its own; a call takes a cache whose rows are equally long")
    return value


def cached(cache: KVCache | None, batch_size: int, new: int) -> int:
    """The number of cached tokens. Raises ValueError if the `new` ones do not fit."""
    if cache is None:
        return 0
    if cache.batch_size != batch_size:
        raise ValueError(f"cache has {cache.batch_size} rows; it takes the batch size of the input, {batch_size}")
    if cache.length + new > cache.capacity:
        room = cache.capacity - cache.length
        raise ValueError(f"cache holds {cache.length} tokens and has room for {room}; it cannot take {new} more")
    return cache.length


def texts(value: Any, name: str, vocabulary: int) -> list[np.ndarray]:
    """Texts, given as lists of token ids of any length: each becomes an int64 array."""
    if isinstance(value, (str, bytes)) or not isinstance(value, (Sequence, np.ndarray)):
        raise TypeError(f"{name} is {its_kind(value)}; it takes a list of lists of token ids")
    arrays = []
    for row, text in enumerate(value):
        if isinstance(text, (str, bytes)) or not isinstance(text, (Sequence, np.ndarray)):
            raise TypeError(f"{name}[{row}] is {its_kind(text)}; it takes a list of token ids")
        if len(text) == 0:
            raise ValueError(f"{name}[{row}] is empty; it takes at least one token")
        try:
            array = np.asarray(text)
        except ValueError:
            raise TypeError(f"{name}[{row}] is not one list of integers") from None
        if array.dtype.kind not in "iu" or array.ndim != 1:
            raise TypeError(f"{name}[{row}] is {array.ndim}-D of {array.dtype}; it takes a list of integers")
        if array.min() < 0 or array.max() >= vocabulary:
            worst = array.min() if array.min() < 0 else array.max()
            raise IndexError(f"{name}[{row}] holds {worst}; it takes token ids 0 to {vocabulary - 1}")
        arrays.append(array.astype(np.int64))
    return arrays


def padded(prompts: Sequence[np.ndarray], length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Token ids (B, S), padded on the right with 0, and lengths (B,). S is `length`, or the longest prompt's if None."""
    lengths = np.array([len(prompt) for prompt in prompts])
    ids = np.zeros((len(prompts), lengths.max() if length is None else length), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
    return ids, lengths
