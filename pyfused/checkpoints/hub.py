"""Which files of a preset are fetched from which hub?

A published preset is at Kaggle. Where Hugging Face has the same weights and only its client is installed, they come from there.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pyfused.checkpoints import hub_hugging_face, hub_kaggle, progress
from pyfused.checkpoints.files import note
from pyfused.checkpoints.part_names import TOKENIZER
from pyfused.families import Family
from pyfused.published import Preset

Want = Literal["weights", "config", "tokenizer"]

_CONFIG = "config.json"
_WEIGHTS = ("*.safetensors", "*.weights.h5")  # what a directory with weights has
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin")  # read only without the former
_FILES: dict[Want, tuple[str, ...]] = {
    "config": (_CONFIG,),
    "tokenizer": (_CONFIG, *TOKENIZER),
    "weights": (
        _CONFIG, "metadata.json", *TOKENIZER, "model.safetensors", "model.safetensors.index.json",
        "model-*-of-*.safetensors", "model.int[48]*.safetensors", "model.safetensors.index.int[48].json",
        "model.weights.h5", "model.weights.json", "model_*.weights.h5",
    ),
}  # fmt: skip


def is_handle(preset: str) -> bool:
    """Whether it begins as a hub's handle does."""
    return preset.startswith((hub_hugging_face.PREFIX, hub_kaggle.PREFIX))


def kaggle_handle(family: Family, preset: Preset) -> str:
    """The published preset's handle at Kaggle."""
    return f"{hub_kaggle.PREFIX}keras/{family.kaggle_name}/keras/{preset.name}/{preset.version}"


def hugging_face_handle(preset: Preset) -> str | None:
    """The handle of the published preset's weights at Hugging Face, if they are there."""
    return None if preset.hf_repo is None else f"{hub_hugging_face.PREFIX}{preset.hf_repo}"


def fetch(handle: str, want: Want) -> Path:
    """The directory of a handle's files, downloaded if they are not in the client's cache.

    Raises ValueError for a handle that is none, and for whatever goes wrong; the message names the handle and says what to do.
    Raises ImportError if the client is missing.
    """
    if handle.startswith(hub_kaggle.PREFIX):
        if hub_kaggle.cached(handle) is None:
            progress.say(f"fetching {handle}")
        return hub_kaggle.download(handle, None if want == "weights" else _FILES[want])
    directory = hub_hugging_face.download(handle, _FILES[want])
    if not (directory / _CONFIG).is_file():
        raise ValueError(f"{handle}: has no {_CONFIG}, so it is not a preset")
    if want == "weights" and not _has(directory, _WEIGHTS):
        directory = hub_hugging_face.download(handle, (*_FILES[want], *_PICKLED))
        if not _has(directory, _PICKLED):
            raise ValueError(f"{handle}: {_without_weights(handle)}")
    return directory


def fetch_published(family: Family, preset: Preset, want: Want) -> Path:
    """The directory of a published preset's files, as `fetch`. The message names the preset, too."""
    handle, other = kaggle_handle(family, preset), hugging_face_handle(preset)
    if hub_kaggle.cached(handle) is None and not _installed("kagglehub"):
        if other is None or not _installed("huggingface_hub"):
            either = " (or huggingface_hub, for the same weights from Hugging Face)" if other else ""
            raise ImportError(
                f"preset {preset.name!r} has to be downloaded: {handle} needs Kaggle's client, kagglehub{either}: "
                f"pip install 'pyfused[hub]'"
            )
        note(f"preset {preset.name!r} is taken from {other}, since Kaggle's client, kagglehub, is not installed")
        handle, other = other, None
    try:
        return fetch(handle, want)
    except ValueError as error:
        same = f". The same weights are at {other}" if other else ""
        raise ValueError(f"preset {preset.name!r}, {error}{same}") from error


def cached(family: Family, preset: Preset) -> Path | None:
    """Where the caches of the clients have all of a published preset; None if neither has."""
    if (directory := hub_kaggle.cached(kaggle_handle(family, preset))) is not None:
        return directory
    if (handle := hugging_face_handle(preset)) is None or _installed("kagglehub"):
        return None
    directory = hub_hugging_face.cached(handle, (*_FILES["weights"], *_PICKLED))
    return directory if directory and _has(directory, (*_WEIGHTS, *_PICKLED)) else None


def _has(directory: Path, patterns: Iterable[str]) -> bool:
    """Whether the directory has a file that matches one of the patterns."""
    return any(True for pattern in patterns for _ in directory.glob(pattern))


def _installed(package: str) -> bool:
    if package in sys.modules:
        return sys.modules[package] is not None
    return importlib.util.find_spec(package) is not None


def _without_weights(handle: str) -> str:
    """What the repository has instead of weights that pyfused reads, and what to do."""
    names = hub_hugging_face.files_of(handle)
    others = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack"))]
    if not others:
        return "has neither safetensors nor Keras weights"
    repo, revision = hub_hugging_face.parse(handle)
    converted = f"{hub_hugging_face.PREFIX}{repo}@refs/pr/1"
    return (
        f"has its weights only as {', '.join(others[:3])}, which pyfused does not read: convert them with transformers "
        f"(from_pretrained, then save_pretrained) and pass the directory"
        + ("" if revision else f"; or try {converted}, where the hub's robot may have converted them")
    )
