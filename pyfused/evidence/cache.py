"""Which answers depend on the evidence files? They are cached until forget() is called."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

_T = TypeVar("_T")
_remembered: list[Any] = []


def remembered(function: Callable[..., _T]) -> functools._lru_cache_wrapper[_T]:
    """functools.cache, which forget() clears."""
    cached = functools.cache(function)
    _remembered.append(cached)
    return cached


def forget() -> None:
    """Clears every remembered answer. The files are read again at the next question."""
    for function in _remembered:
        function.cache_clear()
