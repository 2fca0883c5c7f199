"""Peak memory of one training step of T5 1.1 base, source 512 and target 512 tokens, beside transformers in eager mode.

Each step runs in a process of its own: the most memory that it holds (ru_maxrss) less what it held before the step, when the
weights were there. Gradients, activations and the kernels' buffers are in it, an optimiser is not.

`python -m benchmarks.bench_memory [--batch B] [--save]`; it has no cases for `python -m benchmarks`, as it measures no time.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.bench_t5 import SIZES

SOURCE, TARGET, VOCABULARY = 512, 512, 32128
PROVIDERS = ("pyfused", "transformers, fused", "transformers sdpa", "transformers eager")


def cases(device):
    """None: memory, not time."""
    return ()


def model_of(provider):
    """T5 1.1 base with random weights in training mode, and its call: ids of source and target -> hidden states."""
    if provider == "pyfused":
        import pyfused

        mine = pyfused.T5Backbone(
            VOCABULARY, 12, 12, 768, 2048, key_value_dim=64, activation="gelu_new", dropout=0.1
        ).train()
        return mine, lambda source, target: mine(
            encoder_token_ids=source,
            encoder_padding_mask=None,
            decoder_token_ids=target,
            decoder_padding_mask=None,
        )["decoder_sequence_output"]
    from transformers import T5Config, T5Model

    config = T5Config(**SIZES, feed_forward_proj="gated-gelu", decoder_start_token_id=0)
    config._attn_implementation = "eager" if provider == "transformers eager" else "sdpa"
    theirs = T5Model(config).train()
    if provider == "transformers, fused":
        import pyfused

        pyfused.fuse_(theirs)
    return (
        theirs,
        lambda source, target: theirs(input_ids=source, decoder_input_ids=target, use_cache=False).last_hidden_state,
    )


def step(provider, batch):
    """Runs one step; the peak above what was held before, in MiB."""
    import resource

    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, call = model_of(provider)
    source, target = (torch.randint(VOCABULARY, (batch, length)) for length in (SOURCE, TARGET))
    with torch.no_grad():
        call(source[:, :8], target[:, :8])  # what is loaded and allocated once
    before = held()
    call(source, target).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before


def held():
    """Resident memory now, in MiB."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--provider", choices=PROVIDERS, help="in this process, printing the number alone")
    parser.add_argument("--save", action="store_true", help="write it into benchmarks/results")
    arguments = parser.parse_args()
    if arguments.provider:
        print(step(arguments.provider, arguments.batch))
        return
    found = {}
    for provider in PROVIDERS:
        command = [sys.executable, "-m", "benchmarks.bench_memory", "--batch", str(arguments.batch)]
        ran = subprocess.run([*command, "--provider", provider], check=True, capture_output=True, text=True)
        found[provider] = float(ran.stdout.split()[-1])
        print(f"{provider:<24}{found[provider]:>9.0f} MiB  x{found[provider] / found['pyfused']:.2f}", flush=True)
    if arguments.save:
        from benchmarks.__main__ import HERE, device_label

        path = HERE / "results" / f"{device_label('cpu', 1)}.json"
        content = json.loads(path.read_text())
        name = f"T5 1.1 base, training step, batch {arguments.batch}, {SOURCE} + {TARGET} tokens, float32"
        content.setdefault("peak_memory_mib", {})[name] = found
        path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
