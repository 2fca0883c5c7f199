"""What do transformers' releases have differently? Everything here looks at what the installed one has, not at its number."""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

output_capturing: Any = None  # without it, transformers puts forwards on instances for the time of a call
with contextlib.suppress(ImportError):
    from transformers.utils import output_capturing as _present

    output_capturing = _present

PreTrainedConfig: Any = getattr(transformers, "PreTrainedConfig", None) or transformers.PretrainedConfig

_CALLS_INTERFACE = re.compile(r"get_interface\(|ALL_ATTENTION_FUNCTIONS\[")


def full_name(row: str) -> str:
    """The full name of a class that a table writes as folder.Class, or folder:file.Class where the file has another name."""
    folder, _, name = row.partition(".")
    folder, _, file = folder.partition(":")
    return f"transformers.models.{folder}.modeling_{file or folder}.{name}"


def calls_interface(source: str) -> bool:
    """Whether this code calls transformers' attention interface."""
    return _CALLS_INTERFACE.search(source) is not None


def interface(name: str | None, eager: Callable[..., Any]) -> Callable[..., Any]:
    """The attention function of this name; `eager` is the model's own."""
    known: Any = ALL_ATTENTION_FUNCTIONS
    if hasattr(known, "get_interface"):
        found: Callable[..., Any] = known.get_interface(name, eager)
        return found
    return eager if name in (None, "eager") else known[name]  # type: ignore[no-any-return]


@torch.compiler.assume_constant_result  # torch.compile would trace through inspect
def parameters(kind: type) -> tuple[str, ...]:
    """The names of the arguments that the forward of a module's class takes."""
    return _parameters(kind)


@functools.cache
def _parameters(kind: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def named(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by the names that the forward of the module's class gives them. Releases order them differently."""
    return dict(zip(parameters(module.__class__), args)) | kwargs
