"""Which commands measure this machine and show the results? `pyfused env | bench | tune | evidence`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    """Adds these commands to the parser."""
    env = commands.add_parser("env", help="versions, backends, instruction sets, devices, and what is missing")
    env.set_defaults(run=_env)

    bench = commands.add_parser("bench", help="measure operators and models beside plain PyTorch and other peers")
    bench.add_argument("names", nargs="*", metavar="NAME", help="such as attention or gpt2; all by default")
    bench.add_argument("--device", choices=("cpu", "cuda"), help="cuda if there is a GPU, else cpu")
    bench.add_argument(
        "--dtype", nargs="+", default=(), metavar="DTYPE", help="float32, bfloat16, float16; all by default"
    )
    bench.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads (default 1)")
    bench.add_argument("--peers", default="", metavar="A,B", help="eager,compile,openvino,...; all by default")
    bench.add_argument("--seconds", type=float, default=2.0, metavar="S", help="for each row (default 2)")
    bench.add_argument("--check", action="store_true", help="exit status 1 below 0.97 of plain PyTorch's speed")
    bench.add_argument("--limit", type=float, metavar="S", help="begin no row after so many seconds")
    bench.add_argument(
        "--json", nargs="?", const="-", metavar="FILE.json", help="write the rows there; without a file, print them"
    )
    bench.add_argument("--plot", metavar="FILE.png", help="draw bars for each peer, and a roofline")
    bench.set_defaults(run=_bench)

    tune = commands.add_parser("tune", help="measure this machine's kernels for dispatch, beside plain PyTorch")
    tune.add_argument("operators", nargs="*", metavar="OPERATOR", help="operators to measure; all by default")
    tune.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="which kernels; cpu by default")
    tune.add_argument("--quick", action="store_true", help="fewer sizes, less time for each")
    tune.add_argument(
        "--threads",
        type=int,
        nargs="+",
        default=(),
        metavar="N",
        help="on a CPU: numbers of threads; default: 1 and all",
    )
    tune.add_argument(
        "--limit", type=float, metavar="SECONDS", help="on a GPU: stop after so long and keep the results so far"
    )
    tune.add_argument("--save", metavar="FILE.json", help="write there instead of the user's cache folder")
    tune.set_defaults(run=_tune)

    evidence = commands.add_parser(
        "evidence", help="the measurements that decide which backend runs, and the file of each"
    )
    evidence.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="for which device; cpu by default")
    evidence.set_defaults(run=_evidence)

    for command in (env, tune, evidence):
        command.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def _env(arguments: argparse.Namespace) -> int:
    from ..environment import describe, render

    facts = describe()
    print(json.dumps(facts, indent=2) if arguments.json else render(facts))
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    import torch

    from ..bench import report
    from ..bench.case import DTYPES, Setup
    from ..bench.plot import drawable, plot
    from ..bench.run import bench
    from ..evidence import name_of

    if arguments.threads < 1:
        raise ValueError(f"--threads is {arguments.threads}; it takes at least 1")
    for option, number in ("--seconds", arguments.seconds), ("--limit", arguments.limit):
        if number is not None and not 0 <= number < float("inf"):
            raise ValueError(f"{option} is {number}; it takes seconds")
    if arguments.json not in (None, "-"):
        if not arguments.json.endswith(".json"):
            raise ValueError(f"--json is {arguments.json!r}; it takes a name that ends in .json")
        _check_writable(arguments.json, "--json")
    if arguments.plot:
        drawable(arguments.plot)
        _check_writable(arguments.plot, "--plot")
    by_name = {name_of(dtype): dtype for dtype in DTYPES}
    for name in arguments.dtype:
        if name not in by_name:
            raise ValueError(f"--dtype is {name!r}; it takes {', '.join(by_name)}")
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtypes = tuple(by_name[name] for name in arguments.dtype) or DTYPES
    quiet = arguments.json == "-"
    shown = report.Live(sys.stderr if quiet else sys.stdout, arguments.json if not quiet else None)
    found = bench(
        arguments.names,
        Setup(device, dtypes),
        threads=arguments.threads,
        peers=[name for name in arguments.peers.split(",") if name],
        seconds=arguments.seconds,
        limit=arguments.limit,
        check=arguments.check,
        each=shown,
    )
    shown.close(found, arguments.check)
    if quiet:
        print(json.dumps(found, indent=1))
    if arguments.plot and found["rows"]:
        plot(found, arguments.plot)
        print(f"drew {arguments.plot}", file=sys.stderr)
    if found["interrupted"]:
        return 130
    failed = any("error" in row for row in found["rows"])
    unsure = arguments.check and any(row.get("slow") or report.unknown(row) for row in found["rows"])
    return 1 if failed or unsure else 0


def _check_writable(name: str, option: str) -> None:
    """Raises ValueError before the measurements if their file cannot be written."""
    path = Path(name)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{option} is {name!r}, which cannot be written")


def _tune(arguments: argparse.Namespace) -> int:
    from .. import compile_ahead, evidence, tune
    from ..tune import gpu as tune_gpu

    on_gpu = arguments.device == "cuda"
    if any(count < 1 for count in arguments.threads):
        raise ValueError(f"--threads is {arguments.threads}; it takes numbers of at least 1")
    for name, given in (("--threads", on_gpu and arguments.threads), ("--limit", not on_gpu and arguments.limit)):
        if given:
            raise ValueError(f"{name} does not go with --device {arguments.device}")

    if arguments.save:
        _check_writable(arguments.save, "--save")

    def say(text: str) -> None:
        print(f"measuring: {text}", file=sys.stderr, flush=True)

    options: dict[str, Any] = {"quick": arguments.quick, "operators": arguments.operators, "say": say}
    if on_gpu:
        path = Path(arguments.save) if arguments.save else tune_gpu.own_file()
        limit = float("inf") if arguments.limit is None else arguments.limit
        options |= {"limit": limit, "save": lambda found: evidence.write(path, found)}
        found = tune_gpu.tune(**options, compile_ahead=compile_ahead.compile_tiles)
        left = f"pyfused: {found['skipped']} tiles left out: they do not compile, do not fit or give a wrong output"
        print(left, *filter(None, (found["stopped"],)), sep="; stopped: ", file=sys.stderr)
    else:
        path = Path(arguments.save) if arguments.save else evidence.own_file()
        found = tune.tune(**options, threads=arguments.threads)
    found = evidence.write(path, found)
    if arguments.json:
        print(json.dumps(found, indent=1))
    else:
        print(evidence.render([evidence.line_from(row, path.name) for row in found["lines"]]))
        print(f"wrote {path}")
    for what in found["refused"]:
        print(f"pyfused: left out, the outputs disagree: {what}", file=sys.stderr)
    return 1 if found["refused"] else 0


def _evidence(arguments: argparse.Namespace) -> int:
    from .. import evidence

    device = "cpu"
    paths = evidence.files()
    tiles: list[dict[str, object]] = []
    if arguments.device == "cuda":
        device, paths, tiles = _tiles_in_force()
    found, kind = evidence.lines(device), evidence.kind(device)
    if arguments.json:
        files = [{"path": str(path), "exists": path.exists()} for path in paths]
        lines = [line._asdict() for line in found]
        print(json.dumps({"kind": kind, "files": files, "lines": lines, "tiles": tiles}, indent=1))
        return 0
    print(f"this machine: {kind}\nlines come from the first of these files that has them:")
    for path in paths:
        print(f"  {path}{'' if path.exists() else ' (not there)'}")
    print(evidence.render(found))
    if tiles:
        print(
            f"tiles of Triton's kernels: {len(tiles)} rows, of which {sum('date' in row for row in tiles)} are measured"
        )
    return 0


def _tiles_in_force() -> tuple[str, list[Path], list[dict[str, object]]]:
    """Evidence's name for this machine's GPU, the files of tiles, and their rows. Earlier files and rows win."""
    import torch

    from .. import dispatch, tiles

    if not (torch.cuda.is_available() or dispatch.interpreting()):
        raise ValueError("--device cuda: no CUDA device (and TRITON_INTERPRET=1 is not set)")
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    rows = [{**row.as_json(), "source": row.source} for row in tiles.rows(device)]
    return "cuda" if device.type == "cuda" else "interpreter", [path for path, _ in tiles.files(device)], rows
