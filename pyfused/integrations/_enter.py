"""How does a transformers model as a whole get attn_implementation="pyfused", and its own again? On this instance alone.

The implementation is an attribute of the model's configuration, and models may share one. So a model gets configurations of
its own first; what its modules share among them, they share still.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from ..fuse import Entry
from ._attend import REFUSED, attend
from ._masks import make_mask
from ._supported import reason_against

NAME = "pyfused"
AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, make_mask)

_MARK = "_pyfused_entered"  # an attribute of a PreTrainedModel


@dataclass(frozen=True)
class Entered:
    """What a model had before. A pickled model that is loaded imports this file for it, which registers the name."""

    implementation: str | None


def enter(model: nn.Module, wanted: Callable[[str, nn.Module], bool]) -> tuple[list[Entry], list[Entry]]:
    """Sets attn_implementation="pyfused" on each transformers model in `model` that has it, and says what it did."""
    done, left, chosen, kept = [], [], [], []
    for name, part, sharing in _parts(model):
        reason = _reason_against(part, sharing)
        if reason is None:
            continue
        kind = type(part).__name__
        reason = reason or ("" if wanted(name, part) else "filter_fn says no")
        if reason:
            left.append(Entry(name, kind, f"attention: {reason}"))
            kept.append(part)
        else:
            done.append(Entry(name, kind, f'attention: attn_implementation="{NAME}"'))
            chosen.append(part)
    # Around these may be models with no attention of their own, like T5's around its stacks; they say the same.
    for _, part, _ in _parts(model):
        inside = set(part.modules())
        if inside.intersection(chosen) and not inside.intersection(kept) and part not in chosen:
            chosen.append(part)
    if any(part.config._attn_implementation != NAME for part in chosen):
        _own_configs(model)
    for _, part, sharing in _parts(model):
        if part in chosen and part.config._attn_implementation != NAME:
            for same in sharing:
                same.__dict__[_MARK] = Entered(part.config._attn_implementation)
            part.config._attn_implementation = {"": NAME}  # a dict sets no sub-configuration's
    return done, left


def _parts(model: nn.Module) -> list[tuple[str, PreTrainedModel, list[PreTrainedModel]]]:
    """For each configuration: the name of the outermost model that has it, that model, and all that share it."""
    parts: dict[int, tuple[str, PreTrainedModel, list[PreTrainedModel]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            parts.setdefault(id(module.config), (name, module, []))[2].append(module)
    return list(parts.values())


def leave(model: nn.Module) -> None:
    """Gives back what enter changed, unless it was changed again since."""
    for part in model.modules():
        entered = part.__dict__.pop(_MARK, None)
        if isinstance(part, PreTrainedModel) and entered is not None and part.config._attn_implementation == NAME:
            part.config._attn_implementation = {"": entered.implementation}


def _own_configs(model: nn.Module) -> None:
    memo: dict[int, Any] = {}
    for module in model.modules():
        for key, value in vars(module).items():
            if isinstance(value, PreTrainedConfig):
                vars(module)[key] = copy.deepcopy(value, memo)


def _reason_against(part: PreTrainedModel, sharing: list[PreTrainedModel]) -> str | None:
    """Why this model's attention stays; None if it has none."""
    layers = [m for m in _own_modules(part) if _interface_source(m)]
    reason = next(filter(None, map(reason_against, map(type, sharing))), "")
    if reason or not layers:
        return reason or None
    for layer in layers:
        for name, what in REFUSED.items():
            given = re.search(rf"\b{name}=([\w.]+)", _interface_source(layer))
            if given and _value(layer, given[1]) is not None:
                return f"{type(layer).__name__} has {what}"
    return ""


def _own_modules(part: nn.Module) -> Iterator[nn.Module]:
    """Its modules, but those of a model inside that has a configuration of its own."""
    for child in part.children():
        if not (isinstance(child, PreTrainedModel) and child.config is not part.config):
            yield child
            yield from _own_modules(child)


def _interface_source(module: nn.Module) -> str:
    """The source of the module's class, if that calls transformers' attention interface, else an empty string."""
    kind: Any = type(module)
    return _source_of_class(kind)


@functools.cache
def _source_of_class(kind: Any) -> str:
    if not hasattr(sys.modules.get(kind.__module__), "ALL_ATTENTION_FUNCTIONS"):
        return ""
    try:
        source = inspect.getsource(kind)
    except (OSError, TypeError):
        return ""
    return source if "get_interface(" in source else ""


def _value(layer: nn.Module, expression: str) -> Any:
    """What such a layer passes: its own attribute, or something that it computes."""
    if expression == "None":
        return None
    owner, _, attribute = expression.partition(".")
    return getattr(layer, attribute, None) if owner == "self" else expression
