"""How are the weights of a directory in Keras format written?

One ``model.weights.h5``, or shards ``model_00000.weights.h5``, ... listed by ``model.weights.json``, as Keras 3 writes them. A
variable is found by its path. HDF5 has no bfloat16: Keras stores two opaque bytes with the attribute dtype="bfloat16".
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from pyfused.checkpoints.keras import INDEX, WHOLE
from pyfused.checkpoints.stored import Stored, raw_bytes, shards, write_file

_TYPES = {torch.float32: "<f4", torch.float16: "<f2", torch.float64: "<f8", torch.bfloat16: "V2"}


def write_weights(directory: Path, tensors: list[Stored], most: int) -> None:
    """Writes the weight files into ``directory``. ``most``: bytes of a shard. Raises ImportError without h5py."""
    import h5py

    places: dict[str, None] = dict.fromkeys(_group(tensor) for tensor in tensors)
    order = {group: index for index, group in enumerate(places)}  # a layer's variables come together
    groups = shards(sorted(tensors, key=lambda tensor: order[_group(tensor)]), most)
    if len(groups) == 1:
        _write_file(h5py, directory / WHOLE, groups[0])
        return
    weight_map: dict[str, list[str]] = {}
    for number, group in enumerate(groups):
        name = f"model_{number:05}.weights.h5"
        _write_file(h5py, directory / name, group)
        for tensor in group:
            held = weight_map.setdefault(_group(tensor), [])
            held += [] if name in held else [name]
    metadata = {"total_size": sum(tensor.nbytes for tensor in tensors)}
    named = {group: names[0] if len(names) == 1 else names for group, names in weight_map.items()}
    write_file(directory / INDEX, json.dumps({"metadata": metadata, "weight_map": named}, indent=4).encode())


def _group(tensor: Stored) -> str:
    return "/" + tensor.name.rpartition("/")[0]


def _write_file(h5py: Any, path: Path, tensors: list[Stored]) -> None:
    """h5py lays the file out, and the values then go to their places as plain bytes: a block need not be a slice of the
    dataset, and an error of the disk is an OSError."""
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_layout(h5py.h5d.CONTIGUOUS)
    layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    offsets = []
    with h5py.File(path, "x") as file:
        for tensor in tensors:
            dataset = file.create_dataset(tensor.name, tensor.shape, _TYPES[tensor.dtype], dcpl=layout)
            if tensor.dtype is torch.bfloat16:
                dataset.attrs["dtype"] = "bfloat16"
            offsets.append(dataset.id.get_offset())
    with open(path, "r+b") as values:
        for tensor, offset in zip(tensors, offsets):
            values.seek(offset)
            for block in tensor.blocks():
                values.write(raw_bytes(block))
