"""How do generate and encode share a model with other threads? They leave its modes as they were."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

from torch import nn

from ..setting import set_to
from ..tracing import tracing

_lock = threading.Lock()
_held: dict[nn.Module, int] = {}  # module that was in training mode -> number of calls that hold it in evaluation mode
_skipping: ContextVar[bool] = ContextVar("pyfused_skipping_padding", default=False)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, until the last overlapping call ends. Then each module returns to its earlier mode."""
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


def skipping_padding() -> AbstractContextManager[None]:
    """Calls of any backbone in this thread leave padding out. The attribute skip_padding does so for all threads."""
    return set_to(_skipping, True)


def skips_padding() -> bool:
    """Whether skipping_padding is on. False in a trace, which cannot leave padding out."""
    return not tracing() and _skipping.get()
