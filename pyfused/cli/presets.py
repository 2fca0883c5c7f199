"""Which commands run a preset? `pyfused generate | encode | verify | warm`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from .hub import PRESET


def add(commands: Any) -> None:
    """Adds these commands to the parser."""
    generate = commands.add_parser("generate", help="continue a text, or answer it, streaming to the terminal")
    generate.add_argument("preset", metavar="PRESET", help=PRESET)
    generate.add_argument("--prompt", required=True, type=_text, metavar="TEXT", help="what to continue or answer")
    generate.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="at most so many (default 64)")
    generate.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0 (default) takes the likeliest token; above 0 tokens are drawn",
    )
    generate.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens alone")
    generate.add_argument(
        "--top-p", type=float, metavar="P", help="draw from the likeliest tokens that together have probability P"
    )
    generate.add_argument("--seed", type=int, metavar="N", help="the same draws each time")
    generate.add_argument(
        "--num-beams",
        type=int,
        default=1,
        metavar="N",
        help="search for the likeliest text with N beams, printed at the end",
    )
    generate.set_defaults(run=_generate)

    encode = commands.add_parser("encode", help="hidden states of texts, printed or saved")
    encode.add_argument("preset", metavar="PRESET", help=PRESET)
    encode.add_argument(
        "--text", required=True, type=_text, action="append", metavar="TEXT", help="may be given several times"
    )
    encode.add_argument("--pool", choices=("cls", "mean"), help="one vector a text instead of one a token")
    encode.add_argument(
        "--output", metavar="FILE.npy", help="save (texts, D), or (texts, tokens, D) with shorter texts padded by zeros"
    )
    encode.set_defaults(run=_encode)

    verify = commands.add_parser(
        "verify", help="compare every backend with the float64 reference on a preset's weights"
    )
    verify.add_argument("preset", metavar="PRESET", help=PRESET)
    verify.set_defaults(run=_verify)

    warm = commands.add_parser("warm", help="compile a preset's kernels ahead of use, in parallel")
    warm.add_argument("preset", metavar="PRESET", help=PRESET)
    warm.add_argument("--lengths", type=int, nargs="+", metavar="N", help="lengths of the expected texts, in tokens")
    warm.add_argument("--workers", type=int, metavar="N", help="compiling processes; by default one per core")
    warm.set_defaults(run=_warm)

    for command in (generate, encode):
        command.add_argument(
            "--weights",
            choices=("int8", "int4"),
            help="round the weights to 8 bits, a quarter of float32, or to 4 bits",
        )
    for command in (generate, encode, verify, warm):
        command.add_argument("--device", metavar="DEVICE", help="cpu (default without a GPU) or cuda[:N]")
        command.add_argument(
            "--dtype", metavar="DTYPE", help="float32, float16 or bfloat16; the checkpoint's by default"
        )
        command.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        command.add_argument("--quiet", action="store_true", help="no progress of downloads and loading")


def _text(argument: str) -> str:
    """An argument as text. Python passes bytes that the locale cannot decode as lone surrogates. Here they are read as UTF-8,
    or replaced."""
    return argument.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _device(name: str | None) -> str:
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(f"--device {name!r} is not a device; it takes cpu or cuda[:N]") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name!r} is not supported; it takes cpu or cuda[:N]")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name!r}: no CUDA device here")
    return str(device)


def _model(arguments: argparse.Namespace) -> Any:
    """The preset's backbone as the options say."""
    from ..models import Backbone
    from ..quantize import quantize_all_

    model = Backbone.from_preset(arguments.preset, device=_device(arguments.device), dtype=arguments.dtype).eval()
    if arguments.weights is not None:
        quantize_all_(model, arguments.weights, "--weights")
    return model


def _generate(arguments: argparse.Namespace) -> int:
    from .. import Generator, Tokenizer

    model = _model(arguments)
    tokenizer = Tokenizer.from_preset(arguments.preset)
    prompt = tokenizer.encode(arguments.prompt)
    stream, generator = tokenizer.stream(), Generator(model)
    began, first = time.perf_counter(), 0.0
    # A decoder alone continues its prompt; T5 answers it. With the first token, so that an error has a line of its own.
    echo = arguments.prompt if len(model.texts) == 1 else ""

    def on_token(_row: int, token: int) -> None:
        nonlocal first, echo
        first = first or time.perf_counter()
        if not arguments.json:
            print(echo, end="")
            echo = ""
        if not arguments.json and token != tokenizer.end_token_id:
            print(stream.push(token), end="", flush=True)

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

    from .. import Tokenizer, encode

    if arguments.output and not arguments.output.endswith(".npy"):
        raise ValueError(f"--output is {arguments.output!r}; it takes a name that ends in .npy")
    model, tokenizer = _model(arguments), Tokenizer.from_preset(arguments.preset)
    states = encode(model, [tokenizer.encode(text) for text in arguments.text], pool=arguments.pool)
    arrays = [text.float().cpu().numpy() for text in states]
    if arguments.output:
        longest = max(len(text) for text in arrays)
        padded = [text if arguments.pool else np.pad(text, ((0, longest - len(text)), (0, 0))) for text in arrays]
        np.save(arguments.output, np.stack(padded))
    if arguments.json:
        rows = [{"text": text, "states": values.tolist()} for text, values in zip(arguments.text, arrays)]
        print(json.dumps({"preset": arguments.preset, "pool": arguments.pool, "texts": rows}))
    elif arguments.output:
        print(f"{arguments.output}: {' x '.join(map(str, np.stack(padded).shape))}")
    else:
        for text, values in zip(arguments.text, arrays):
            print(f"{text}  {' x '.join(map(str, values.shape))}")
            print(np.array2string(values, precision=4, suppress_small=True, max_line_width=120))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from ..verify import render, verify

    report = verify(arguments.preset, device=_device(arguments.device), dtype=arguments.dtype)
    print(json.dumps(report, indent=2) if arguments.json else render(report))
    return 0 if report["passed"] else 1


def _warm(arguments: argparse.Namespace) -> int:
    from ..generation.warm import LENGTHS, warm
    from ..models import Backbone

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
