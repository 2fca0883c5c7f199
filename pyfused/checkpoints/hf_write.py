"""How are the weights of a directory in Hugging Face format written?

One ``model.safetensors``, or shards with an index. The safetensors library takes all tensors of a file at once; here they are
written one after the other. Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
from pathlib import Path

from pyfused.checkpoints.hf import DTYPES, INDEX, WHOLE
from pyfused.checkpoints.stored import Stored, raw_bytes, shards, write_file

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8  # bytes; the library pads the header likewise


def write_weights(directory: Path, tensors: list[Stored], most: int, variant: str = "") -> None:
    """Writes the weight files into ``directory``.

    most: bytes of a shard.
    variant: goes into the files' names, as transformers' argument of this name: "int8" makes model.int8.safetensors.
    """
    # The wider dtypes first, so that every tensor is aligned
    groups = shards(sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize), most)
    ending = f".{variant}" if variant else ""
    if len(groups) == 1:
        _write_file(directory / WHOLE.replace(".", f"{ending}.", 1), groups[0])
        return
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        name = f"model{ending}-{number:05}-of-{len(groups):05}.safetensors"
        _write_file(directory / name, group)
        weight_map |= {tensor.name: name for tensor in group}
    metadata = {"total_size": sum(tensor.nbytes for tensor in tensors)}
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    write_file(directory / INDEX.replace(".json", f"{ending}.json"), (json.dumps(index, indent=2) + "\n").encode())


def _write_file(path: Path, tensors: list[Stored]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers wants it
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.nbytes
        header[tensor.name] = {"dtype": _NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            for block in tensor.blocks():
                file.write(raw_bytes(block))
