"""Which checks and measurements run on a GPU in a few minutes? Items in order of value, each in its own process with a limit.

    python benchmarks/gpu.py --call first|second [--budget SECONDS] [--results FOLDER] [--only ITEM ...] [--dry]
    python benchmarks/gpu.py --publish FOLDER ...     # results -> evidence -> README

An item prints JSON lines. Each is appended to FOLDER/results.jsonl at once, followed by a line about the item itself: its
status, its seconds and the end of its output. FOLDER/log.txt has the rest of the output, FOLDER/table.txt the final table.
Items that measure time run alone, the others side by side. Items without enough time left are skipped, with a row that says
so. --dry runs everything without a GPU, at tiny sizes: Triton in its interpreter, csrc/cuda on the CPU (tests/cuda_on_cpu).
This file needs only the standard library. The items are in gpu_items.py and gpu_commands.py.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gpu_ahead
import gpu_commands
from gpu_session import ROOT, Item, Session

PYTHON = sys.executable
BUILT = ROOT / "build" / "gpu"  # where `make gpu-build` writes the extensions, and Triton's kernels
OPERATORS = ("attention", "decode", "ffn", "fourier_mix", "gated_ffn", "layer_norm", "linear", "relative_bias", "rms_norm")
CUDA_OPERATORS = tuple(
    name for name in OPERATORS if name != "relative_bias"
)  # that one has no CUDA kernel, only Triton's
CUDNN_OPERATORS = ("attention",)
GLUON_OPERATORS = ("attention",)  # for Hopper, by hand
CUDA_CALLS = ROOT / "tests" / "gpu" / "cuda_calls.py"
STREAMS = ROOT / "tests" / "gpu" / "test_streams_and_graphs.py"


def own(name: str, *arguments: str, seconds: float, **options: Any) -> Item:
    """An item of gpu_items.py or gpu_commands.py."""
    command = (PYTHON, str(Path(__file__).resolve()), "--item", name, *arguments)
    return Item(" ".join((name, *arguments)), command, seconds, **options)


def each(names: Sequence[str], dry: bool) -> list[str]:
    """The groups of names that share a process. On a GPU each name has its own: a CUDA error ends the process. A dry run needs
    only one."""
    return [",".join(names)] if dry and names else list(names)


def correctness(operators: Sequence[str], dry: bool) -> list[Item]:
    """csrc/cuda and cuDNN first, since they need no compilation."""
    has = {"cuda": CUDA_OPERATORS, "cudnn": CUDNN_OPERATORS, "triton": OPERATORS, "gluon": GLUON_OPERATORS}
    lists = {backend: [name for name in operators if name in has[backend]] for backend in has}
    return [
        own("correct", group, backend, seconds=90, patience=60, resumes=True)
        for backend, names in lists.items()
        for group in each(names, dry)
    ]


def generation(dry: bool) -> list[Item]:
    options = {"seconds": 50, "alone": True, "patience": 40, "resumes": True}
    return [own("generate", model, **options) for model in each(("gpt2", "t5"), dry)]


def sanitizer(tool: str, dry: bool) -> list[Item]:
    """One process for each operator. torch's allocator is off: it hands out pieces of one large allocation, and the sanitizer
    sees no access out of bounds inside it."""
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    found = shutil.which("compute-sanitizer") or "compute-sanitizer"
    command = (found, "--tool", tool, "--error-exitcode", "9", PYTHON, str(CUDA_CALLS))
    names = ("rms_norm 37",) if dry else CUDA_OPERATORS
    return [Item(f"{tool} {name}", (*command, name), 90, 20, environment=environment) for name in names]


def first(dry: bool, changed: Sequence[str]) -> list[Item]:
    """Is everything right, and how fast is it? Takes about 390 seconds."""
    tuned = each(("attention", "layer_norm,rms_norm", "linear,ffn,gated_ffn"), dry)
    return [
        own("environment", seconds=30, least=5, alone=True),
        own("compile", seconds=75),
        own("flex", "compile", seconds=75),
        *correctness(OPERATORS, dry),
        own("decode", seconds=40, alone=True),
        *generation(dry),
        *(own("tune", names, seconds=s, least=25, alone=True) for names, s in zip(tuned, (60, 30, 30))),
        own("peers", seconds=50, least=20, alone=True),
        *(own("bench", group, seconds=45, least=25, alone=True) for group in ("operators", "networks")),
        own("host", seconds=20, alone=True),
        *(own("transformers", model, seconds=60, least=25, alone=True) for model in each(("gpt2", "t5"), dry)),
    ]


def second(dry: bool, changed: Sequence[str]) -> list[Item]:
    """Are the changed operators right, what do the benchmarks say, and is every access in bounds? Takes about 280 seconds."""
    workers = [] if dry else ["-n", "8"]
    pytest = (PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", *workers)
    return [
        own("environment", seconds=30, least=5, alone=True),
        own("warm", "networks", seconds=75),
        *correctness(changed, dry),
        own("decode", seconds=40, alone=True),
        own("peers", seconds=50, least=20, alone=True),
        *(own("bench", group, seconds=60, least=25, alone=True) for group in gpu_commands.BENCHMARKS),
        own("profile", seconds=60, least=30, alone=True),
        *sanitizer("memcheck", dry),
        Item("streams", (*pytest, str(STREAMS)), 60, 20),
        *sanitizer("racecheck", dry),
        *generation(dry),
        Item("tests", (*pytest, "-m", "gpu", "--maxfail=30", str(ROOT / "tests")), 1800, 300),
    ]


CALLS: dict[str, Callable[[bool, Sequence[str]], list[Item]]] = {"first": first, "second": second}


# ---- the command line --------------------------------------------------------------------------------------------------


def place_extensions(built: Path = BUILT, package: Path = ROOT / "pyfused") -> list[str]:
    """Copies the extensions that `make gpu-build` made into the package, if they are newer. Returns their names. Extensions of
    another Python have another suffix and stay."""
    copied = []
    for source in sorted(built.rglob(f"*{sysconfig.get_config_var('EXT_SUFFIX')}")):
        target = package / source.name
        if not target.exists() or target.stat().st_mtime < source.stat().st_mtime:
            shutil.copy2(source, target)
            copied.append(source.name)
    return copied


def _stop_at(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python benchmarks/gpu.py", description=(__doc__ or "").split("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--call", choices=list(CALLS), help="the list of items to run")
    what.add_argument("--publish", nargs="+", type=Path, metavar="FOLDER", help="results -> evidence -> README")
    what.add_argument("--item", nargs="+", metavar="NAME", help="run one item in this process")
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help="by default 390 for the first call, 280 for the second"
    )
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "gpu-results", metavar="FOLDER")
    parser.add_argument("--only", nargs="+", metavar="ITEM", help="only items whose names begin like this")
    parser.add_argument(
        "--changed", nargs="+", default=[], choices=OPERATORS, help="operators to check in the second call"
    )
    parser.add_argument("--dry", action="store_true", help="without a GPU, at tiny sizes")
    parser.add_argument("--from", type=int, default=0, dest="start", metavar="N", help="with --item: begin at case N")
    arguments = parser.parse_args(argv)
    if arguments.item:
        name, *rest = arguments.item
        items = gpu_commands.ITEMS
        if name not in items:
            sys.path[1:1] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "cuda_on_cpu")]
            import gpu_items

            items = gpu_items.ITEMS
        return gpu_commands.show(items[name](arguments.start, *rest))
    if arguments.publish:
        import gpu_publish

        return gpu_publish.main(arguments.publish)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop_at)
    if copied := place_extensions():
        print("copied", ", ".join(copied), "from", BUILT)
    cache = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    if not arguments.dry and (count := gpu_ahead.place(BUILT / "triton.tar.xz", cache)):
        print(f"copied {count} compiled kernels")
    items = CALLS[arguments.call](arguments.dry, arguments.changed)
    if arguments.only:
        items = [item for item in items if any(f"{item.name} ".startswith(f"{name} ") for name in arguments.only)]
    budget = arguments.budget or {"first": 390.0, "second": 280.0}[arguments.call]
    clock = _slow_clock if arguments.dry else time.monotonic
    return Session(arguments.results, budget, clock, dry=arguments.dry).run(items)


def _slow_clock() -> float:
    """A clock for a dry run, where other work on the machine makes items slower than their limits."""
    return time.monotonic() / 5


if __name__ == "__main__":
    sys.exit(main())
