"""How does a directory in Hugging Face format hold int8 weights, as pyfused.quantize_ makes them?

The names are Hugging Face's. A weight is stored as int8 in the shape it has in floating point, and beside it
``<name>_scale``, float32, one value for each output: the weight is the scale times the integers. ``config.json`` has the block

    "quantization_config": {"quant_method": "pyfused", "version": 1, "modules": {"layers.0.attention.output": false, ...}}

with pyfused's names of the quantised modules, and whether each is dynamic. The files are called model.int8.safetensors, so that
transformers finds no weights: it would ignore the block and take the integers for the weights.
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

VARIANT = "int8"  # in the names of the weight files
_BLOCK, _METHOD, _VERSION = "quantization_config", "pyfused", 1


def modules_of(model: nn.Module) -> dict[str, bool]:
    """The names of a model's quantised modules, and whether each is dynamic."""
    kinds = (QuantizedLinear, QuantizedEmbedding)
    return {name: module.dynamic for name, module in model.named_modules() if isinstance(module, kinds)}


def block(modules: Mapping[str, bool]) -> dict[str, Any]:
    """What a configuration says about int8 weights; empty if there are none."""
    return {_BLOCK: {"quant_method": _METHOD, "version": _VERSION, "modules": dict(modules)}} if modules else {}


def int8_modules(raw: dict[str, Any], file: Path) -> tuple[dict[str, bool], dict[str, Any]]:
    """The quantised modules that a configuration names, and the configuration without that block. Other quantisations stay in
    it. Raises ValueError if the block is not as `block` makes it."""
    found = raw.get(_BLOCK)
    if not isinstance(found, dict) or found.get("quant_method") != _METHOD:
        return {}, raw
    modules = found.get("modules")
    if found.get("version") != _VERSION:
        raise ValueError(
            f"{file}: {_BLOCK} has version {found.get('version')!r}; this pyfused reads version {_VERSION}"
        )
    if (
        not isinstance(modules, dict)
        or not modules
        or not all(isinstance(dynamic, bool) for dynamic in modules.values())
    ):
        raise ValueError(
            f"{file}: {_BLOCK} must map names of modules to true or false, but modules is {modules!r:.100}"
        )
    return modules, {name: value for name, value in raw.items() if name != _BLOCK}


def int8_plan(plan: Plan, modules: Mapping[str, bool]) -> Plan:
    """The plan with the weights of these modules in int8, each with a scale."""
    result: Plan = {}
    for ours, target in plan.items():
        module, _, kind = ours.rpartition(".")
        if kind == "reverse_weight":  # a quantised table has its own output matrix in a module
            module = f"{module}.reverse"
        if module not in modules or kind == "bias":
            result[ours] = target
            continue
        width = math.prod(target.shape[1:])
        scales = tuple(
            Piece(f"{piece.name}_scale", (math.prod(piece.shape) // width,), dtype=torch.float32)
            for piece in target.pieces
        )
        pieces = tuple(replace(piece, dtype=torch.int8) for piece in target.pieces)
        result |= {
            f"{module}.weight": Target(target.shape, pieces),
            f"{module}.scale": Target(target.shape[:1], scales),
        }
    return result


def without_prefix(entries: dict[str, Entry], maps: ModuleType) -> dict[str, Entry]:
    """A file's tensors without the prefix that pyfused saves."""
    return {name.removeprefix(maps.HF_SAVED_PREFIX): entry for name, entry in entries.items()}
