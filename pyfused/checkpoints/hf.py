"""What does a directory in Hugging Face format hold: its configuration and the place of every tensor?

Weights are read from safetensors alone: ``model.safetensors``, or shards listed by ``model.safetensors.index.json``.
The header is parsed here, with every offset checked, so that no byte outside the file's data can be asked for.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from pyfused.checkpoints.files import read_json, reject_duplicates, shard_path
from pyfused.checkpoints.storage import Entry, same_values

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64, "BOOL": torch.bool,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
}  # fmt: skip

# Beginnings of class names, for configurations without model_type
_CLASSES = {"GPT2": "gpt2", "Albert": "albert", "T5": "t5", "FNet": "fnet"}

_LARGEST_HEADER = 100_000_000  # the limit of the safetensors library itself


def is_hf(config: dict[str, Any]) -> bool:
    """Whether a config.json is Hugging Face's."""
    return "model_type" in config or "architectures" in config


def model_type(config: dict[str, Any], file: Path) -> str:
    """The model's name, from ``model_type`` or, in configurations older than that key, from ``architectures``."""
    name = config.get("model_type")
    if name is None:
        classes = config.get("architectures")
        first = classes[0] if isinstance(classes, list) and classes and isinstance(classes[0], str) else ""
        name = next((model for prefix, model in _CLASSES.items() if first.startswith(prefix)), None)
    if not isinstance(name, str):
        raise ValueError(f"{file}: model_type is {name!r}; it takes the name of a model")
    return name


def weight_files(directory: Path) -> list[Path]:
    """The files that hold weights, the whole one before shards. Raises ValueError when there are none to be read."""
    if (directory / WHOLE).is_file():
        return [directory / WHOLE]
    if (directory / INDEX).is_file():
        index = directory / INDEX
        return [shard_path(index, name, ".safetensors") for name in dict.fromkeys(_weight_map(index).values())]
    pickled = sorted(path.name for path in directory.glob("*.bin") if path.name.startswith("pytorch_model"))
    if pickled:
        raise ValueError(
            f"{directory / pickled[0]}: a pickled file can run any code when it is read, so only safetensors are read; "
            f"convert it once where you trust it: transformers' from_pretrained, then save_pretrained"
        )
    raise ValueError(f"{directory}: no weights found; looked for {WHOLE} and {INDEX}")


def read_entries(directory: Path) -> dict[str, Entry]:
    """Every tensor of the directory's weight files by its name there; shards must hold what their index says."""
    files = weight_files(directory)
    if files[0].name == WHOLE:
        return read_header(files[0])
    index = directory / INDEX
    weight_map = _weight_map(index)
    entries: dict[str, Entry] = {}
    for path in files:
        for name, entry in read_header(path).items():
            if weight_map.get(name) != path.name:
                raise ValueError(f"{entry} is here, but {index.name} says {weight_map.get(name)!r}")
            entries[name] = entry
    for name, shard in weight_map.items():
        if name not in entries:
            raise ValueError(f"{directory / shard}: tensor {name!r} is missing, although {index.name} says it is here")
    return entries


def select(entries: dict[str, Entry], prefix: str, ignored: Iterable[str]) -> dict[str, Entry]:
    """Strips the head model's ``prefix`` and drops tensors whose stripped name a pattern of ``ignored`` matches."""
    patterns = [re.compile(pattern) for pattern in ignored]
    result: dict[str, Entry] = {}
    for name, entry in entries.items():
        short = name.removeprefix(prefix)
        if any(pattern.fullmatch(short) for pattern in patterns):
            continue
        if short in result:
            raise ValueError(f"{entry} and tensor {result[short].name!r} are the same weight under two names")
        result[short] = entry
    return result


def settle_head(
    config: dict[str, Any], entries: dict[str, Entry], head_name: str, embedding_name: str
) -> tuple[dict[str, Any], dict[str, Entry]]:
    """Decides from the files whether the output matrix is the token embedding, and drops a redundant head.

    Files of a model without a head have none whatever the configuration says. Where the configuration ties but the file
    holds two different matrices, the file is right, as it is for transformers; that is worth a warning, unless the
    configuration says (T5's does) that the logits are not scaled, which only models with a head of their own want.
    """
    head, embedding = entries.get(head_name), entries.get(embedding_name)
    untied = head is not None and not config["tie_embedding_weights"]
    if head is not None and embedding is not None and not untied:
        untied = not same_values(head, embedding)
        if untied and config.get("scale_logits", True):
            warnings.warn(
                f"{head} differs from {embedding.name!r} although the configuration ties them; it is used", stacklevel=5
            )
    if not untied:
        entries = {name: entry for name, entry in entries.items() if name != head_name}
    return config | {"tie_embedding_weights": not untied}, entries


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file. Raises ValueError naming the file, and the tensor if it is one's fault."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(_LARGEST_HEADER, size - 8):
                raise ValueError(
                    f"the header would have {length} bytes, the file has {size}; it is damaged or truncated"
                )
            header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=reject_duplicates)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as safetensors: {error}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path}: cannot be read as safetensors: the header is no JSON object")
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, fields, 8 + length, size) for name, fields in header.items()}
    end = 8 + length
    for entry in sorted(entries.values(), key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset != end:
            raise ValueError(
                f"{entry} begins at byte {entry.offset}, the one before it ends at {end}: bytes overlap or lie bare"
            )
        end = entry.offset + entry.nbytes
    if end != size:
        raise ValueError(f"{path}: the tensors end at byte {end}, but the file has {size} bytes")
    return entries


def _entry(path: Path, name: str, fields: Any, data: int, size: int) -> Entry:
    where = f"{path}: tensor {name!r}"
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where}: the header must give dtype, shape and data_offsets, and gives {fields!r:.200}")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{where}: dtype {dtype!r:.50} is not one of {', '.join(DTYPES)}")
    for what, numbers in (("shape", shape), ("data_offsets", offsets)):
        if (
            not isinstance(numbers, list)
            or len(numbers) > 8
            or not all(type(n) is int and 0 <= n < 2**63 for n in numbers)
        ):
            raise ValueError(f"{where}: {what} {numbers!r:.200} is not a short list of sizes")
    if len(offsets) != 2:
        raise ValueError(f"{where}: data_offsets {offsets!r} must be a begin and an end")
    begin, end = offsets
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != nbytes:
        raise ValueError(
            f"{where}: {dtype} of shape {tuple(shape)} takes {nbytes} bytes, not those of data_offsets {offsets!r}"
        )
    if data + end > size:
        raise ValueError(f"{where} ends at byte {data + end}, but the file has {size} bytes: it is truncated")
    return Entry(name, path, data + begin, DTYPES[dtype], tuple(shape))


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map must map every tensor to its shard, and is {weight_map!r:.100}")
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise ValueError(f"{index}: tensor {name!r}: the shard is {shard!r:.100}, not a file name")
    return weight_map
