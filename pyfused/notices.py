"""How does a user learn, once, that a call did not run on the fused path?"""

from __future__ import annotations

import warnings

import torch

_said: set[str] = set()


class FallbackWarning(UserWarning):
    """A call took the original computation, or a slower one, for the reason that the message gives."""


def once(message: str) -> None:
    """Warns with a FallbackWarning, the first time in this process that this message comes up; says nothing in a trace."""
    if torch.compiler.is_compiling() or message in _said:
        return
    _said.add(message)
    warnings.warn(message, FallbackWarning, stacklevel=3)
