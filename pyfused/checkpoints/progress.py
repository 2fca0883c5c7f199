"""Does the user see what is being downloaded and loaded, and how far it is? On stderr, if that is a terminal.

`quiet` and the environment variable PYFUSED_QUIET=1 turn it off.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

from pyfused.setting import set_to

_FROM_BYTES = 256 << 20  # less is loaded before anyone has read a line
_EVERY_SECONDS = 0.1
_WIDTH = 30

_quiet: ContextVar[bool] = ContextVar("pyfused_quiet", default=False)


def quiet() -> AbstractContextManager[None]:
    """Inside the block presets are downloaded and loaded without a progress bar."""
    return set_to(_quiet, True)


def shown() -> bool:
    """Whether progress is shown: stderr is a terminal, and neither `quiet` nor PYFUSED_QUIET is in force."""
    if _quiet.get() or os.environ.get("PYFUSED_QUIET", "").lower() in ("1", "true", "on", "yes"):
        return False
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # no stderr, or a closed one
        return False


def say(line: str) -> None:
    """One line about what begins now."""
    if shown():
        print(f"pyfused: {line}", file=sys.stderr, flush=True)


@contextmanager
def loading(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """Gives a function to call with the number of bytes just loaded, of `total`. It draws a bar if there is much to load."""
    if total < _FROM_BYTES or not shown():
        yield lambda count: None
        return
    done, drawn = 0, 0.0

    def advance(count: int) -> None:
        nonlocal done, drawn
        done += count
        if (now := time.monotonic()) - drawn >= _EVERY_SECONDS:
            drawn = now
            print(f"\r{_bar(name, done, total)}", end="", file=sys.stderr, flush=True)

    try:
        yield advance
    finally:
        print(f"\r{_bar(name, done, total)}", file=sys.stderr, flush=True)


def _bar(name: str, done: int, total: int) -> str:
    share = min(done / total, 1.0)
    filled = int(share * _WIDTH)
    line = f"{'#' * filled}{'.' * (_WIDTH - filled)} {share:4.0%}  {done / 1e9:.1f} of {total / 1e9:.1f} GB"
    return f"loading {name[:40]}: {line}"
