"""Which commands find and fetch presets? `pyfused presets | download`."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from .parsers import PRESET, command

_HEADINGS = ("preset", "family", "parameters", "size", "where", "source")


def add(commands: Any) -> None:
    """Adds these commands to the parser."""
    command(commands, "presets", "list all presets, and say which of them are on this machine", _presets)

    download = command(commands, "download", "fetch a preset, and print its directory", _download)
    download.add_argument("preset", metavar="PRESET", help=PRESET)
    download.add_argument("--quiet", action="store_true", help="show no progress")


def _presets(arguments: argparse.Namespace) -> int:
    from ..models import Backbone

    rows = [_row(name, entry) for name, entry in Backbone.presets.items()]
    if arguments.json:
        print(json.dumps({"presets": rows}, indent=2))
        return 0
    table = [_HEADINGS, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(_HEADINGS))]
    for line in table:
        aligned = (
            cell.rjust(width) if i in (2, 3) else cell.ljust(width) for i, (cell, width) in enumerate(zip(line, widths))
        )
        print("  ".join(aligned).rstrip())
    return 0


def _row(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    """What is known of a preset. "bytes" are those of its files on this machine; None if it has yet to be downloaded."""
    from ..checkpoints import open_checkpoint
    from ..checkpoints.presets import place_of

    where, directory = place_of(name)
    parameters = entry["metadata"].get("params")
    if parameters is None and directory is not None:
        parameters = sum(math.prod(shape) for shape in open_checkpoint(directory).shapes.values())
    return {
        "name": name,
        "family": entry["metadata"]["path"],
        "description": entry["metadata"]["description"],
        "parameters": parameters,
        "bytes": None if directory is None else _size(directory)[0],
        "where": where,
        "directory": None if directory is None else str(directory),
        "source": entry.get("kaggle_handle", "pyfused"),
        "hf_repo": entry.get("hf_repo"),
    }


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    size = _readable(row["bytes"]) if row["bytes"] is not None else f"~{_readable(4 * row['parameters'])}"  # in float32
    return (row["name"], row["family"], f"{row['parameters']:,}", size, row["where"], row["source"])


def _download(arguments: argparse.Namespace) -> int:
    from ..checkpoints import resolve_preset

    directory = resolve_preset(arguments.preset)
    size, count = _size(directory)
    if arguments.json:
        result = {"preset": arguments.preset, "directory": str(directory), "bytes": size, "files": count}
        print(json.dumps(result, indent=2))
    else:
        print(f"{directory}  {_readable(size)} in {count} files")
    return 0


def _size(directory: Path) -> tuple[int, int]:
    """The bytes and the number of the files in a directory."""
    sizes = [path.stat().st_size for path in directory.rglob("*") if path.is_file()]
    return sum(sizes), len(sizes)


def _readable(size: int) -> str:
    """Such as "498 MB"."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"
