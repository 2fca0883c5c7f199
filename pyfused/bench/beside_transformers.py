"""How many tokens a second, beside transformers, on the same weights? `python -m pyfused.bench.beside_transformers PRESET`.

Both continue the same prompt greedily, in turn and several times, on one CPU thread by default. The tokens must be equal. They
may differ only from a token on where two logits are equal up to rounding.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from ..testing.tolerance import judge


def compare(preset: str, prompt: str, new_tokens: int, rounds: int) -> dict[str, float]:
    """Median tokens per second of "pyfused", "transformers" (eager, its own KV cache) and "transformers, fused" (after fuse_).
    Prints them and their ratios to transformers. Raises RuntimeError if the tokens differ."""
    import transformers

    import pyfused
    from pyfused import Tokenizer
    from pyfused.checkpoints import resolve_preset

    directory = resolve_preset(preset)
    model = pyfused.Backbone.from_preset(preset).eval()
    mine = pyfused.Generator(model)
    answers = isinstance(model, pyfused.T5Backbone)
    kind: Any = transformers.T5ForConditionalGeneration if answers else transformers.GPT2LMHeadModel
    plain, fused = (kind.from_pretrained(directory).eval() for _ in range(2))
    pyfused.fuse_(fused)
    tokenizer = Tokenizer.from_preset(preset)
    ids = tokenizer.encode(prompt)
    inputs = torch.tensor([ids])
    options: dict[str, Any] = {
        "max_new_tokens": new_tokens,
        "do_sample": False,
        "pad_token_id": tokenizer.end_token_id,
        "eos_token_id": None,
    }

    def generate(theirs: Any) -> list[int]:
        with torch.no_grad():
            out = theirs.generate(inputs, attention_mask=torch.ones_like(inputs), **options)
        return out[0, 1 if answers else len(ids) :].tolist()

    def scores(theirs: Any, written: list[int]) -> torch.Tensor:
        given = {"input_ids": torch.tensor([ids + written])}
        if answers:
            start = theirs.config.decoder_start_token_id
            given = {"input_ids": inputs, "decoder_input_ids": torch.tensor([[start, *written]])}
        with torch.no_grad():
            return theirs(**given).logits[0, -1]

    providers = {
        "pyfused": lambda: mine.generate([ids], new_tokens)[0],
        "transformers, fused": lambda: generate(fused),
        "transformers": lambda: generate(plain),
    }
    tokens = {name: call() for name, call in providers.items()}
    wide = copy.deepcopy(plain).double()
    for name in providers:
        if not same(tokens[name], tokens["transformers"], lambda t: scores(plain, t), lambda t: scores(wide, t)):
            raise RuntimeError(f"the greedy tokens of {name} and transformers differ on {preset}")
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    for _ in range(rounds):
        for name, call in providers.items():
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    rates = {name: new_tokens / statistics.median(values) for name, values in seconds.items()}
    print(
        f"{preset}, {len(ids)} + {new_tokens} tokens, batch 1, {torch.get_num_threads()} thread(s), greedy tokens checked"
    )
    shown = (f"{name} {rate:.0f} tokens/s ({rate / rates['transformers']:.2f}x)" for name, rate in rates.items())
    print("; ".join(shown))
    return rates


def same(found: list[int], expected: list[int], plain: Callable, exact: Callable) -> bool:
    """Whether two greedy texts are equal, or first differ at tokens whose logits are closer than the tolerance rule's errors.

    Args:
        found, expected: the tokens.
        plain, exact: tokens so far -> logits of the next one (V,), by transformers in its dtype and in float64.
    """
    if found == expected:
        return True
    at = next((i for i, pair in enumerate(zip(found, expected)) if pair[0] != pair[1]), None)
    if at is None:
        return False
    truth, rounded = exact(found[:at]), plain(found[:at])
    best, other = truth[[found[at], expected[at]]]
    return abs(best - other).item() <= 2 * judge(rounded, rounded, truth).worst_bound


def main() -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("preset")
    parser.add_argument("--prompt", default="In the beginning")
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    compare(arguments.preset, arguments.prompt, arguments.new_tokens, arguments.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
