"""Which transformers models use its attention interface? Other models ignore a registered implementation."""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from .releases import calls_interface

_reasons: dict[type, str] = {}  # by the type of a config
_vouched: dict[type, bool] = {}


# Code that adds a mask to scores or fills scores where a mask says so.
_USES_MASK = re.compile(r"(\+=?\s*|masked_fill_?\(\s*~?)\w*mask\b")


def reason_against(model_class: type[PreTrainedModel]) -> str:
    """Why models of this class must keep their own attention; empty if they use the interface, or have no attention."""
    if not model_class._can_set_attn_implementation():
        return f"{model_class.__name__} has attention code of its own, which transformers' attention interface does not reach"
    # If transformers allows the model neither sdpa nor a registered function, part of it may have its own attention code.
    if not (model_class._supports_sdpa or model_class._supports_attention_backend):
        for name in _own_attention(model_class.__module__):
            return f"{name} has attention code of its own, beside layers that use transformers' attention interface"
    return ""


@functools.cache
def _own_attention(module: str) -> list[str]:
    """The classes of a file that apply masks to scores without the interface."""
    parts = re.split(r"^(?=\S)", inspect.getsource(sys.modules[module]), flags=re.MULTILINE)
    classes = [p for p in parts if p.startswith("class ") and "Attention" in p.partition("\n")[0]]
    return [c.split("(")[0].split()[1] for c in classes if not calls_interface(c) and _USES_MASK.search(c)]


def check_interface(config: Any) -> None:
    """Refuses models whose own code would misread "pyfused" masks.

    Raises:
        ValueError: no model of this config uses the attention interface.
    """
    kind = type(config)
    if kind not in _reasons:
        _reasons[kind] = _find(kind)
    if _reasons[kind]:
        raise ValueError(
            f'attn_implementation="pyfused" does not suit model type {getattr(config, "model_type", kind.__name__)!r}: '
            f'{_reasons[kind]}; use attn_implementation="eager", and pyfused.fuse_ for what it can fuse'
        )


def may_leave_out_masks(config: Any) -> bool:
    """Whether is_causal tells what a mask of None means in this config's models. It may be wrong if transformers allows the
    model neither sdpa nor a registered function: NLLB-MoE's causal decoder says False."""
    kind = type(config)
    if kind not in _vouched:
        _vouched[kind] = _vouches(kind)
    return _vouched[kind]


@torch.compiler.assume_constant_result
def _find(kind: type) -> str:
    reasons = [reason_against(c) for c in _models_of(kind)]
    return reasons[0] if reasons and all(reasons) else ""


@torch.compiler.assume_constant_result
def _vouches(kind: type) -> bool:
    return all(c._supports_sdpa or c._supports_attention_backend for c in _models_of(kind))


def _models_of(kind: type) -> list[Any]:
    return [c for c in _subclasses(PreTrainedModel) if getattr(c, "config_class", None) is kind]


def _subclasses(base: Any) -> Iterator[Any]:
    for c in base.__subclasses__():
        yield c
        yield from _subclasses(c)
