"""How does a user learn that a call did not run on the fused path? By a warning, once for each reason."""

from __future__ import annotations

import warnings

import torch

_said: set[str] = set()


class FallbackWarning(UserWarning):
    """A call did not use the fused kernels, or used slower ones. The message says why."""


def once(message: str) -> None:
    """Warns with a FallbackWarning, once for each message in a process. Does not warn inside torch.compile."""
    if torch.compiler.is_compiling() or message in _said:
        return
    _said.add(message)
    warnings.warn(message, FallbackWarning, stacklevel=3)
