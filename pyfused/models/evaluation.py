"""How do generate and encode use a model that other threads use at the same time? Without a trace of it afterwards."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import nn

from ..tracing import tracing

_lock = threading.Lock()
_held: dict[nn.Module, int] = {}  # modules that were in training mode, and how many calls keep them out of it
_skipping: ContextVar[bool] = ContextVar("pyfused_skipping_padding", default=False)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, until the last of the calls that overlap ends; then each module is in the mode it was in."""
    with _lock:
        modules = [m for m in model.modules() if m.training or m in _held]
        for m in modules:
            _held[m] = _held.get(m, 0) + 1
            m.training = False
    try:
        yield
    finally:
        with _lock:
            for m in modules:
                _held[m] -= 1
                if not _held[m]:
                    del _held[m]
                    m.training = True


@contextmanager
def skipping_padding() -> Iterator[None]:
    """This thread's calls of any backbone leave padding out, as its attribute skip_padding says for all threads."""
    token = _skipping.set(True)
    try:
        yield
    finally:
        _skipping.reset(token)


def skips_padding() -> bool:
    """Whether skipping_padding is on; not in a trace, which cannot leave anything out."""
    return not tracing() and _skipping.get()
