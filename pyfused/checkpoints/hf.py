"""What does a directory in Hugging Face format hold: its configuration and the place of every tensor?

Weights are read from safetensors: ``model.safetensors``, or shards listed by ``model.safetensors.index.json``. The header is
parsed here and every offset checked, so no read can leave the file's data. Without safetensors, ``pytorch_model.bin`` and
its shards are read in the same way; where the tensors lie in those is found apart, by apart/pickled.py.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch

from pyfused.checkpoints.apart import read_apart
from pyfused.checkpoints.diagnose import looks_like, other_weights
from pyfused.checkpoints.files import note, read_json, reject_duplicates, shard_path
from pyfused.checkpoints.storage import LONGEST_NAME, MOST_TENSORS, Entry, Stamp, stamp_of
from pyfused.families import FAMILIES

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"

# (whole file, index of shards), the first choice first. A variant is what diffusers' pipelines hold, such as
# model.fp16.safetensors
_PLACES = (
    (WHOLE, INDEX), ("model.*.safetensors", "model.safetensors.index.*.json"),
    (PICKLED, PICKLED_INDEX), ("pytorch_model.*.bin", "pytorch_model.bin.index.*.json"),
)  # fmt: skip

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64, "BOOL": torch.bool,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
}  # fmt: skip

_TASKS = "PreTraining|MaskedLM|CausalLM|SequenceClassification|TokenClassification|QuestionAnswering|MultipleChoice|" \
    "NextSentencePrediction|ConditionalGeneration"  # fmt: skip

_LARGEST_HEADER = 2 << 20  # bytes; that of the largest model here has 0.1 MB


def model_type(config: dict[str, Any]) -> Any:
    """The configuration's ``model_type``. Older configurations have none: there it follows from ``architectures`` or from the
    options. None if the configuration is not Hugging Face's."""
    if (stated := config.get("model_type")) is not None:
        return stated
    first = class_name(config).removeprefix("TF").removeprefix("Flax")
    by_class = (model for prefix, model in _classes().items() if first.startswith(prefix))
    by_options = (family.name for family in FAMILIES.values() if family.hf_options <= config.keys())
    return next(by_class, None) or next(by_options, None)


def _classes() -> dict[str, str]:
    """The beginning of transformers' class names -> the model_type of these classes."""
    return {prefix: model for family in FAMILIES.values() for prefix, model in family.hf_classes.items()}


def class_name(config: dict[str, Any]) -> str:
    """The first of ``architectures``, or ""."""
    classes = config.get("architectures")
    return classes[0] if isinstance(classes, list) and classes and isinstance(classes[0], str) else ""


def note_class(config: dict[str, Any], file: Path) -> None:
    """Warns if a configuration names a class that transformers does not have."""
    name = class_name(config)
    known = rf"(TF|Flax)?({'|'.join(_classes())})((Encoder|LMHead|DoubleHeads|WithLMHead)?Model|For({_TASKS}))"
    if name and not re.fullmatch(known, name):
        note(
            f"{file}: architectures is {name!r}, a class that transformers does not have; pyfused loads the backbone of "
            f"{model_type(config)!r}, without anything that class adds or changes"
        )


def weight_files(directory: Path) -> list[Path]:
    """The weight files: the one whole file, or else the shards. Raises ValueError if there are none."""
    whole, index = _names(directory)
    if whole is not None:
        return [whole]
    if index is not None:
        suffix = ".bin" if index.name.startswith(PICKLED) else ".safetensors"
        return [shard_path(index, name, suffix) for name in dict.fromkeys(_weight_map(index).values())]
    raise ValueError(
        f"{directory}: no weights found; looked for {WHOLE}, {INDEX}, {PICKLED} and {PICKLED_INDEX}{other_weights(directory)}"
    )


