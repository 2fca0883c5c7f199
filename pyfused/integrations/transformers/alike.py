"""Is a class one of T5's under another name? Its methods are compared with those of T5's class, statement by statement."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sys
import textwrap
import tokenize
from typing import Any

import torch
from transformers.models.t5 import modeling_t5

# Folder in transformers/models, and the prefix of its classes' names.
PREFIXES = {
    "t5": "T5",
    "mt5": "MT5",
    "longt5": "LongT5",
    "pop2piano": "Pop2Piano",
    "switch_transformers": "SwitchTransformers",
    "udop": "Udop",
}
UNREADABLE = (OSError, SyntaxError, tokenize.TokenError)  # there is none, or the file changed after it was imported
_METHODS = ("forward", "compute_bias", "_relative_position_bucket")
HAS_INTERFACE = hasattr(modeling_t5, "eager_attention_forward")  # whether attention goes by transformers' interface


@torch.compiler.assume_constant_result  # torch.compile would read sources in its trace
def reason(kind: Any, name: str) -> str:
    """Why `kind` is not T5's class of this name under another prefix; "" if it is."""
    return _reason(kind, name)


@functools.cache
def _reason(kind: Any, name: str) -> str:
    try:
        return _difference(kind, name)
    except UNREADABLE:
        return f"its source, which would be compared with T5{name}'s, cannot be read"


def _difference(kind: Any, name: str) -> str:
    base = getattr(modeling_t5, f"T5{name}")
    if kind is base:
        return ""
    folder = kind.__module__.rpartition(".modeling_")[2]
    if kind.__module__ != module_of(folder) or kind.__name__ != PREFIXES.get(folder, "") + name:
        return f"{kind.__name__} is not one of transformers' classes like T5{name}"
    for method in _METHODS:
        ours, theirs = vars(base).get(method), vars(kind).get(method)
        if (ours is None) != (theirs is None) or (ours and _code(ours, "T5") != _code(theirs, PREFIXES[folder])):
            return f"its class has a {method} other than T5{name}'s"
    if name == "Attention" and HAS_INTERFACE:
        theirs = getattr(sys.modules[kind.__module__], "eager_attention_forward", None)
        if theirs is None or _code(modeling_t5.eager_attention_forward, "T5") != _code(theirs, PREFIXES[folder]):
            return "its eager attention is other than T5's"
    return ""


def classes(stack: type, names: str) -> dict[str, Any] | None:
    """The classes beside a stack's, by their names without the prefix. None unless all of them, and the stack, are T5's."""
    if reason(stack, "Stack"):
        return None
    prefix, module = stack.__name__.removesuffix("Stack"), sys.modules[stack.__module__]
    found = {name: getattr(module, prefix + name, None) for name in names.split()}
    return None if any(kind is None or reason(kind, name) for name, kind in found.items()) else found


def module_of(folder: str) -> str:
    """The module of a model's classes, by its folder in transformers/models."""
    return f"transformers.models.{folder}.modeling_{folder}"


def _code(function: Any, prefix: str) -> str:
    """The statements of a function, with neither comments nor docstring nor the prefix of its model's classes."""
    tree: Any = ast.parse(textwrap.dedent(text_of(function))).body[0]
    if isinstance(tree.body[0], ast.Expr) and isinstance(tree.body[0].value, ast.Constant):
        del tree.body[0]
    return re.sub(rf"\b{prefix}(?=[A-Z])", "", ast.unparse(tree))


def text_of(function: Any) -> str:
    """The source of a function below its decorators. One of UNREADABLE is raised where there is none."""
    function = getattr(function, "__func__", function)
    return inspect.getsource(inspect.unwrap(function))
