"""Which commands look at a checkpoint's files and write others? `pyfused info | convert`."""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from .hub import PRESET


def add(commands: Any) -> None:
    """Adds these commands to the parser."""
    info = commands.add_parser("info", help="a preset's options, memory and kernels, without loading its weights")
    info.add_argument("preset", metavar="PRESET", help=PRESET)
    info.set_defaults(run=_info)

    convert = commands.add_parser("convert", help="write a preset in another format, dtype or size of files")
    convert.add_argument("preset", metavar="SRC", help=PRESET)
    convert.add_argument("directory", metavar="DST", help="a directory; a checkpoint in it is replaced all at once")
    convert.add_argument("--format", required=True, choices=("hf", "keras"), help="of transformers, or of KerasHub")
    convert.add_argument("--dtype", metavar="DTYPE", help="float32, float16 or bfloat16; the checkpoint's by default")
    convert.add_argument(
        "--max-shard-size", default="10GB", metavar="SIZE", help="of a weight file, such as 500MB (default 10GB)"
    )
    convert.add_argument("--quiet", action="store_true", help="print nothing, and no progress bars")
    convert.set_defaults(run=_convert)

    for command in (info, convert):
        command.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def _info(arguments: argparse.Namespace) -> int:
    from ..preset_facts import describe, render

    facts = describe(arguments.preset)
    print(json.dumps(facts, indent=2) if arguments.json else render(facts))
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    from ..checkpoints import convert, quiet
    from ..models.dtypes import resolve_dtype

    size: int | str = (
        int(arguments.max_shard_size) if arguments.max_shard_size.isdecimal() else arguments.max_shard_size
    )
    dtype = None if arguments.dtype is None else resolve_dtype(arguments.dtype)
    with quiet() if arguments.quiet else nullcontext():
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