def _names(directory: Path) -> tuple[Path | None, Path | None]:
    """(whole file, index of shards); at least one is None. A whole file wins over an index."""
    shard = re.compile(r".*-\d+-of-\d+\.(safetensors|bin)")
    for whole, index in _PLACES:
        wholes = [path for path in sorted(directory.glob(whole)) if path.is_file() and not shard.fullmatch(path.name)]
        indices = [path for path in sorted(directory.glob(index)) if path.is_file() and not wholes]
        if len(wholes) + len(indices) > 1:
            names = ", ".join(path.name for path in (*wholes, *indices))
            raise ValueError(
                f"{directory}: holds several variants of the weights, {names}: rename one to {WHOLE} or {INDEX}"
            )
        if wholes or indices:
            return next(iter(wholes), None), next(iter(indices), None)
    return None, None


def read_entries(directory: Path) -> dict[str, Entry]:
    """Every tensor of the weight files by its name there. Raises ValueError if shards and index differ."""
    files = weight_files(directory)
    index = _names(directory)[1]
    headers = _read_headers(files)
    if index is None:
        return headers[files[0]]
    weight_map = _weight_map(index)
    entries: dict[str, Entry] = {}
    for path in files:
        for name, entry in headers[path].items():
            if weight_map.get(name) != path.name:
                raise ValueError(f"{entry} is here, but {index.name} says {weight_map.get(name)!r}")
            entries[name] = entry
    for name, shard in weight_map.items():
        if name not in entries:
            raise ValueError(f"{directory / shard}: tensor {name!r} is missing, although {index.name} says it is here")
    return entries


def _read_headers(files: list[Path]) -> dict[Path, dict[str, Entry]]:
    if files[0].suffix == ".bin":
        found = read_apart("pickled", files)
        return {path: {entry.name: entry for entry in entries} for path, entries in found.items()}
    return {path: read_header(path) for path in files}


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file. Raises ValueError naming the file and, if one is at fault, the tensor."""
    try:
        stamp = stamp_of(path)
        size = stamp.size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _LARGEST_HEADER and length <= size - 8:
                raise ValueError(f"the header has {length} bytes; at most {_LARGEST_HEADER} are read")
            if size < 8 or length > size - 8:
                raise ValueError(
                    f"the header would have {length} bytes, the file has {size}; it is damaged or truncated; download it again"
                )
            header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=reject_duplicates)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as safetensors: {error}{looks_like(path)}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path}: cannot be read as safetensors: the header is not a JSON object")
    header.pop("__metadata__", None)
    if len(header) > MOST_TENSORS:
        raise ValueError(f"{path}: holds {len(header)} tensors; at most {MOST_TENSORS} are read")
    entries = {name: _entry(path, name, fields, 8 + length, stamp) for name, fields in header.items()}
    end = 8 + length
    for entry in sorted(entries.values(), key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset != end:
            raise ValueError(
                f"{entry} begins at byte {entry.offset}, the one before it ends at {end}: they overlap or leave a gap"
            )
        end = entry.offset + entry.nbytes
    if end != size:
        raise ValueError(f"{path}: the tensors end at byte {end}, but the file has {size} bytes")
    return entries


def _entry(path: Path, name: str, fields: Any, data: int, stamp: Stamp) -> Entry:
    where, size = f"{path}: tensor {name[:LONGEST_NAME]!r}", stamp.size
    if len(name) > LONGEST_NAME:
        raise ValueError(f"{where}... has a name of {len(name)} characters; at most {LONGEST_NAME} are read")
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where}: the header must give dtype, shape and data_offsets, but gives {fields!r:.200}")
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
            f"{where}: {dtype} of shape {tuple(shape)} takes {nbytes} bytes, but data_offsets is {offsets!r}"
        )
    if data + end > size:
        raise ValueError(
            f"{where} ends at byte {data + end}, but the file has {size} bytes: it is truncated; download it again"
        )
    return Entry(name, path, data + begin, DTYPES[dtype], tuple(shape), stamp=stamp)


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map must map every tensor to its shard, but is {weight_map!r:.100}")
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise ValueError(f"{index}: tensor {name!r}: the shard is {shard!r:.100}, not a file name")
    return weight_map
