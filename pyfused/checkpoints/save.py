"""How is a model saved, and a checkpoint converted, so that transformers, KerasHub and pyfused can load it?

Configuration, weights and the tokeniser's files go into one directory, all at once (replace.py). What the format cannot express
is refused by name before anything is written.
"""

from __future__ import annotations

import datetime
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from pyfused.checkpoints import hf_write, keras_write
from pyfused.checkpoints.checkpoint import open_checkpoint
from pyfused.checkpoints.files import json_bytes, read_json
from pyfused.checkpoints.integers import Modules, block, integer_plan, modules_of, variant
from pyfused.checkpoints.layer_plans import hf_plan, keras_plan
from pyfused.checkpoints.plan import Plan
from pyfused.checkpoints.presets import resolve_preset
from pyfused.checkpoints.replace import replacing
from pyfused.checkpoints.storage import FLOATS
from pyfused.checkpoints.stored import Stored, shard_bytes, stored_tensors, write_file
from pyfused.checkpoints.tokenizer_save import tokenizer_files
from pyfused.evidence import name_of
from pyfused.families import FAMILIES, Family, family_of, load
from pyfused.spread import is_spread

Format = Literal["hf", "keras"]
TokenizerSource = Any  # a preset, a Tokenizer, which has its directory, False or None

_LARGEST_SHARD = "10GB"
_KERAS, _KERAS_HUB = "3.15.1", "0.32.0"  # the versions whose layout is written
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id")


@dataclass(frozen=True)
class _Content:
    """What is to be saved: the backbone's arguments, and a function that gives a tensor by its pyfused name.

    dtype: of all weights in floating point. policy: Keras's name for it, which may be a mixed policy.
    directory: of the preset that it came from, if there is one.
    shapes: of the model's tensors, which its user may have changed; empty for a checkpoint, which is checked when it is opened.
    """

    family: Family
    config: dict[str, Any]
    dtype: torch.dtype
    policy: str
    read: Callable[[str], torch.Tensor]
    directory: Path | None
    integers: Modules = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def save_to_preset(
    model: nn.Module,
    directory: str | os.PathLike[str],
    format: Format = "hf",
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = _LARGEST_SHARD,
    tokenizer: TokenizerSource = None,
) -> None:
    """Writes a pyfused backbone; see `pyfused.Backbone.save_to_preset`, which takes names of dtypes too."""
    family = family_of(type(model))
    backbone: Any = model
    config = backbone.get_config()
    state, integers = model.state_dict(), modules_of(model)
    maps = load(family.checkpoint)
    _check_state(state, hf_plan(maps, maps.DEFAULTS | config), integers)
    if integers and (format == "keras" or dtype is not None):
        got, takes = (f"format is {format!r}", "'hf'") if format == "keras" else (f"dtype is {dtype}", "None")
        raise ValueError(
            f"{got}; the weights are {variant(integers)}, for which it takes {takes}; call unquantize_ to save them otherwise"
        )
    own = {tensor.dtype for name, tensor in state.items() if tensor.dtype in FLOATS and not name.endswith(".scale")}
    if dtype is None and len(own) > 1:
        raise ValueError(f"model: its tensors have {sorted(map(str, own))}; pass dtype= to save them in one")
    policy = config["dtype"] if dtype is None else name_of(dtype)
    came_from = getattr(model, "preset_directory", None)
    kept = dtype or _stored_dtype(own, config)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    content = _Content(family, config, kept, policy, state.__getitem__, came_from, integers, shapes)
    _save(content, directory, format, max_shard_size, tokenizer)


