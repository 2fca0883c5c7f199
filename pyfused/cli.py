"""What can one do from a terminal? `pyfused env | generate | encode | verify | warm | bench | tune | evidence`, --json on each.

An error is one line on stderr and exit status 2, never a traceback; `verify` exits with 1 where a backend fails. What the
terminal's encoding does not have is written as "?".
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from ._version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status. Without a command: prints the help, 0."""
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
            status = arguments.run(arguments)
        print(end="", flush=True)  # while an error can still be told
        return status
    except KeyboardInterrupt:
        print("pyfused: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away: nothing to say, and nobody to say it to
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still flushes when it ends
        return 141
    except Exception as error:
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"pyfused: {message}", file=sys.stderr)
        return 2


@contextlib.contextmanager
def _encodable(stream: TextIO) -> Iterator[None]:
    """Inside, the stream takes any text: "?" stands for what its encoding lacks. stderr does that by itself."""
    before = getattr(stream, "errors", None)
    # surrogateescape, which the C locale has, refuses every character but lone surrogates too
    if before not in ("strict", "surrogateescape") or not isinstance(stream, io.TextIOWrapper):
        yield
        return
    stream.reconfigure(errors="replace")
    try:
        yield
    finally:
        with contextlib.suppress(OSError, ValueError):  # a broken pipe, which is told already
            stream.reconfigure(errors=before)


def _text(argument: str) -> str:
    """An argument as text. Bytes that the locale's encoding could not read come as lone surrogates; they are UTF-8, or
    nothing that a tokeniser knows."""
    return argument.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pyfused", description="Fused transformer kernels, from the command line.")
    parser.add_argument("--version", action="version", version=f"pyfused {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    env = commands.add_parser("env", help="versions, backends, instruction sets, devices, and what is missing")
    env.set_defaults(run=_env)

    generate = commands.add_parser("generate", help="continue a text, or answer it, streaming to the terminal")
    generate.add_argument("preset", metavar="PRESET", help="a bundled name such as gpt2_tiny_en, or a directory")
    generate.add_argument("--prompt", required=True, type=_text, metavar="TEXT")
    generate.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    generate.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default) is greedy")
    generate.add_argument("--top-k", type=int, metavar="K")
    generate.add_argument("--top-p", type=float, metavar="P")
    generate.add_argument("--seed", type=int, metavar="N")
    generate.add_argument(
        "--num-beams", type=int, default=1, metavar="N", help="search with N beams, printed at the end"
    )
    generate.set_defaults(run=_generate)

    encode = commands.add_parser("encode", help="hidden states of texts, printed or saved")
    encode.add_argument("preset", metavar="PRESET", help="a bundled name such as albert_tiny_en, or a directory")
    encode.add_argument(
        "--text", required=True, type=_text, action="append", metavar="TEXT", help="may be given several times"
    )
    encode.add_argument("--pool", choices=("cls", "mean"), help="one vector a text instead of one a token")
    encode.add_argument(
        "--output", metavar="FILE.npy", help="save (texts, D), or (texts, tokens, D) with zeros behind shorter texts"
    )
    encode.set_defaults(run=_encode)

    verify = commands.add_parser(
        "verify", help="compare every backend with the float64 reference on a preset's weights"
    )
    verify.add_argument("preset", metavar="PRESET")
    verify.set_defaults(run=_verify)

    bench = commands.add_parser("bench", help="measure operators and models beside plain PyTorch and other peers")
    bench.add_argument("names", nargs="*", metavar="NAME", help="such as attention or gpt2; all by default")
    bench.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is a GPU, else cpu")
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

    warm = commands.add_parser("warm", help="compile what a preset needs before it is needed, in parallel")
    warm.add_argument("preset", metavar="PRESET")
    warm.add_argument("--lengths", type=int, nargs="+", metavar="N", help="tokens of the texts to expect")
    warm.add_argument("--workers", type=int, metavar="N", help="processes that compile; one a core by default")
    warm.set_defaults(run=_warm)

    tune = commands.add_parser("tune", help="measure this machine's kernels beside plain PyTorch, and dispatch by that")
    tune.add_argument("operators", nargs="*", metavar="OPERATOR", help="which to measure; all by default")
    tune.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="whose kernels; cpu by default")
    tune.add_argument("--quick", action="store_true", help="fewer sizes, less time for each")
    tune.add_argument(
        "--threads", type=int, nargs="+", default=(), metavar="N", help="on a CPU: numbers of threads; one, and all"
    )
    tune.add_argument(
        "--limit", type=float, metavar="SECONDS", help="on a GPU: stop after so long and keep what is known by then"
    )
    tune.add_argument("--save", metavar="FILE.json", help="write there instead of the user's cache folder")
    tune.set_defaults(run=_tune)

    evidence = commands.add_parser(
        "evidence", help="the measurements that decide which backend runs, and where each is from"
    )
    evidence.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="about which; cpu by default")
    evidence.set_defaults(run=_evidence)

    for command in (generate, encode, verify, warm):
        command.add_argument("--device", metavar="DEVICE", help="cpu (default where there is no GPU) or cuda[:N]")
        command.add_argument(
            "--dtype", metavar="DTYPE", help="float32, float16 or bfloat16; the checkpoint's by default"
        )
    for command in (env, generate, encode, verify, warm, tune, evidence):
        command.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser


