"""What do the parsers of all commands share?"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

# What every command takes for a preset.
PRESET = (
    "a name such as gpt2_tiny_en, a directory, hf://owner/repo[@revision], or kaggle://owner/model/framework/variation"
)


def command(
    commands: Any, name: str, what: str, run: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    """Adds a command. what: what it does, for the list of commands and for its own help. run: returns the exit status."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
    parser.set_defaults(run=run)
    if name != "bench":  # whose --json may name a file
        parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser


def check_writable(name: str, option: str) -> None:
    """Raises ValueError, before the work whose result it shall hold, if a file cannot be written."""
    path = Path(name)
    if not path.parent.is_dir():
        raise ValueError(f"{option} is {name!r}, which cannot be written: there is no folder {str(path.parent)!r}")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{option} is {name!r}, which cannot be written")


def as_quiet_as(arguments: argparse.Namespace) -> AbstractContextManager[None]:
    """A block without progress bars if the command was given --quiet."""
    if not getattr(arguments, "quiet", False):
        return nullcontext()
    from ..checkpoints import quiet

    return quiet()
