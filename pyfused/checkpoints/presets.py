"""In which directory are a preset's files, and what does its configuration say before they are there?

A preset is one of these, tried in this order: the name of one that pyfused ships; a local directory; one of KerasHub's
published names; ``hf://owner/repo[@revision]``; ``kaggle://owner/model/framework/variation[/version]``. Only the last three
use the network; see hub.py.
"""

from __future__ import annotations

import os
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pyfused.checkpoints import hub
from pyfused.checkpoints.files import read_json
from pyfused.checkpoints.hub import Want
from pyfused.checkpoints.replace import finish
from pyfused.families import FAMILIES, Family, of_hf_type
from pyfused.published import Preset


def published() -> dict[str, dict[str, Any]]:
    """Name -> KerasHub's metadata, the handle on Kaggle, and the Hugging Face repository with the same weights or None."""
    return {
        preset.name: {
            "metadata": {"description": preset.description, "params": preset.parameters, "path": family.name},
            "kaggle_handle": hub.kaggle_handle(family, preset),
            "hf_repo": preset.hf_repo,
        }
        for family, preset in _published().values()
    }


def _published() -> dict[str, tuple[Family, Preset]]:
    return {preset.name: (family, preset) for family in FAMILIES.values() for preset in family.presets}


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
    if (directory := _local(preset)) is not None:
        return directory
    name = str(preset)
    if name in _published():
        return hub.fetch_published(*_published()[name], want)
    if hub.is_handle(name):
        return hub.fetch(name, want)
    raise ValueError(_no_such(name))


def published_config(preset: str | os.PathLike[str]) -> tuple[Family, dict[str, Any]] | None:
    """The family of a published name, and the ``config`` that its config.json has at Kaggle. Needs no network.

    None for any other preset, and for one whose files are on this machine.
    """
    if _local(preset) is not None or (found := _published().get(str(preset))) is None or hub.cached(*found) is not None:
        return None
    return found[0], dict(found[1].config)


def place_of(preset: str) -> tuple[str, Path | None]:
    """Where a preset's name leads: "bundled" or "cached" and the directory, or the handle it would be downloaded from."""
    if (directory := bundled_presets().get(preset)) is not None:
        return "bundled", directory
    family, found = _published()[preset]
    if (directory := hub.cached(family, found)) is not None:
        return "cached", directory
    return "remote", None


def _local(preset: str | os.PathLike[str]) -> Path | None:
    """The directory of a preset that pyfused ships, or a directory of this name."""
    if isinstance(preset, str):
        if preset in (shipped := bundled_presets()):
            return shipped[preset]
        if "://" in preset:
            return None
    elif not isinstance(preset, os.PathLike):
        raise TypeError(f"preset must be a name or the path of a directory, got {type(preset).__name__}")
    if not str(preset) or not Path(preset).is_dir():
        return None
    finish(Path(preset))  # a save that was interrupted
    return Path(preset)


def _no_such(name: str) -> str:
    if "://" in name:
        return f"preset is {name!r}: unknown source; it takes hf:// or kaggle://, a name or a directory"
    names = [*bundled_presets(), *_published()]
    close = get_close_matches(name.lower(), names, n=3, cutoff=0.5)
    nearest = f"nearest: {', '.join(close)}; " if close else ""
    hint = f"; a Hugging Face repository is written hf://{name}" if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else ""
    return (
        f"preset is {name!r}, but no preset has this name ({nearest}pyfused.Backbone.presets lists all {len(names)}), and the "
        f"directory {Path(name)} {'is a file' if Path(name).is_file() else 'does not exist'}{hint}"
    )
