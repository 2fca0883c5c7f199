"""How does a directory in Hugging Face format hold int8 and int4 weights, as pyfused.quantize_ makes them?

The names are Hugging Face's. A weight is stored as pyfused/weight_format.py says: in int8 in the shape it has in floating
point, in int4 always by rows, (N, K / 2). Beside it is ``<name>_scale``. ``config.json`` has the block

    "quantization_config": {"quant_method": "pyfused", "version": 2, "modules": {"layers.0.attention.output": "int4", ...}}

with pyfused's names of the quantised modules. The value of an int8 one says whether it is dynamic: false or true. With int8
modules alone the version is 1. The files are called model.int8.safetensors or model.int4.safetensors, so that transformers
finds no weights: it would ignore the block and take the integers for the weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from pyfused.checkpoints.plan import Piece, Plan, Target
from pyfused.checkpoints.storage import Entry
from pyfused.nn import QuantizedEmbedding, QuantizedLinear
from pyfused.nn.quantized import Scheme
from pyfused.weight_format import FORMATS, INT8, WeightFormat

Modules = Mapping[str, Scheme]  # the names of quantised modules, and how each is

_BLOCK, _METHOD, _VERSIONS = "quantization_config", "pyfused", (1, 2)
_STATED: dict[Any, Scheme] = {False: Scheme("int8"), True: Scheme("int8", True), "int4": Scheme("int4")}


def modules_of(model: nn.Module) -> dict[str, Scheme]:
    """A model's quantised modules."""
    kinds = (QuantizedLinear, QuantizedEmbedding)
    return {name: Scheme.of(module) for name, module in model.named_modules() if isinstance(module, kinds)}


def variant(modules: Modules) -> str:
    """What goes into the names of the weight files: the narrowest format, or "" if there are no integers."""
    used = [FORMATS[scheme.name] for scheme in modules.values()]
    return min(used, key=lambda form: form.bits).name if used else ""


def block(modules: Modules) -> dict[str, Any]:
    """What a configuration says about integer weights; empty if there are none."""
    if not modules:
        return {}
    stated = {scheme: value for value, scheme in _STATED.items()}
    version = 1 if variant(modules) == INT8.name else 2
    named = {name: stated[scheme] for name, scheme in modules.items()}
    return {_BLOCK: {"quant_method": _METHOD, "version": version, "modules": named}}


def integer_modules(raw: dict[str, Any], file: Path) -> tuple[dict[str, Scheme], dict[str, Any]]:
    """The quantised modules that a configuration names, and the configuration without that block. Other quantisations stay in
    it. Raises ValueError if the block is not as `block` makes it."""
    found = raw.get(_BLOCK)
    if not isinstance(found, dict) or found.get("quant_method") != _METHOD:
        return {}, raw
    modules, version = found.get("modules"), found.get("version")
    if isinstance(version, bool) or version not in _VERSIONS:
        raise ValueError(f"{file}: {_BLOCK} has version {version!r}; this pyfused reads versions 1 and 2")
    if not isinstance(modules, dict) or not modules or not all(map(_is_stated, modules.values())):
        takes = 'must map names of modules to true, false or "int4"'
        raise ValueError(f"{file}: {_BLOCK} {takes}, but modules is {modules!r:.100}")
    rest = {name: value for name, value in raw.items() if name != _BLOCK}
    return {name: _STATED[value] for name, value in modules.items()}, rest


def _is_stated(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, str) and value in _STATED)


def integer_plan(plan: Plan, modules: Modules, where: Path | str = "model") -> Plan:
    """The plan with the weights of these modules as integers, each with a scale. Raises ValueError, which begins with `where`,
    for a weight that does not fit its format."""
    result: Plan = {}
    for ours, target in plan.items():
        module, _, kind = ours.rpartition(".")
        if kind == "reverse_weight":  # a quantised table has its own output matrix in a module
            module = f"{module}.reverse"
        if module not in modules or kind == "bias":
            result[ours] = target
            continue
        form = FORMATS[modules[module].name]
        k = math.prod(target.shape[1:])
        if misfit := form.misfit(k):
            raise ValueError(f"{where}: {module!r} cannot be {form.name}: {misfit}")
        result |= {
            f"{module}.weight": Target(form.shape(target.shape[0], k), _weights(target, form, k)),
            f"{module}.scale": Target(form.scale_shape(target.shape[0], k), _scales(target, form, k)),
        }
    return result


def _weights(target: Target, form: WeightFormat, k: int) -> tuple[Piece, ...]:
    if form is INT8:
        return tuple(replace(piece, dtype=torch.int8) for piece in target.pieces)
    return tuple(Piece(p.name, form.shape(math.prod(p.shape) // k, k), dtype=torch.int8) for p in target.pieces)


def _scales(target: Target, form: WeightFormat, k: int) -> tuple[Piece, ...]:
    return tuple(
        Piece(f"{p.name}_scale", form.scale_shape(math.prod(p.shape) // k, k), dtype=form.scale_dtype)
        for p in target.pieces
    )


def without_prefix(entries: dict[str, Entry], maps: ModuleType) -> dict[str, Entry]:
    """A file's tensors without the prefix that pyfused saves."""
    return {name.removeprefix(maps.HF_SAVED_PREFIX): entry for name, entry in entries.items()}
