"""What runs in the child process: one reader, over several files, with limits on the memory and the time of each.

The child is started as a file, isolated, and imports nothing of pyfused: torch alone takes longer than all it does. On its
standard input comes one JSON object: the reader's name, the paths to import from, the files, and the limits. It answers with
lines of JSON: "ready" after the imports, then one answer for each file in turn. A file that is missing from the answers is the
one that the child died of.
"""

import json
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

READY = "ready"


def main() -> None:
    """Reads the request, and answers it."""
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # whatever a library prints is no answer

    def answer(content: Any) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    request = json.loads(sys.stdin.buffer.read())
    sys.path[:] = request["import_from"]
    reader = runpy.run_path(str(Path(__file__).with_name(request["reader"] + ".py")))
    try:
        reader["prepare"]()
    except ImportError as error:
        answer({"not_installed": str(error)})
        return
    _limit_memory(request["memory"])
    answer(READY)
    for file, seconds in zip(request["files"], request["seconds"]):
        _limit_time(seconds)
        answer(answer_of(reader["entries"], file, request["most"], request["longest"]))


def answer_of(entries: Any, file: str, most: int, longest: int) -> dict[str, Any]:
    """{"entries": rows}, or one of {"refused": a message after the file's name}, {"untrusted": the same, of a file that would
    run code}, {"error": why a library cannot read the file}."""
    try:
        return {"entries": entries(file, most, longest)}
    except MemoryError:
        return {"error": "its structure takes more memory than that of any model"}
    except Exception as error:  # a library's, on damaged input
        kind = {"Refused": "refused", "Untrusted": "untrusted"}.get(type(error).__name__, "error")
        return {kind: str(error)[:2000] or type(error).__name__}


def _limit_memory(more: int) -> None:
    try:
        import resource

        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):
        return  # a system that cannot limit memory or does not tell it
    for kind, limit in ((resource.RLIMIT_AS, held + more), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _limit_time(seconds: float) -> None:
    """The system ends this process after so many seconds of computing, even inside a library that loops for ever."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


if __name__ == "__main__":
    main()
