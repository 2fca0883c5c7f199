"""How is a model saved so that transformers and pyfused can load it?

``config.json`` and ``model.safetensors`` in Hugging Face's naming.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from pyfused.checkpoints.hf import INDEX, WHOLE
from pyfused.checkpoints.plan import Target
from pyfused.checkpoints.storage import FLOATS
from pyfused.families import family_of, load


def save_hf(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Writes a pyfused backbone as a Hugging Face checkpoint into ``directory``, which is created if needed.

    The parameters must have one dtype; it becomes the file's. Each file appears complete or not at all. Raises TypeError if
    the module is not a backbone of pyfused. Raises ValueError for a setting that transformers does not have, and if the
    directory holds a sharded checkpoint: readers could confuse it with the new one.
    """
    maps = load(family_of(type(model)).checkpoint)
    backbone: Any = model
    config = backbone.get_config()
    state = model.state_dict()
    plan = maps.hf_plan(maps.DEFAULTS | config)
    if any(tensor.dtype == torch.int8 for tensor in state.values()):
        raise ValueError("model: its weights are int8, which this format does not hold; call unquantize_ first")
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
    tensors = {
        (name if name == maps.HF_HEAD else maps.HF_SAVED_PREFIX + name): tensor
        for ours, target in plan.items()
        for name, tensor in _pieces(state[ours], target)
    }
    unfinished = path / (WHOLE + ".unfinished")
    save_file(tensors, unfinished, metadata={"format": "pt"})
    os.replace(unfinished, path / WHOLE)
    unfinished = path / "config.json.unfinished"
    unfinished.write_text(json.dumps(described, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(unfinished, path / "config.json")


def _pieces(tensor: torch.Tensor, target: Target) -> Iterator[tuple[str, torch.Tensor]]:
    """Splits one pyfused tensor into the file's: (stored name, tensor)."""
    row = 0
    for piece in target.pieces:
        rows = math.prod(piece.shape) // math.prod(target.shape[1:])
        part = tensor[row : row + rows]
        yield piece.name, (part.t() if piece.transposed else part).contiguous()
        row += rows
