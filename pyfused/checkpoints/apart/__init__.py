"""How is a file read whose reader cannot be trusted with a damaged file? Apart: in a child process with limits.

The HDF5 library can loop for ever over damaged names, and a pickle may ask for any amount of memory. The child finds where the
tensors lie; this process checks the places and copies the bytes. The child is a fresh Python, never a fork, so it may be
started from threads, from daemonic processes and with a GPU in use. It costs 0.05 s, and 0.25 s with h5py.
Where no child can be started, as in a frozen application, the file is read here, without limits, and a warning says so.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import torch

from pyfused.checkpoints.apart import child, h5, pickled
from pyfused.checkpoints.diagnose import how_to_convert, looks_like
from pyfused.checkpoints.files import note
from pyfused.checkpoints.storage import LONGEST_NAME, MOST_TENSORS, Entry, check_inside, stamp_of

Reader = Literal["h5", "pickled"]

# Of computing for one file: a second, and one more for each GB, where a model has more variables. 500 variables take 0.1 s
SECONDS, _MOST_SECONDS, _A_SECOND_MORE = 1.0, 10.0, 1 << 30
MEMORY = 512 << 20  # bytes for one file's structure
_PATIENCE = 60.0  # seconds of waiting, as for a network's disk; one that computes is ended long before

_WHAT: dict[Reader, tuple[str, str, str]] = {
    "h5": ("an h5 file", "the HDF5 library", "Keras weights need h5py: pip install 'pyfused[keras]'"),
    "pickled": ("a pickle of torch.save", "Python's unpickler", ""),
}


def read_apart(reader: Reader, paths: list[Path]) -> dict[Path, list[Entry]]:
    """The tensors of each file. Raises ValueError that names a file, and ImportError if the reader's package is missing."""
    stamps = {path: _stamp(path) for path in paths}
    answers, ended = _ask(reader, paths)
    found = {}
    for path, answer in zip(paths, answers):
        if "entries" not in answer:
            raise ValueError(_message(reader, path, answer))
        found[path] = [
            Entry(name, path, offset, getattr(torch, dtype), tuple(shape), by_columns, stamps[path])
            for name, offset, dtype, shape, by_columns in answer["entries"]
        ]
        for entry in found[path]:
            check_inside(entry, stamps[path].size)
    if len(answers) < len(paths):
        path, (what, library, _) = paths[len(answers)], _WHAT[reader]
        raise ValueError(f"{path}: cannot be read as {what}: {library} {ended}: the file is damaged; download it again")
    return found


def _stamp(path: Path) -> Any:
    try:
        return stamp_of(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error


def _message(reader: Reader, path: Path, answer: dict[str, Any]) -> str:
    if "refused" in answer:
        return f"{path}: {answer['refused']}"
    if "untrusted" in answer:
        return f"{path}: {answer['untrusted']}; {how_to_convert(path.name)}"
    return f"{path}: cannot be read as {_WHAT[reader][0]}: {answer['error']}{looks_like(path)}"


def _ask(reader: Reader, paths: list[Path]) -> tuple[list[dict[str, Any]], str]:
    """The child's answers, in order, and how it ended if some are missing."""
    why = _no_child()
    if not why:
        lines, ended = _run(reader, paths)
        if lines and lines[0] == child.READY:
            return lines[1:], ended
        if lines and isinstance(lines[0], dict) and "not_installed" in lines[0]:
            raise ImportError(f"{paths[0]}: {_WHAT[reader][2]} ({lines[0]['not_installed']})")
        why = ended
    note(f"{paths[0]}: read without limits on time and memory, since no process of its own could be started: {why}")
    here: Any = {"h5": h5, "pickled": pickled}[reader]
    try:
        here.prepare()
    except ImportError as error:
        raise ImportError(f"{paths[0]}: {_WHAT[reader][2]}") from error
    files = [os.path.abspath(path) for path in paths]
    return [child.answer_of(here.entries, file, MOST_TENSORS, LONGEST_NAME) for file in files], ""


def _no_child() -> str:
    """Why this process cannot start another Python, or "". An application that embeds Python would start itself again."""
    name = os.path.basename(sys.executable or "")
    if getattr(sys, "frozen", False) or not re.match(r"(python|pypy)", name, re.IGNORECASE):
        return f"the program is {name or 'unknown'}, not a Python"
    return "" if os.path.isfile(child.__file__) else f"{child.__file__} is not a file"


def _run(reader: Reader, paths: list[Path]) -> tuple[list[Any], str]:
    request: dict[str, Any] = {
        "reader": reader,
        "import_from": [os.path.abspath(path) for path in sys.path if path],
        "files": [os.path.abspath(path) for path in paths],
        "memory": MEMORY,
        "seconds": [min(SECONDS + os.path.getsize(path) / _A_SECOND_MORE, _MOST_SECONDS) for path in paths],
        "most": MOST_TENSORS,
        "longest": LONGEST_NAME,
    }
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    # -I: neither the environment nor the working directory says what is imported. -S: the paths come with the request
    command = [sys.executable, "-I", "-S", os.path.abspath(child.__file__)]
    patience = _PATIENCE + 2 * _MOST_SECONDS * len(paths)
    try:
        done = subprocess.run(
            command,
            input=json.dumps(request).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            timeout=patience,
        )
    except subprocess.TimeoutExpired as error:
        return _lines(error.stdout or b""), f"did not finish within {patience:g} s"
    except (OSError, ValueError) as error:
        return [], str(error)
    lines = _lines(done.stdout)
    if not _by_timer(done.returncode):
        return lines, "broke off"
    limit = request["seconds"][min(len(lines), len(paths)) - 1]
    return lines, f"did not finish within {limit:.2g} s of computing"


def _by_timer(status: int) -> bool:
    import signal

    return hasattr(signal, "SIGPROF") and status == -signal.SIGPROF


def _lines(output: bytes) -> list[Any]:
    """The complete lines of the answer."""
    return [json.loads(line) for line in output.splitlines(keepends=True) if line.endswith(b"\n")]
