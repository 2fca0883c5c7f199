"""How is a model written so that transformers, and pyfused, load it again?

``config.json`` and ``model.safetensors`` in Hugging Face's naming, one tensor in memory at a time beside the model.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyfused.checkpoints.checkpoint import MODELS
from pyfused.checkpoints.hf import DTYPES, INDEX, WHOLE
from pyfused.checkpoints.storage import FLOATS


def save_hf(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Writes a pyfused backbone as a Hugging Face checkpoint into ``directory``, made if need be.

    The dtype is that of the parameters, one for all. Each file appears complete or not at all; files of an older,
    sharded checkpoint in the directory are refused rather than left to be confused with the new one. Raises
    TypeError for a module that is no backbone of a model pyfused reads, ValueError for what the format cannot say.
    """
    from pyfused.models.backbone import model_name

    maps = MODELS[model_name(type(model))]
    backbone: Any = model
    config = backbone.get_config()
    state = model.state_dict()
    plan = maps.hf_plan({"tie_embedding_weights": True, "cross_attention": False, "max_sequence_length": 1024} | config)
    if differ := sorted(state.keys() ^ plan.keys()):
        raise ValueError(f"model: its tensors are not those of its configuration: {differ}")
    dtypes = {tensor.dtype for tensor in state.values()}
    if len(dtypes) > 1 or not dtypes <= set(FLOATS):
        raise ValueError(f"model: its tensors must have one floating-point dtype, got {sorted(map(str, dtypes))}")
    dtype = dtypes.pop()
    path = Path(directory)
    if (path / INDEX).exists():
        raise ValueError(f"directory: {path} holds a sharded checkpoint ({INDEX}); save to another place")
    described = maps.config_to_hf(config, str(dtype).removeprefix("torch."))
    path.mkdir(parents=True, exist_ok=True)
    names = {
        (name if name == maps.HF_HEAD else maps.HF_PREFIX + name): (ours, flip)
        for ours, target in plan.items()
        for name, flip in ((piece.name, piece.transposed) for piece in target.pieces)
    }
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (ours, flip) in names.items():
        shape = list(state[ours].shape)
        begin, end = end, end + state[ours].numel() * dtype.itemsize
        label = next(label for label, kind in DTYPES.items() if kind == dtype)
        header[name] = {"dtype": label, "shape": shape[::-1] if flip else shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    unfinished = path / (WHOLE + ".unfinished")
    with open(unfinished, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for ours, flip in names.values():
            tensor = state[ours].detach().cpu()
            file.write(memoryview((tensor.t() if flip else tensor).contiguous().view(-1).view(torch.uint8).numpy()))
    os.replace(unfinished, path / WHOLE)
    unfinished = path / "config.json.unfinished"
    unfinished.write_text(json.dumps(described, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(unfinished, path / "config.json")
