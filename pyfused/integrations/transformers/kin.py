"""Which models have T5's code under other names? Their classes' methods are compared with T5's, statement by statement."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sys
import textwrap
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.models.t5 import modeling_t5

from ...own_forward import Adapter, Forward
from . import shapes

# Folder in transformers/models, and the prefix of its classes' names.
_PREFIXES = {
    "t5": "T5",
    "mt5": "MT5",
    "pop2piano": "Pop2Piano",
    "switch_transformers": "SwitchTransformers",
    "udop": "Udop",
}
_METHODS = ("forward", "compute_bias", "_relative_position_bucket")


def adapters(of_t5: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """T5's adapters, by the name of a class without its prefix, for all kin: by the full name of a class."""
    return {
        f"{_module(folder)}.{prefix}{name}": functools.partial(_if_alike, name, adapter)
        for folder, prefix in _PREFIXES.items()
        for name, adapter in of_t5.items()
    }


def stacks(adapter: Adapter) -> dict[str, Adapter]:
    """The adapter for all kin's stacks that hand keyword arguments on to their layers."""

    def checked(module: nn.Module) -> Forward | str:
        call = re.search(r"\blayer_module\((.*?)\n *\)", _source(type(module).forward), re.DOTALL)
        return adapter(module) if call and "**kwargs" in call[1] else "it hands no keyword arguments on to its layers"

    return {f"{_module(folder)}.{prefix}Stack": checked for folder, prefix in _PREFIXES.items()}


def classes(stack: type, names: str) -> dict[str, Any] | None:
    """The classes beside a stack's, by their names without the prefix. None unless all of them, and the stack, are T5's."""
    if reason(stack, "Stack"):
        return None
    prefix, module = stack.__name__.removesuffix("Stack"), sys.modules[stack.__module__]
    found = {name: getattr(module, prefix + name, None) for name in names.split()}
    return None if any(kind is None or reason(kind, name) for name, kind in found.items()) else found


@torch.compiler.assume_constant_result  # torch.compile would read sources in its trace
def reason(kind: Any, name: str) -> str:
    """Why `kind` is not T5's class of this name under another prefix; "" if it is."""
    return _reason(kind, name)


@functools.cache
def _reason(kind: Any, name: str) -> str:
    base = getattr(modeling_t5, f"T5{name}")
    if kind is base:
        return ""
    folder = kind.__module__.rpartition(".modeling_")[2]
    if kind.__module__ != _module(folder) or kind.__name__ != _PREFIXES.get(folder, "") + name:
        return f"{kind.__name__} is not one of transformers' classes like T5{name}"
    for method in _METHODS:
        ours, theirs = vars(base).get(method), vars(kind).get(method)
        if (ours is None) != (theirs is None) or (ours and _code(ours, "T5") != _code(theirs, _PREFIXES[folder])):
            return f"its class has a {method} other than T5{name}'s"
    return ""


def _if_alike(name: str, adapter: Adapter, module: nn.Module) -> Forward | str:
    reasons = [reason(base, name) for base in type(module).__mro__ if base.__name__.endswith(name)]
    if "" in reasons:
        return adapter(module)
    by_shape = shapes.adapter_for(module)
    return reasons[0] if by_shape is None else by_shape(module)


def _module(folder: str) -> str:
    return f"transformers.models.{folder}.modeling_{folder}"


def _code(function: Any, prefix: str) -> str:
    """The statements of a function, with neither comments nor docstring nor the prefix of its model's classes."""
    tree: Any = ast.parse(textwrap.dedent(_source(function))).body[0]
    if isinstance(tree.body[0], ast.Expr) and isinstance(tree.body[0].value, ast.Constant):
        del tree.body[0]
    return re.sub(rf"\b{prefix}(?=[A-Z])", "", ast.unparse(tree))


def _source(function: Any) -> str:
    function = getattr(function, "__func__", function)
    return inspect.getsource(inspect.unwrap(function))
