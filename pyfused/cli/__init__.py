"""What can one do from a terminal? `pyfused env | generate | encode | verify | warm | info | convert | presets |
download | bench | tune | evidence`, --json on each.

An error is one line on stderr and exit status 2, never a traceback. `verify` exits with 1 if a backend fails. A character that
the terminal's encoding lacks is written as "?".
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TextIO

from .._version import __version__
from . import checkpoints, hub, measurements, presets
from .parsers import as_quiet_as


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status. Without a command: prints the help and returns 0."""
    with _encodable(sys.stdout):
        return _main(argv)


def _main(argv: Sequence[str] | None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        if arguments.command is None:
            parser.print_help()
            status = 0
        else:
            with as_quiet_as(arguments):
                status = arguments.run(arguments)
        print(end="", flush=True)  # here, so that an error of writing is caught below
        return status
    except KeyboardInterrupt:
        print("pyfused: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the output is gone
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout once more at exit
        return 141
    except Exception as error:
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"pyfused: {message}", file=sys.stderr)
        return 2


@contextlib.contextmanager
def _encodable(stream: TextIO) -> Iterator[None]:
    """Inside the block the stream writes "?" for a character that its encoding lacks. (stderr escapes it anyway.)"""
    before = getattr(stream, "errors", None)
    # The C locale has surrogateescape, which still refuses every unknown character but lone surrogates
    if before not in ("strict", "surrogateescape") or not isinstance(stream, io.TextIOWrapper):
        yield
        return
    stream.reconfigure(errors="replace")
    try:
        yield
    finally:
        with contextlib.suppress(OSError, ValueError):  # a broken pipe, handled above
            stream.reconfigure(errors=before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pyfused",
        description="Fused transformer kernels, from the command line.",
        epilog="`pyfused COMMAND --help` lists what a command takes.",
    )
    parser.add_argument("--version", action="version", version=f"pyfused {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for group in (measurements, presets, checkpoints, hub):
        group.add(commands)
    return parser