def save_hf(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """`save_to_preset` in Hugging Face's format."""
    save_to_preset(model, directory)


def convert(
    preset: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    format: Format,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = _LARGEST_SHARD,
    tokenizer: TokenizerSource = None,
) -> list[str]:
    """Writes a preset in another format, dtype or size of shards, without making the model: one tensor is in memory at a time.

    preset: see `resolve_preset`. The other arguments, and what is raised: see `pyfused.Backbone.save_to_preset`. A head's
    tensors are left out, with a warning. Returns the names of the files.
    """
    checkpoint = open_checkpoint(preset)
    if checkpoint.integers:
        why = f"the weights are {checkpoint.variant}; convert the preset that they were made from"
        raise ValueError(f"{checkpoint.directory}: {why}")
    kept = checkpoint.dtype if dtype is None else dtype
    mixed = dtype is None and checkpoint.compute_dtype != checkpoint.dtype
    content = _Content(
        FAMILIES[checkpoint.model],
        checkpoint.config,
        kept,
        f"mixed_{name_of(checkpoint.compute_dtype)}" if mixed else name_of(kept),
        _remembering(checkpoint.reader(kept)),
        checkpoint.directory,
    )
    return _save(content, directory, format, max_shard_size, tokenizer)


def _save(
    content: _Content, directory: str | os.PathLike[str], format: Format, most: int | str, tokenizer: TokenizerSource
) -> list[str]:
    if format not in ("hf", "keras"):
        raise ValueError(f"format is {format!r}; it takes 'hf' or 'keras'")
    if not isinstance(directory, str | os.PathLike) or not str(directory):
        raise TypeError(f"directory is {directory!r}; it takes a path")
    most = shard_bytes(most)
    if format == "keras":
        _import_h5py()
    files = _tokenizer_files(content, format, tokenizer)
    files |= (_hf_files if format == "hf" else _keras_files)(content)
    tensors = _stored(content, format)
    with replacing(Path(directory)) as folder:
        if format == "keras":
            keras_write.write_weights(folder, tensors, most)
        else:
            hf_write.write_weights(folder, tensors, most, variant(content.integers))
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_file(folder / name, text)
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _stored(content: _Content, format: Format) -> list[Stored]:
    """The tensors by their names in the files."""
    maps = load(content.family.checkpoint)
    config = maps.DEFAULTS | content.config
    plan = keras_plan(maps, config) if format == "keras" else integer_plan(hf_plan(maps, config), content.integers)
    for name, shape in content.shapes.items():
        if shape != plan[name].shape:
            raise ValueError(f"model: {name} has shape {shape}, but its configuration calls for {plan[name].shape}")
    found = stored_tensors(plan, content.read, content.dtype)
    if format == "keras":
        return found
    # The head stands beside the model that the prefix names
    heads = () if maps.HF_HEAD is None else (maps.HF_HEAD, f"{maps.HF_HEAD}_scale")
    return [tensor if tensor.name in heads else tensor.renamed(maps.HF_SAVED_PREFIX + tensor.name) for tensor in found]


def _hf_files(content: _Content) -> dict[str, bytes]:
    described = load(content.family.checkpoint).config_to_hf(content.config, name_of(content.dtype))
    described |= block(content.integers)
    path = content.directory / "config.json" if content.directory is not None else None
    if path is not None and path.is_file() and "model_type" in (raw := read_json(path)):
        described |= {name: raw[name] for name in _SPECIAL if name in raw}  # the tokeniser's, no part of a backbone
    return {"config.json": json_bytes(described, sort_keys=True)}


def _keras_files(content: _Content) -> dict[str, bytes]:
    family, maps = content.family, load(content.family.checkpoint)
    arguments = maps.config_to_keras(content.config)
    policy = {
        "module": "keras",
        "class_name": "DTypePolicy",
        "config": {"name": content.policy},
        "registered_name": None,
    }
    own = {
        "name": content.config.get("name") or f"{family.kaggle_name}_backbone",
        "trainable": content.config.get("trainable", True),
        "dtype": policy,
    }
    described = {
        "module": f"keras_hub.src.models.{family.kaggle_name}.{family.kaggle_name}_backbone",
        "class_name": f"{family.keras_name}Backbone",
        "config": own | arguments,
        "registered_name": f"keras_hub>{family.keras_name}Backbone",
    }
    plan = keras_plan(maps, maps.DEFAULTS | content.config)
    metadata = {
        "keras_version": _KERAS,
        "keras_hub_version": _KERAS_HUB,
        "parameter_count": sum(math.prod(target.shape) for target in plan.values()),
        "date_saved": datetime.datetime.now().strftime("%Y-%m-%d@%H:%M:%S"),
        "tasks": list(maps.KERAS_TASKS),
    }
    return {"config.json": json_bytes(described), "metadata.json": json_bytes(metadata)}


def _tokenizer_files(content: _Content, format: Format, tokenizer: TokenizerSource) -> dict[str, bytes]:
    if tokenizer is False:
        return {}
    if tokenizer is None:
        known = content.directory
        return tokenizer_files(known, format, content.family) if known is not None and known.is_dir() else {}
    given: Any = getattr(tokenizer, "directory", tokenizer)
    if not isinstance(given, str | os.PathLike):
        takes = "it takes a preset's name, a directory, a Tokenizer, False or None"
        raise TypeError(f"tokenizer is {tokenizer!r:.100}; {takes}")
    try:
        source = resolve_preset(given, "tokenizer")
    except ValueError as error:
        raise ValueError(f"tokenizer: {error}") from error
    found = tokenizer_files(source, format, content.family)
    if not found:
        raise ValueError(f"tokenizer: {source} has no tokeniser that can be saved with format={format!r}")
    return found


def _check_state(state: Mapping[str, torch.Tensor], plan: Plan, integers: Modules) -> None:
    plan = integer_plan(plan, integers)
    if differ := sorted(state.keys() ^ plan.keys()):
        raise ValueError(f"model: its tensors are not those of its configuration: {differ}")
    for name, tensor in state.items():
        if tensor.is_meta:
            raise ValueError(f"model: {name} is on the meta device and has no values")
        if is_spread(tensor):
            raise ValueError(f"model: {name} is spread over several processes; gather the model first")
        if tensor.dtype not in (plan[name].dtype, *FLOATS):
            raise ValueError(f"model: {name} is {tensor.dtype}; it takes a floating-point dtype")


def _stored_dtype(own: set[torch.dtype], config: dict[str, Any]) -> torch.dtype:
    """The one dtype of the parameters. A model of integer weights alone has none; then it is that of its results."""
    if own:
        return next(iter(own))
    dtype: torch.dtype = getattr(torch, config["dtype"])
    return dtype


def _remembering(read: Callable[[str], torch.Tensor]) -> Callable[[str], torch.Tensor]:
    """A reader that keeps the last tensor: the parts of one, such as query, key and value, are written one after the other."""
    last: dict[str, torch.Tensor] = {}

    def again(name: str) -> torch.Tensor:
        if name not in last:
            last.clear()
            last[name] = read(name)
        return last[name]

    return again


def _import_h5py() -> None:
    try:
        import h5py  # noqa: F401
    except ImportError as error:
        raise ImportError("format='keras' needs h5py: pip install 'pyfused[keras]'") from error
