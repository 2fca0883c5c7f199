"""Which commands measure this machine and show the results? `pyfused env | bench | tune | evidence`."""

from __future__ import annotations

import argparse
import functools
import json
import sys
from pathlib import Path
from typing import Any

from .parsers import check_writable, command


def add(commands: Any) -> None:
    """Adds these commands to the parser."""
    command(commands, "env", "show versions, backends, instruction sets, devices, and what is missing", _env)

    bench = command(commands, "bench", "measure operators and models beside plain PyTorch and other peers", _bench)
    bench.add_argument("names", nargs="*", metavar="NAME", help="such as attention or gpt2; by default all")
    bench.add_argument("--device", choices=("cpu", "cuda"), help="by default cuda if there is a GPU")
    dtypes = "float32, bfloat16, float16; by default all"
    bench.add_argument("--dtype", nargs="+", default=(), metavar="DTYPE", help=dtypes)
    bench.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads (default 1)")
    bench.add_argument("--peers", default="", metavar="A,B", help="such as eager,compile,openvino; by default all")
    bench.add_argument("--seconds", type=float, default=2.0, metavar="S", help="how long to measure a row (default 2)")
    check = "exit with status 1 if a row is below 0.97 of plain PyTorch's speed"
    bench.add_argument("--check", action="store_true", help=check)
    bench.add_argument("--limit", type=float, metavar="S", help="begin no new row after S seconds")
    rows = "write the rows to this file; without a file, print them"
    bench.add_argument("--json", nargs="?", const="-", metavar="FILE.json", help=rows)
    bench.add_argument("--plot", metavar="FILE.png", help="draw a bar for each peer, and a roofline")

    tune = command(commands, "tune", "measure which kernels are fastest on this machine, so that they are used", _tune)
    tune.add_argument("operators", nargs="*", metavar="OPERATOR", help="what to measure; by default all operators")
    tune.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="whose kernels; by default cpu")
    tune.add_argument("--quick", action="store_true", help="measure fewer sizes, and each for less time")
    counts = "on a CPU: the numbers of threads to measure with; by default 1 and all"
    tune.add_argument("--threads", type=int, nargs="+", default=(), metavar="N", help=counts)
    limit = "on a GPU: stop after so many seconds and keep the results so far"
    tune.add_argument("--limit", type=float, metavar="SECONDS", help=limit)
    tune.add_argument("--save", metavar="FILE.json", help="write to this file, not to the user's cache folder")

    shown = "show the measurements that decide which backend runs, and the file of each"
    evidence = command(commands, "evidence", shown, _evidence)
    evidence.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of which device; by default cpu")


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
        check_writable(arguments.json, "--json")
    if arguments.plot:
        drawable(arguments.plot)
        check_writable(arguments.plot, "--plot")
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
        check_writable(arguments.save, "--save")

    def say(text: str) -> None:
        print(f"measuring: {text}", file=sys.stderr, flush=True)

    options: dict[str, Any] = {"quick": arguments.quick, "operators": arguments.operators, "say": say}
    if on_gpu:
        path = Path(arguments.save) if arguments.save else tune_gpu.own_file()
        limit = float("inf") if arguments.limit is None else arguments.limit
        options |= {"limit": limit, "save": lambda found: evidence.write(path, found)}
        with compile_ahead.Workers() as workers:
            compile_tiles = functools.partial(compile_ahead.compile_tiles, workers=workers)
            found = tune_gpu.tune(**options, compile_ahead=compile_tiles)
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