def _env(arguments: argparse.Namespace) -> int:
    from .environment import describe, render

    facts = describe()
    print(json.dumps(facts, indent=2) if arguments.json else render(facts))
    return 0


def _device(name: str | None) -> str:
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(f"--device {name!r} is no device; it takes cpu or cuda[:N]") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name!r} is not supported; it takes cpu or cuda[:N]")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name!r}: no CUDA device here")
    return str(device)


def _generate(arguments: argparse.Namespace) -> int:
    from . import Generator
    from .checkpoints import load_tokenizer
    from .models import Backbone

    model = Backbone.from_preset(arguments.preset, device=_device(arguments.device), dtype=arguments.dtype).eval()
    tokenizer = load_tokenizer(arguments.preset)
    prompt = tokenizer.encode(arguments.prompt)
    stream, generator = tokenizer.stream(), Generator(model)
    began, first = time.perf_counter(), 0.0

    def on_token(_row: int, token: int) -> None:
        nonlocal first
        first = first or time.perf_counter()
        if not arguments.json and token != tokenizer.end_token_id:
            print(stream.push(token), end="", flush=True)

    if not arguments.json and len(model.texts) == 1:  # else the tokens are an answer, no continuation
        print(arguments.prompt, end="", flush=True)
    stop = () if tokenizer.end_token_id is None else (tokenizer.end_token_id,)
    (tokens,) = generator.generate(
        [prompt],
        arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
        stop_token_ids=stop,
        on_token=on_token if arguments.num_beams == 1 else None,
        num_beams=arguments.num_beams,
    )
    if arguments.num_beams > 1:
        for token in tokens:
            on_token(0, token)
    ended = time.perf_counter()
    rate = (len(tokens) - 1) / (ended - first) if len(tokens) > 1 and arguments.num_beams == 1 else None
    if arguments.json:
        text = tokenizer.decode([t for t in tokens if t != tokenizer.end_token_id])
        result = {"preset": arguments.preset, "prompt": arguments.prompt, "text": text, "tokens": tokens}
        result |= {"seconds_to_first_token": first - began, "tokens_per_second": rate}
        print(json.dumps(result, indent=2))
    else:
        print(stream.finish(), flush=True)
        speed = f", then {rate:.0f} tokens/s" if rate else ""
        print(f"[{len(tokens)} tokens; first after {1000 * (first - began):.0f} ms{speed}]", file=sys.stderr)
    return 0


