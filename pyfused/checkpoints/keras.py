"""What does a directory in Keras format hold: its configuration and the place of every variable?

Variables are read from ``model.weights.h5``, or from shards listed by ``model.weights.json``. h5py only parses the structure.
Each variable's values are one contiguous block, mapped like any other weight file. Links, external or virtual data and
compression are refused: Keras does not use them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pyfused.checkpoints.diagnose import looks_like, other_weights
from pyfused.checkpoints.files import note, read_json, shard_path
from pyfused.checkpoints.storage import Entry, check_inside

WHOLE, INDEX = "model.weights.h5", "model.weights.json"

_DTYPES = {"<f4": torch.float32, "<f2": torch.float16, "<f8": torch.float64}
_POLICIES = {name: (getattr(torch, name),) * 2 for name in ("float32", "bfloat16", "float16", "float64")} | {
    f"mixed_{name}": (torch.float32, getattr(torch, name)) for name in ("float16", "bfloat16")
}

# State that Keras stores beside the weights; no forward pass reads it
_IGNORED = re.compile(r"optimizer/.*|(.*/)?seed_generator/vars/\d+")

_OBJECT_KEYS = {"module", "class_name", "config", "registered_name", "build_config", "compile_config", "name", "assets",
                "weights", "shared_object_id"}  # fmt: skip

_MAX_DEPTH = 16  # of nested groups; a backbone has 5


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
    for path in files:
        for entry in _read_file(path):
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


def _read_file(path: Path) -> Iterator[Entry]:
    """The variables of one h5 file, in the file's order. Every error of h5py becomes a ValueError naming the file."""
    try:
        import h5py
    except ImportError as error:
        raise ImportError(f"{path}: Keras weights need h5py: pip install 'pyfused[keras]'") from error
    try:
        size = path.stat().st_size
        with h5py.File(path, "r", locking=False) as file:
            yield from list(_walk(h5py, file, "", path, size, {h5py.h5o.get_info(file.id).addr}, 0))
    except _Refused as error:
        raise ValueError(str(error)) from None
    except (OSError, RuntimeError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as an h5 file: {error}{looks_like(path)}") from error


class _Refused(Exception):
    """An error of this file's own, with a complete message. h5py's errors get the file's name added."""


def _walk(h5py: Any, group: Any, prefix: str, path: Path, size: int, seen: set[int], depth: int) -> Iterator[Entry]:
    if depth > _MAX_DEPTH:
        raise _Refused(f"{path}: group {prefix!r} lies more than {_MAX_DEPTH} groups deep")
    for key in group:
        name = f"{prefix}{key}"
        link = group.get(key, getlink=True)
        if not isinstance(link, h5py.HardLink):
            raise _Refused(f"{path}: tensor {name!r} is a {type(link).__name__}; links are not followed")
        child = group[key]
        address = h5py.h5o.get_info(child.id).addr
        if address in seen:
            raise _Refused(f"{path}: tensor {name!r} is an object that the file also holds under another name")
        seen.add(address)
        if isinstance(child, h5py.Group):
            yield from _walk(h5py, child, f"{name}/", path, size, seen, depth + 1)
        elif isinstance(child, h5py.Dataset):
            yield _entry(h5py, child, name, path, size)
        else:
            raise _Refused(f"{path}: tensor {name!r} is a {type(child).__name__}, neither group nor dataset")


def _entry(h5py: Any, dataset: Any, name: str, path: Path, size: int) -> Entry:
    where = f"{path}: tensor {name!r}"
    layout = dataset.id.get_create_plist()
    if dataset.shape is None or layout.get_layout() != h5py.h5d.CONTIGUOUS or layout.get_external_count():
        raise _Refused(
            f"{where} is not one plain block of this file (chunked, compressed, virtual or external); save it again"
        )
    dtype = _DTYPES.get(dataset.dtype.str)
    if dataset.dtype.str == "|V2":
        tag = dataset.attrs.get("dtype")
        dtype = torch.bfloat16 if tag in ("bfloat16", b"bfloat16") else None
    elif dataset.dtype.kind in "iub" and dataset.dtype.byteorder != ">":
        # Counters and seeds. If the model needs this variable as a weight, check_plan refuses its dtype
        dtype = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dataset.dtype.itemsize]
    if dtype is None:
        raise _Refused(f"{where} has dtype {dataset.dtype.str}; pyfused reads {', '.join(_DTYPES)}, and |V2 marked bfloat16")
    offset = dataset.id.get_offset()
    entry = Entry(name, path, -1 if offset is None else offset, dtype, tuple(dataset.shape))
    if entry.nbytes and (offset is None or dataset.id.get_storage_size() != entry.nbytes):
        raise _Refused(f"{where} of shape {entry.shape} was never written")
    try:
        check_inside(entry, size)
    except ValueError as error:
        raise _Refused(str(error)) from None
    return entry
