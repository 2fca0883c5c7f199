"""How does fuse_ switch a transformers model's attention layers to "pyfused" and back?

transformers reads the attention implementation from the layer's config. All layers share that config, and other models may
share it too. So a fused layer holds a FusedConfig instead, which differs only in the implementation's name. The model's own
config does not change and is saved as before.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable, Container, Iterator
from typing import Any

from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from ...own_forward import Entry
from . import alike
from .attention import REFUSED, attend, reason_to_scale
from .masks import make_mask
from .releases import PreTrainedConfig, calls_interface
from .support import reason_against

NAME = "pyfused"
AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, make_mask)

READABLE = (None, "eager", "sdpa", NAME)  # the implementations whose masks `attend` reads


class FusedConfig:
    """A layer's config with another attention implementation: "pyfused".

    If a user sets another implementation on the config afterwards, that one counts. Loading a pickled FusedConfig imports
    this file, which registers the name.
    """

    def __init__(self, config: Any):
        vars(self).update(_fused=config, _had=config._attn_implementation)

    @property
    def _attn_implementation(self) -> str | None:
        now = self._fused._attn_implementation
        return NAME if now == self._had else now

    @property
    def masks(self) -> str:
        """The implementation whose masks the model makes. It tells `attend` how to read a mask of None."""
        return self._fused._attn_implementation or "eager"

    def __getattr__(self, name: str) -> Any:
        if name in ("_fused", "_had") or name.startswith("__"):  # not set yet while a copy or pickle is loaded
            raise AttributeError(name)
        return getattr(self._fused, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._fused, name, value)


def enter(
    model: nn.Module, wanted: Callable[[str, nn.Module], bool], adapted: Container[str]
) -> tuple[list[Entry], list[Entry]]:
    """Switches each layer that uses transformers' attention interface to "pyfused"; returns (switched, left alone).

    adapted: full names of classes whose own attention has an adapter.
    """
    done, left = [], []
    layers = list(_layers(model))
    for name, layer, owner in layers:
        reason = _reason_against(layer, owner) or ("" if wanted(name, layer) else "filter_fn says no")
        if reason:
            left.append(Entry(name, type(layer).__name__, reason))
            continue
        if not isinstance(layer.config, FusedConfig):
            vars(layer)["config"] = FusedConfig(layer.config)
        done.append(Entry(name, type(layer).__name__, "pyfused.attention, by transformers' attention interface"))
    for name, part in model.named_modules():
        if isinstance(part, PreTrainedModel) and not any(isinstance(m, PreTrainedModel) for m in part.children()):
            reason = reason_against(type(part))
            if reason and any(f"{type(m).__module__}.{type(m).__qualname__}" in adapted for m in part.modules()):
                continue
            if reason and not any(owner is part for _, _, owner in layers):
                left.append(Entry(name, type(part).__name__, f"attention: {reason}"))
    return done, left


def leave(model: nn.Module) -> None:
    """Restores the configs that `enter` replaced."""
    for module in model.modules():
        if isinstance(vars(module).get("config"), FusedConfig):
            vars(module)["config"] = vars(module)["config"]._fused


def interface_layers(model: nn.Module) -> list[Any]:
    """The layers that call transformers' attention interface."""
    return [layer for _, layer, _ in _layers(model)]


def _layers(model: nn.Module) -> Iterator[tuple[str, Any, PreTrainedModel | None]]:
    """The layers that call the attention interface: name, layer, and the transformers model right around it."""

    def walk(name, module, owner, seen):
        for key, child in module.named_children():
            if child in seen:
                continue
            seen.add(child)
            path = f"{name}.{key}" if name else key
            if _interface_source(child) and isinstance(vars(child).get("config"), PreTrainedConfig | FusedConfig):
                yield path, child, owner
            yield from walk(path, child, child if isinstance(child, PreTrainedModel) else owner, seen)

    yield from walk("", model, model if isinstance(model, PreTrainedModel) else None, set())


def _reason_against(layer: Any, owner: PreTrainedModel | None) -> str:
    """Why this layer keeps its own attention; empty if "pyfused" can replace it."""
    # The attention of T5's kin is T5's, whatever the rest of the model does.
    reason = "" if owner is None or not alike.reason(type(layer), "Attention") else reason_against(type(owner))
    now = layer.config._attn_implementation
    if reason or now not in READABLE:
        return reason or f'attn_implementation="{now}" was chosen, which has masks of its own; set "sdpa", then fuse'
    if scales := reason_to_scale(layer):
        return scales
    for name, what in REFUSED.items():
        given = re.search(rf"\b{name}=([\w.]+)", _interface_source(layer))
        if given and _value(layer, given[1]) is not None:
            return f"{type(layer).__name__} has {what}"
    return ""


def _interface_source(module: nn.Module) -> str:
    """The source of the module's class if it calls transformers' attention interface, else an empty string."""
    kind: Any = type(module)
    return _source_of_class(kind)


@functools.cache
def _source_of_class(kind: Any) -> str:
    if not hasattr(sys.modules.get(kind.__module__), "ALL_ATTENTION_FUNCTIONS"):
        return ""
    # The methods' sources one by one: inspect parses the whole file to find a class, again for each class.
    try:
        methods = [value for value in vars(kind).values() if inspect.isfunction(value)]
        source = "\n".join(inspect.getsource(inspect.unwrap(method)) for method in methods)
    except (*alike.UNREADABLE, TypeError):
        return ""
    return source if calls_interface(source) else ""


def _value(layer: nn.Module, expression: str) -> Any:
    """The value that a layer passes for an argument: None, its own attribute, or else the expression's text."""
    if expression == "None":
        return None
    owner, _, attribute = expression.partition(".")
    return getattr(layer, attribute, None) if owner == "self" else expression