def _encode(arguments: argparse.Namespace) -> int:
    import numpy as np

    from . import encode
    from .checkpoints import load_tokenizer
    from .models import Backbone

    if arguments.output and not arguments.output.endswith(".npy"):
        raise ValueError(f"--output is {arguments.output!r}; it takes a name that ends in .npy")
    model = Backbone.from_preset(arguments.preset, device=_device(arguments.device), dtype=arguments.dtype)
    tokenizer = load_tokenizer(arguments.preset)
    states = encode(model, [tokenizer.encode(text) for text in arguments.text], pool=arguments.pool)
    found = [text.float().cpu().numpy() for text in states]
    if arguments.output:
        longest = max(len(text) for text in found)
        padded = [text if arguments.pool else np.pad(text, ((0, longest - len(text)), (0, 0))) for text in found]
        np.save(arguments.output, np.stack(padded))
    if arguments.json:
        rows = [{"text": text, "states": values.tolist()} for text, values in zip(arguments.text, found)]
        print(json.dumps({"preset": arguments.preset, "pool": arguments.pool, "texts": rows}))
    elif arguments.output:
        print(f"{arguments.output}: {' x '.join(map(str, np.stack(padded).shape))}")
    else:
        for text, values in zip(arguments.text, found):
            print(f"{text}  {' x '.join(map(str, values.shape))}")
            print(np.array2string(values, precision=4, suppress_small=True, max_line_width=120))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from .verify import render, verify

    report = verify(arguments.preset, device=_device(arguments.device), dtype=arguments.dtype)
    print(json.dumps(report, indent=2) if arguments.json else render(report))
    return 0 if report["passed"] else 1


def _bench(arguments: argparse.Namespace) -> int:
    import torch

    from .bench import report
    from .bench.case import DTYPES, Setup
    from .bench.plot import drawable, plot
    from .bench.run import bench

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
    by_name = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
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
    """Says before the measurements what would lose them."""
    from pathlib import Path

    path = Path(name)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{option} is {name!r}, which cannot be written")


def _warm(arguments: argparse.Namespace) -> int:
    from .generation.warm import LENGTHS, warm
    from .models import Backbone

    for option, values in (("--lengths", arguments.lengths), ("--workers", [arguments.workers])):
        if any(value is not None and value < 1 for value in values or ()):
            raise ValueError(f"{option} is {values}; it takes numbers of at least 1")
    report = warm(
        Backbone.from_preset(arguments.preset, device=_device(arguments.device), dtype=arguments.dtype),
        lengths=arguments.lengths or LENGTHS,
        workers=arguments.workers,
        say=lambda text: print(f"warming: {text}", file=sys.stderr, flush=True),
    )
    if arguments.json:
        print(json.dumps({"preset": arguments.preset, **report}, indent=2))
    else:
        counts = f"{report['compiled']} kernels compiled, {report['cached']} there already"
        print(f"{arguments.preset} on {report['device']}: {counts}; {report['seconds']:.1f} s")
    for row in report["failed"]:
        print(f"pyfused: {row['kernel']} does not compile: {row['error']}", file=sys.stderr)
    return 1 if report["failed"] else 0


def _tune(arguments: argparse.Namespace) -> int:
    from . import compile_ahead, evidence, tune
    from .tune import gpu as tune_gpu

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
        left = f"pyfused: {found['skipped']} tiles left out, which do not compile, do not fit or give a wrong output"
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
    from . import evidence

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
    print(f"this machine: {kind}\nasked for a line, in this order:")
    for path in paths:
        print(f"  {path}{'' if path.exists() else ' (not there)'}")
    print(evidence.render(found))
    if tiles:
        print(
            f"tiles of Triton's kernels: {len(tiles)} rows, of which {sum('date' in row for row in tiles)} are measured"
        )
    return 0


def _tiles_in_force() -> tuple[str, list[Path], list[dict[str, object]]]:
    """What evidence calls this machine's GPU, the files that are asked, and their rows of tiles, first asked first."""
    import torch

    from . import dispatch, tiles

    if not (torch.cuda.is_available() or dispatch.interpreting()):
        raise ValueError("--device cuda: no CUDA device (and TRITON_INTERPRET=1 is not set)")
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    rows = [{**row.as_json(), "source": row.source} for row in tiles.rows(device)]
    return "cuda" if device.type == "cuda" else "interpreter", [path for path, _ in tiles.files(device)], rows


if __name__ == "__main__":
    sys.exit(main())
