"""Which commands run a preset? `pyfused generate | encode | verify | warm`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from .parsers import PRESET, check_writable, command


def add(commands: Any) -> None:
    """Adds these commands to the parser."""
    generate = command(commands, "generate", "continue a text, or answer it; the words appear as they are made", _generate)
    generate.add_argument("preset", metavar="PRESET", help=PRESET)
    generate.add_argument("--prompt", required=True, type=_text, metavar="TEXT", help="the text to continue or answer")
    generate.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="N", help="the most tokens to write (default 64)"
    )
    drawn = "0 (the default) takes the likeliest token each time; above 0, tokens are drawn"
    generate.add_argument("--temperature", type=float, default=0.0, metavar="T", help=drawn)
    generate.add_argument("--top-k", type=int, metavar="K", help="draw only from the K likeliest tokens")
    top_p = "draw only from the likeliest tokens that together have probability P"
    generate.add_argument("--top-p", type=float, metavar="P", help=top_p)
    generate.add_argument("--seed", type=int, metavar="N", help="make the draws the same each time")
    beams = "search for the likeliest text with N beams; it is printed at the end"
    generate.add_argument("--num-beams", type=int, default=1, metavar="N", help=beams)

    encode = command(commands, "encode", "turn texts into vectors, the model's hidden states; print or save them", _encode)
    encode.add_argument("preset", metavar="PRESET", help=PRESET)
    again = "a text; give the option again for more texts"
    encode.add_argument("--text", required=True, type=_text, action="append", metavar="TEXT", help=again)
    pool = "make one vector of each text: the first token's (cls) or the mean; by default one for each token"
    encode.add_argument("--pool", choices=("cls", "mean"), help=pool)
    saved = "save an array (texts, D), or without --pool (texts, tokens, D), where zeros fill shorter texts"
    encode.add_argument("--output", metavar="FILE.npy", help=saved)

    verify = command(commands, "verify", "compare every backend with a float64 reference, on a preset's weights", _verify)
    verify.add_argument("preset", metavar="PRESET", help=PRESET)

    warm = command(commands, "warm", "compile a preset's GPU kernels in parallel, before they are needed", _warm)
    warm.add_argument("preset", metavar="PRESET", help=PRESET)
    warm.add_argument("--lengths", type=int, nargs="+", metavar="N", help="how long the texts will be, in tokens")
    warm.add_argument("--workers", type=int, metavar="N", help="how many processes compile; by default one per core")

    for parser in (generate, encode):
        parser.add_argument("--weights", choices=("int8", "int4"), help="round the weights to integers of 8 or 4 bits")
    for parser in (generate, encode, verify, warm):
        parser.add_argument("--device", metavar="DEVICE", help="cpu or cuda[:N]; by default cuda if there is a GPU")
        parser.add_argument("--dtype", metavar="DTYPE", help="float32, float16 or bfloat16; by default the checkpoint's")
        parser.add_argument("--quiet", action="store_true", help="show no progress of downloads and loading")


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
    if arguments.output:
        check_writable(arguments.output, "--output")
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
