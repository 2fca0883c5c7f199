"""In which directory are a preset's files?

A preset is one of these, tried in this order: the name of one that pyfused ships; a local directory; one of KerasHub's
published names; ``hf://owner/repo``; ``kaggle://owner/model/framework/variation[/version]``. Only the last three use the
network, through huggingface_hub or kagglehub. No other file imports these.
"""

from __future__ import annotations

import os
import re
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from pyfused.checkpoints.files import read_json
from pyfused.families import FAMILIES, of_hf_type

Want = Literal["weights", "config", "tokenizer"]


def published() -> dict[str, dict[str, Any]]:
    """Name -> KerasHub's metadata, the handle on Kaggle, and the Hugging Face repository with the same weights or None."""
    return {
        preset.name: {
            "metadata": {"description": preset.description, "params": preset.parameters, "path": family.name},
            "kaggle_handle": f"kaggle://keras/{family.kaggle_name}/keras/{preset.name}/{preset.version}",
            "hf_repo": preset.hf_repo,
        }
        for family in FAMILIES.values()
        for preset in family.presets
    }


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                    "vocab.json", "merges.txt", "spiece.model",
                    "assets/tokenizer/vocabulary.json", "assets/tokenizer/merges.txt",
                    "assets/tokenizer/vocabulary.spm")  # fmt: skip
_FILES: dict[Want, tuple[str, ...]] = {
    "config": ("config.json",),
    "tokenizer": ("config.json", *_TOKENIZER_FILES),
    "weights": (
        "config.json", "metadata.json", *_TOKENIZER_FILES, "model.safetensors", "model.safetensors.index.json",
        "model-*-of-*.safetensors", "model.weights.h5", "model.weights.json", "model_*.weights.h5",
    ),
}  # fmt: skip

# A preset has only some of these, so it is no error if one cannot be downloaded
_OPTIONAL = frozenset(_TOKENIZER_FILES) - {"tokenizer.json"}


def bundled_directory() -> Path:
    """The package's directory with one folder for each preset that pyfused ships."""
    return Path(__file__).resolve().parent.parent / "presets"


def bundled_presets() -> dict[str, Path]:
    """Name -> folder of the presets that pyfused ships."""
    root = bundled_directory()
    return {path.parent.name: path.parent for path in sorted(root.glob("*/config.json"))} if root.is_dir() else {}


def presets_of(models: set[str]) -> dict[str, dict[str, Any]]:
    """All presets of these models in KerasHub's form: name -> ``{"metadata": {"description", "path", ...}, ...}``."""
    result = {}
    for name, directory in bundled_presets().items():
        family = of_hf_type(read_json(directory / "config.json").get("model_type"))
        if family is not None and family.name in models:
            result[name] = {"metadata": {"description": "comes with pyfused", "path": family.name}}
    return result | {name: entry for name, entry in published().items() if entry["metadata"]["path"] in models}


def resolve_preset(preset: str | os.PathLike[str], want: Want = "weights") -> Path:
    """The directory of a preset's files. Downloads them if they are not on this machine.

    want: "weights" (everything), "config" or "tokenizer"; less is downloaded for the latter two.
    Raises TypeError for anything but a name or a path, ValueError if nothing matches or a download fails, and ImportError if
    the package that a source needs is missing.
    """
    if isinstance(preset, str):
        if preset.startswith("hf://"):
            return _from_hugging_face(preset, want)
        if preset.startswith("kaggle://"):
            return _from_kaggle(preset, want)
        if "://" in preset:
            raise ValueError(
                f"preset is {preset!r}: unknown source; it takes hf:// or kaggle://, a name or a directory"
            )
        if preset in (shipped := bundled_presets()):
            return shipped[preset]
    elif not isinstance(preset, os.PathLike):
        raise TypeError(f"preset must be a name or the path of a directory, got {type(preset).__name__}")
    path = Path(preset)
    if path.is_dir() and str(preset):
        return path
    if str(preset) in published():
        return _from_published(str(preset), want)
    names = [*bundled_presets(), *published()]
    close = get_close_matches(str(preset).lower(), names, n=3, cutoff=0.5)
    nearest = f"nearest: {', '.join(close)}; " if close else ""
    hint = (
        f"; a Hugging Face repository is written hf://{preset}" if re.fullmatch(r"[\w.-]+/[\w.-]+", str(preset)) else ""
    )
    raise ValueError(
        f"preset is {str(preset)!r}, but no preset has this name ({nearest}pyfused.Backbone.presets "
        f"lists all {len(names)}), and the directory {path} {'is a file' if path.is_file() else 'does not exist'}{hint}"
    )


def _from_published(name: str, want: Want) -> Path:
    entry = published()[name]
    try:
        return _from_kaggle(entry["kaggle_handle"], want)
    except ImportError as error:
        if entry["hf_repo"] is None:
            raise
        try:
            return _from_hugging_face(f"hf://{entry['hf_repo']}", want)
        except ImportError as second:
            raise ImportError(f"preset {name!r} has to be downloaded; tried: {error}; {second}") from error


def _from_hugging_face(handle: str, want: Want) -> Path:
    repo = handle.removeprefix("hf://")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise ValueError(f"preset is {handle!r}; a Hugging Face repository is written hf://owner/repo")
    try:
        hub: Any = import_module("huggingface_hub")
    except ImportError as error:
        raise ImportError(
            f"{handle} needs the Hugging Face hub's client, huggingface_hub: pip install 'pyfused[hub]'"
        ) from error
    try:
        return Path(hub.snapshot_download(repo_id=repo, allow_patterns=list(_FILES[want])))
    except Exception as error:
        raise ValueError(f"{handle}: cannot be downloaded: {_first_line(error)}") from error


def _from_kaggle(handle: str, want: Want) -> Path:
    name = handle.removeprefix("kaggle://")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+){3,4}", name):
        raise ValueError(
            f"preset is {handle!r}; a Kaggle model is written kaggle://owner/model/framework/variation[/version]"
        )
    try:
        hub: Any = import_module("kagglehub")
    except ImportError as error:
        raise ImportError(f"{handle} needs Kaggle's client, kagglehub: pip install 'pyfused[hub]'") from error
    if want == "weights":
        try:
            return Path(hub.model_download(name))
        except Exception as error:
            raise ValueError(f"{handle}: cannot be downloaded: {_first_line(error)}") from error
    directory: Path | None = None
    for file in _FILES[want]:
        try:
            path = Path(hub.model_download(name, path=file))
        except Exception as error:
            if file in _OPTIONAL:
                continue
            raise ValueError(f"{handle}: {file} cannot be downloaded: {_first_line(error)}") from error
        directory = directory or path.parents[file.count("/")]
    assert directory is not None  # config.json is not optional
    return directory


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
