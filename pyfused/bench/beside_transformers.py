"""How many tokens a second, beside transformers, on the same weights? `python -m pyfused.bench.beside_transformers PRESET`.

Greedy generation of the same prompt by both, one CPU thread by default, in turn and several times; the tokens must be equal.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import torch


def compare(preset: str, prompt: str, new_tokens: int, rounds: int) -> dict[str, float]:
    """Median tokens per second of "pyfused" and "transformers" (eager, its own KV cache); prints both and the ratio."""
    import transformers

    import pyfused
    from pyfused.checkpoints import load_tokenizer, resolve_preset

    directory = resolve_preset(preset)
    model = pyfused.Backbone.from_preset(preset).eval()
    mine = pyfused.Generator(model)
    answers = isinstance(model, pyfused.T5Backbone)
    theirs: Any = (
        transformers.T5ForConditionalGeneration if answers else transformers.GPT2LMHeadModel
    ).from_pretrained(directory)
    theirs.eval()
    tokenizer = load_tokenizer(preset)
    ids = tokenizer.encode(prompt)
    inputs = torch.tensor([ids])
    options: dict[str, Any] = {
        "max_new_tokens": new_tokens,
        "do_sample": False,
        "pad_token_id": tokenizer.end_token_id,
        "eos_token_id": None,
    }

    def run_mine() -> list[int]:
        return mine.generate([ids], new_tokens)[0]

    def run_theirs() -> list[int]:
        with torch.no_grad():
            out = theirs.generate(inputs, attention_mask=torch.ones_like(inputs), **options)
        return out[0, 1 if answers else len(ids) :].tolist()

    if run_mine() != run_theirs():
        raise RuntimeError(f"the greedy tokens of pyfused and transformers differ on {preset}")
    seconds: dict[str, list[float]] = {"pyfused": [], "transformers": []}
    for _ in range(rounds):
        for name, call in (("pyfused", run_mine), ("transformers", run_theirs)):
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    rates = {name: new_tokens / statistics.median(values) for name, values in seconds.items()}
    ratio = rates["pyfused"] / rates["transformers"]
    print(
        f"{preset}, {len(ids)} + {new_tokens} tokens, batch 1, {torch.get_num_threads()} thread(s), greedy tokens equal"
    )
    print(f"pyfused {rates['pyfused']:.0f} tokens/s, transformers {rates['transformers']:.0f} tokens/s: {ratio:.2f}x")
    return rates


def main() -> int:
    """The command line; returns the exit status."""
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
