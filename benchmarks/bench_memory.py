"""Peak memory of one training step of T5 1.1 base, source 512 and target 512 tokens, beside transformers in eager mode.

Each step runs in its own process. The number is the process's peak memory during the step minus its memory before it, when
the weights are loaded. It includes gradients, activations and the kernels' buffers, but no optimiser.
"""

import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

from pyfused.bench import Case, Values

from .bench_t5 import SIZES

SOURCE, TARGET, VOCABULARY = 512, 512, 32128
PROVIDERS = ("pyfused", "transformers, fused", "transformers sdpa", "transformers eager")


def cases(setup):
    if setup.device == "cpu" and not setup.small:
        for batch in (1, 4):
            name = f"T5 1.1 base, training step {batch}x{SOURCE} + {TARGET}"
            yield Case(name, torch.float32, partial(peaks, batch))


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
    """Runs one step and returns the peak memory above that before the step, in MiB."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, call = model_of(provider)
    source, target = (torch.randint(VOCABULARY, (batch, length)) for length in (SOURCE, TARGET))

    def first():
        with torch.no_grad():
            call(source[:, :8], target[:, :8])

    peak = peak_of(lambda: call(source, target).square().mean().backward(), first)
    assert all(p.grad is not None for p in model.parameters())
    return peak


def peak_of(call, first):
    """The peak memory of this process during call() above that before it, in MiB.

    first: loads, compiles and allocates whatever the process needs once.
    """
    first()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew; ru_maxrss would begin at the parent's peak
    before = _memory("VmRSS")
    call()
    return _memory("VmHWM") - before


def _memory(which):
    """The process's resident memory, now (VmRSS) or at its peak (VmHWM), in MiB."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith(which)) / 1024


def peaks(batch):
    """The peak of every provider, in MiB."""
    values = {}
    for provider in PROVIDERS:
        command = [sys.executable, "-m", __name__, provider, str(batch)]
        values[provider] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    return Values("MiB", values)


if __name__ == "__main__":
    print(step(sys.argv[1], int(sys.argv[2])))
