"""What does a directory in Keras format hold: its configuration and the place of every variable?

Variables are read from ``model.weights.h5``, or from shards listed by ``model.weights.json``. Where each one lies is
found apart, by apart/h5.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from pyfused.checkpoints.apart import read_apart
from pyfused.checkpoints.diagnose import other_weights
from pyfused.checkpoints.files import note, read_json, shard_path
from pyfused.checkpoints.storage import Entry

WHOLE, INDEX = "model.weights.h5", "model.weights.json"

_POLICIES = {name: (getattr(torch, name),) * 2 for name in ("float32", "bfloat16", "float16", "float64")} | {
    f"mixed_{name}": (torch.float32, getattr(torch, name)) for name in ("float16", "bfloat16")
}

# State that Keras stores beside the weights; no forward pass reads it
_IGNORED = re.compile(r"optimizer/.*|(.*/)?seed_generator/vars/\d+")

_OBJECT_KEYS = {"module", "class_name", "config", "registered_name", "build_config", "compile_config", "name", "assets",
                "weights", "shared_object_id"}  # fmt: skip


def is_keras(config: dict[str, Any]) -> bool:
    """Whether a config.json is a serialised Keras object."""
    return "class_name" in config or "registered_name" in config


def class_name(config: dict[str, Any], file: Path) -> str:
    """The name of the backbone's class, from KerasHub or KerasNLP (its name until 2024)."""
    registered = config.get("registered_name")
    name = config.get("class_name")
    if registered not in (f"keras_hub>{name}", f"keras_nlp>{name}"):
        raise ValueError(
            f"{file}: the class is {name!r}, registered as {registered!r}; expected a backbone of keras_hub>"
        )
    if unknown := sorted(set(config) - _OBJECT_KEYS):
        keys = ", ".join(unknown)
        note(f"{file}: pyfused does not know these keys beside the object's config and leaves them unread: {keys}")
    return str(name)


def policy_dtypes(policy: object, file: Path) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes of a Keras policy: of the variables, and of the computation. Raises ValueError for a quantised policy."""
    name: Any = policy
    kind: Any = "DTypePolicy"
    if isinstance(policy, dict):
        kind = policy.get("class_name")
        config = policy.get("config")
        name = config.get("name") if isinstance(config, dict) else None
    if kind == "DTypePolicy" and isinstance(name, str) and name in _POLICIES:
        return _POLICIES[name]
    raise ValueError(
        f"{file}: the dtype policy {kind} {name!r} is not one dtype for every layer (quantised, or a map); "
        f"pass dtype= one of {', '.join(_POLICIES)}"
    )


def weight_files(directory: Path) -> list[Path]:
    """The weight files: the one whole file, or else the shards. Raises ValueError if there are none."""
    if (directory / WHOLE).is_file():
        return [directory / WHOLE]
    if (directory / INDEX).is_file():
        index = directory / INDEX
        shards = dict.fromkeys(shard for shards in _weight_map(index).values() for shard in shards)
        return [shard_path(index, shard, ".weights.h5") for shard in shards]
    raise ValueError(f"{directory}: no weights found; looked for {WHOLE} and {INDEX}{other_weights(directory)}")


def read_entries(directory: Path) -> dict[str, Entry]:
    """Every variable by its path in today's Keras, ``layers/.../vars/<i>``. Older files may use other paths."""
    files = weight_files(directory)
    weight_map = None if files[0].name == WHOLE else _weight_map(directory / INDEX)
    entries: dict[str, Entry] = {}
    held: set[tuple[str, str]] = set()
    for path, held_there in read_apart("h5", files).items():
        for entry in held_there:
            group = "/" + entry.name.rpartition("/")[0]
            held.add((group, path.name))
            if weight_map is not None and path.name not in weight_map.get(group, ()):
                raise ValueError(f"{entry} is here, but {INDEX} says {weight_map.get(group)}")
            name = _present_name(entry.name)
            if _IGNORED.fullmatch(name):
                continue
            if name in entries:
                raise ValueError(f"{entry} and {entries[name]} are the same variable twice")
            entries[name] = entry
    for group, shards in (weight_map or {}).items():
        for shard in shards:
            if (group, shard) not in held:
                raise ValueError(f"{directory / shard}: tensor {group!r} is missing, although {INDEX} says it is here")
    return entries


def _present_name(name: str) -> str:
    """A variable's path in today's Keras. tf.keras 2.13 named ``layers`` differently, and attention's projections used to
    begin with an underscore. (FNet's feed-forward network still has an _output_dense.)"""
    if name.startswith("_layer_checkpoint_dependencies/"):
        name = name.replace("_layer_checkpoint_dependencies", "layers", 1)
    return re.sub(r"attention_layer/_(query|key|value|output)_dense/", r"attention_layer/\1_dense/", name)


def _weight_map(index: Path) -> dict[str, list[str]]:
    """Group path to shard names: Keras writes one name, or a list when a layer's variables span shards."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map must map every group to its shards, but is {weight_map!r:.100}")
    result = {}
    for group, shards in weight_map.items():
        result[group] = [shards] if isinstance(shards, str) else shards
        if not isinstance(result[group], list) or not all(isinstance(shard, str) for shard in result[group]):
            raise ValueError(f"{index}: tensor {group!r}: the shards are {shards!r:.100}, not file names")
    return result
