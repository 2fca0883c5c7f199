"""Which commands look at a checkpoint's files and write others? `pyfused info | convert`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .parsers import PRESET, command


def add(commands: Any) -> None:
    """Adds these commands to the parser."""
    info = command(commands, "info", "show a preset's options, memory and kernels; no weights are loaded", _info)
    info.add_argument("preset", metavar="PRESET", help=PRESET)

    convert = command(commands, "convert", "write a preset in another format, dtype or size of files", _convert)
    convert.add_argument("preset", metavar="SRC", help=PRESET)
    convert.add_argument("directory", metavar="DST", help="a directory; a checkpoint in it is replaced all at once")
    loads = "who is to load it: transformers (hf) or KerasHub (keras)"
    convert.add_argument("--format", required=True, choices=("hf", "keras"), help=loads)
    convert.add_argument("--dtype", metavar="DTYPE", help="float32, float16 or bfloat16; by default the checkpoint's")
    largest = "the largest weight file, such as 500MB (default 10GB)"
    convert.add_argument("--max-shard-size", default="10GB", metavar="SIZE", help=largest)
    convert.add_argument("--quiet", action="store_true", help="print nothing, and show no progress")


def _info(arguments: argparse.Namespace) -> int:
    from ..preset_facts import describe, render

    facts = describe(arguments.preset)
    print(json.dumps(facts, indent=2) if arguments.json else render(facts))
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    from ..checkpoints import convert
    from ..models.dtypes import resolve_dtype

    stated = arguments.max_shard_size
    size: int | str = int(stated) if stated.isdecimal() else stated
    dtype = None if arguments.dtype is None else resolve_dtype(arguments.dtype)
    written = convert(arguments.preset, arguments.directory, arguments.format, dtype=dtype, max_shard_size=size)
    if arguments.quiet:
        return 0
    files = {name: (Path(arguments.directory) / name).stat().st_size for name in written}
    if arguments.json:
        facts = {"preset": arguments.preset, "directory": arguments.directory, "format": arguments.format}
        print(json.dumps({**facts, "files": files}, indent=2))
    else:
        for name, count in files.items():
            print(f"{Path(arguments.directory) / name}  {count:,} bytes")
    return 0
