"""What is in a preset's directory, under pyfused's names, and how does a module get it?

`open_checkpoint` reads the configuration and the headers of the weight files, and raises an error if they do not fit. It
reads no weights. `Checkpoint` then streams the tensors or copies them into a module.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyfused.checkpoints import hf, keras, progress
from pyfused.checkpoints.diagnose import error_answer, no_configuration
from pyfused.checkpoints.files import read_json
from pyfused.checkpoints.integers import Modules, integer_modules, integer_plan, variant, without_prefix
from pyfused.checkpoints.layer_plans import hf_plan, keras_plan
from pyfused.checkpoints.names import check_prefix, find, note_others
from pyfused.checkpoints.parts import fill_part, whole_shape
from pyfused.checkpoints.plan import Plan, check_plan, fill, missing_from
from pyfused.checkpoints.presets import published_config, resolve_preset
from pyfused.checkpoints.storage import FLOATS, Entry, open_files
from pyfused.evidence import name_of
from pyfused.families import FAMILIES, load, of_hf_type
from pyfused.spread import is_spread

_CONFIG = "config.json"
_MOST_LAYERS = 1000  # 48 in the largest model here; a configuration alone may state any number


@dataclass(frozen=True)
class Checkpoint:
    """An opened preset: its model, the constructor arguments and the place of its weights.

    model: the family's name, such as "gpt2".
    config: the backbone's constructor arguments, without dtype.
    directory: the folder of its files; for a published name without its weights, which needs no files, that name.
    integers: the modules whose weights it holds in int8 or int4, as pyfused.quantize_ makes them.
    """

    model: str
    config: dict[str, Any]
    directory: Path
    _stated_dtype: Any = field(repr=False)
    _plan: Plan | None = field(repr=False)
    _entries: Mapping[str, Entry] = field(repr=False)
    integers: Modules = field(default_factory=dict)

    @property
    def is_keras(self) -> bool:
        """Whether its files have Keras's format; else they have Hugging Face's."""
        return bool(self._stated_dtype[0] == "keras")

    @property
    def dtype(self) -> torch.dtype:
        """The configuration's dtype, or else the tensors' dtype. Raises ValueError if they have several."""
        file = self.directory / _CONFIG
        kind, stated = self._stated_dtype
        if kind == "keras" and stated is not None:
            return keras.policy_dtypes(stated, file)[0]
        if stated is not None:
            name = stated.removeprefix("torch.") if isinstance(stated, str) else stated
            for dtype in FLOATS:
                if name == name_of(dtype):
                    return dtype
            raise ValueError(f"{file}: dtype is {stated!r}; pass dtype= one of {_names()}")
        found = {entry.dtype for entry in self._entries.values()}
        if len(found) > 1:
            raise ValueError(f"{file} states no dtype and the tensors have {_names(found)}; pass dtype=")
        return found.pop() if found else torch.float32

    @property
    def variant(self) -> str:
        """The narrowest integers that hold its weights, "int8" or "int4"; "" if all are in floating point."""
        return variant(self.integers)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the computation. It differs from `dtype` only under a mixed Keras policy."""
        kind, stated = self._stated_dtype
        if kind == "keras" and stated is not None:
            return keras.policy_dtypes(stated, self.directory / _CONFIG)[1]
        return self.dtype

    def config_with(self, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """The constructor arguments, some of them replaced. KerasHub's T5 has one argument for the layers of both stacks: so an
        argument that only pyfused has follows the one that it is equal to."""
        follows = getattr(load(FAMILIES[self.model].checkpoint), "FOLLOWS", {})
        led = {
            name: overrides[leader]
            for name, leader in follows.items()
            if leader in overrides and self.config[name] == self.config[leader]
        }
        return self.config | led | dict(overrides)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor by its pyfused name."""
        return {name: target.shape for name, target in self._weights().items()}

    def tensors(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields one (pyfused name, CPU tensor) at a time, in ``dtype`` or the checkpoint's own. Integer weights and
        their scales stay as they are."""
        read = self.reader(dtype)
        for name in self._weights():
            yield name, read(name)

    def reader(self, dtype: torch.dtype | None = None) -> Callable[[str], torch.Tensor]:
        """A function that reads one tensor by its pyfused name, as `tensors` does."""
        plan, dtype = self._weights(), dtype or self.dtype
        files = open_files(list(self._entries.values()))

        def read(name: str) -> torch.Tensor:
            tensor = torch.empty(plan[name].shape, dtype=plan[name].dtype or dtype, device="cpu")
            fill(tensor, plan[name], self._entries, files)
            return tensor

        return read

    def check_module(self, module: nn.Module) -> None:
        """Raises ValueError unless the module's state dict has the checkpoint's names and shapes."""
        shapes = self.shapes
        own = {name: whole_shape(t, _packed(module, name)) for name, t in module.state_dict().items()}
        kind = type(module).__name__
        for name in sorted(own.keys() | shapes.keys()):
            if name not in own:
                raise ValueError(f"{self.directory}: tensor {name!r} has no place in this {kind}")
            if name not in shapes:
                raise ValueError(f"{self.directory}: tensor {name!r}, which this {kind} has, is not in the checkpoint")
            if own[name] != shapes[name]:
                raise ValueError(
                    f"{self.directory}: tensor {name!r} has shape {shapes[name]}, this {kind} takes {own[name]}"
                )

    @torch.no_grad()
    def load_into(self, module: nn.Module) -> None:
        """Copies every tensor into the module's parameters, keeping their dtypes and devices.

        Of a DTensor (parallelize_module, fully_shard) this rank's part alone is read and filled.
        Peak memory is the module plus a few MB. Raises ValueError if names, shapes or files do not fit, or if a parameter
        has no memory yet (meta device). The module is then unchanged.
        """
        self.check_module(module)
        state = module.state_dict()
        for name, tensor in state.items():
            if tensor.is_meta:
                raise ValueError(
                    f"module: {name} is on the meta device; give it memory first, with to_empty(device=...)"
                )
            if not tensor.is_contiguous() or tensor.dtype not in (self._weights()[name].dtype, *FLOATS):
                raise ValueError(
                    f"module: {name} must be a contiguous floating-point tensor, got strides {tensor.stride()}, "
                    f"{tensor.dtype}"
                )
        files = open_files(list(self._entries.values()))
        with progress.loading(self.directory.name, sum(tensor.nbytes for tensor in state.values())) as advance:
            for name, target in self._weights().items():
                if is_spread(state[name]):
                    fill_part(state[name], _packed(module, name), target, self._entries, files)
                else:
                    fill(state[name], target, self._entries, files)
                advance(state[name].nbytes)

    def _weights(self) -> Plan:
        if self._plan is None:
            raise ValueError(f"{self.directory}: opened without its weights (weights=False)")
        return self._plan


def open_checkpoint(preset: str | os.PathLike[str], *, weights: bool = True) -> Checkpoint:
    """Finds a preset (see `resolve_preset`), reads its configuration and checks the headers of its weight files.

    weights=False downloads and reads only the configuration; there need be no weight file. A published name needs no download
    for that: pyfused knows its configuration.
    Raises ValueError if something is missing, damaged, unknown or does not fit; the message names the file and the option
    or tensor. Raises ImportError if a source or a format needs a package that is not installed.
    """
    if not weights and (known := published_config(preset)) is not None:
        family, options = known
        place = Path(preset)
        config = load(family.checkpoint).config_from_keras(options, place)
        return Checkpoint(family.name, config, place, ("keras", None), None, {})
    directory = resolve_preset(preset, "weights" if weights else "config")
    file = directory / _CONFIG
    if not file.is_file():
        raise ValueError(f"{directory}: not a preset, it has no {_CONFIG}{no_configuration(directory)}")
    raw = read_json(file)
    if keras.is_keras(raw):
        return _open_keras(directory, file, raw, weights)
    if hf.model_type(raw) is not None:
        return _open_hf(directory, file, raw, weights)
    raise ValueError(
        f"{file}: neither a Hugging Face configuration (model_type) nor a Keras one (class_name){error_answer(raw)}"
    )


def _open_hf(directory: Path, file: Path, raw: dict[str, Any], weights: bool) -> Checkpoint:
    stated = hf.model_type(raw)
    family = of_hf_type(stated)
    if family is None:
        why = next((f": {f.refused[stated]}" for f in FAMILIES.values() if stated in list(f.refused)), "")
        known = ", ".join(name for f in FAMILIES.values() for name in f.hf_types)
        raise ValueError(f"{file}: model_type is {stated!r}; pyfused reads {known}{why}")
    model, maps = family.name, load(family.checkpoint)
    integers, raw = integer_modules(raw, file)
    config = maps.config_from_hf(raw, file)
    hf.note_class(raw, file)
    _check_layers(config, file)
    dtypes = [raw[key] for key in ("dtype", "torch_dtype") if raw.get(key) not in (None, "auto")]
    dtype = ("hf", dtypes[0] if dtypes else None)
    if not weights:
        return Checkpoint(model, config, directory, dtype, None, {}, integers)
    stored = hf.read_entries(directory)
    files = list(dict.fromkeys(entry.file for entry in stored.values())) or hf.weight_files(directory)
    _check_depth(maps, config, len(stored), file, files)
    if integers:
        config, stored = maps.settle(config, without_prefix(stored, maps))
        plan = integer_plan(hf_plan(maps, config), integers, file)
        check_plan(plan, stored, files, file)
        return Checkpoint(model, config, directory, dtype, plan, stored, integers)
    found = find(stored, hf_plan(maps, config | {"tie_embedding_weights": False}), maps)
    config, entries = maps.settle(config, found.entries)
    plan = hf_plan(maps, config)
    check_prefix(found, missing_from(plan, entries), files)
    check_plan(plan, entries, files, file)
    note_others(found, directory)
    return Checkpoint(model, config, directory, dtype, plan, entries)


def _open_keras(directory: Path, file: Path, raw: dict[str, Any], weights: bool) -> Checkpoint:
    name = keras.class_name(raw, file)
    by_class = {f"{family.keras_name}Backbone": family for family in FAMILIES.values()}
    if name not in by_class:
        raise ValueError(f"{file}: the class is {name!r}; pyfused reads {', '.join(by_class)}")
    model, maps = by_class[name].name, load(by_class[name].checkpoint)
    options = raw.get("config")
    if not isinstance(options, dict):
        raise ValueError(f"{file}: config is {options!r:.100}; it takes the backbone's constructor arguments")
    config = maps.config_from_keras(options, file)
    _check_layers(config, file)
    dtype = ("keras", options.get("dtype"))
    if not weights:
        return Checkpoint(model, config, directory, dtype, None, {})
    entries, files = keras.read_entries(directory), keras.weight_files(directory)
    _check_depth(maps, config, len(entries), file, files)
    plan = keras_plan(maps, config)
    check_plan(plan, entries, files, file)
    return Checkpoint(model, config, directory, dtype, plan, entries)


def _check_layers(config: dict[str, Any], where: Path) -> None:
    for name in ("num_layers", "num_decoder_layers", "num_groups", "num_inner_repetitions"):
        if (config.get(name) or 0) > _MOST_LAYERS:
            raise ValueError(
                f"{where}: {name} is {config[name]}; pyfused makes models of at most {_MOST_LAYERS} layers"
            )


def _check_depth(maps: Any, config: dict[str, Any], held: int, where: Path, files: list[Path]) -> None:
    """Raises ValueError if there are more layers than tensors. A plan for a billion layers would fill the memory."""
    layers = sum(config[name] or 0 for name in maps.DEPTHS)
    if layers > held:
        raise ValueError(f"{where}: calls for {layers} layers, but {files[0]} and its shards hold {held} tensors")


def _packed(module: nn.Module, name: str) -> tuple[int, int]:
    """The parts and heads of a projection that is spread by heads; (1, 1) for all other tensors."""
    found: Any = getattr(module.get_submodule(name.rpartition(".")[0]), "packed", (1, 1))
    return found


def _names(dtypes: Any = FLOATS) -> str:
    return ", ".join(sorted(map(name_of, dtypes)))
