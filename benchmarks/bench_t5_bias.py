"""One layer of transformers' T5 encoder, base width, after pyfused.fuse_, as the text gets longer: time and peak memory.

transformers makes T5's bias as a tensor (1, H, S, S), and its eager code keeps several of that size; the kernel reads a table.
With 12 heads such a tensor takes 3.2 GB at 8,192 tokens, so there the layer has 2 heads. Memory is measured in a process for
each provider, as in bench_memory.py.
"""

import copy
import os
import subprocess
import sys
from functools import partial

import torch

import pyfused
from pyfused.bench import Calls, Case, Values

from .bench_memory import peak_of
from .models import in_implementation

HEADS = {512: 12, 2048: 12, 8192: 2}  # by length
VOCABULARY = 128  # so that the gradient of the embedding is small
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc then gives freed tensors back, also those of the first call
IMPLEMENTATIONS = {"sdpa": "sdpa", "flex": "flex_attention", "eager": "eager"}


def cases(setup):
    for length, heads in {9: 2}.items() if setup.small else HEADS.items():
        name = f"1x{length}, {heads} heads"
        for way in (forward, train):
            for dtype in setup.model_dtypes if length < 8192 else (torch.float32,):
                yield Case(f"{way.__name__} {name}", dtype, partial(times, setup, way, length, heads, dtype))
            if setup.device == "cpu" and not setup.small:
                yield Case(f"memory of {way.__name__} {name}", torch.float32, partial(peaks, way, length, heads))


def layer(heads, small=False):
    """An encoder of one layer with random weights."""
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_model": 32, "d_ff": 40, "d_kv": 8} if small else {"d_model": 768, "d_ff": 2048, "d_kv": 64}
    options = {"vocab_size": VOCABULARY, "feed_forward_proj": "gated-gelu", "dropout_rate": 0.0}
    return T5EncoderModel(T5Config(**sizes, **options, num_layers=1, num_heads=heads)).eval()


def forward(model, ids):
    return model(ids).last_hidden_state


def train(model, ids):
    """The gradients of the table of biases and of the queries' weights; those of all parameters are computed."""
    out, named = model(ids).last_hidden_state, dict(model.named_parameters())
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.device, out.dtype)
    grads = dict(zip(named, torch.autograd.grad(out, list(named.values()), weights)))
    return tuple(
        grads[f"encoder.block.0.layer.0.SelfAttention.{name}.weight"] for name in ("relative_attention_bias", "q")
    )


def times(setup, way, length, heads, dtype):
    before = layer(heads, setup.small).to(setup.device, dtype)
    after, ids = copy.deepcopy(before), torch.randint(VOCABULARY, (1, length), device=setup.device)
    pyfused.fuse_(after)
    others = {
        name: lambda chosen=chosen: partial(way, in_implementation(before, chosen), ids)
        for name, chosen in IMPLEMENTATIONS.items()
    }
    return Calls(
        partial(way, after, ids),
        others.pop("sdpa")(),
        exact=lambda: way(in_implementation(before, "sdpa").double(), ids),
        peers=others,
        baseline="sdpa",
        trains=way is train,
    )


def peak(provider, way, length, heads):
    """The peak of one call above the memory before it, in MiB."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, ids = layer(heads), torch.randint(VOCABULARY, (1, length))
    if provider == "pyfused":
        pyfused.fuse_(model)
    else:
        model.set_attn_implementation(IMPLEMENTATIONS[provider])
    short = ids if provider == "flex" else ids[:, :8]  # it is compiled for each length
    with torch.set_grad_enabled(way is train):
        return peak_of(partial(way, model, ids), first=partial(way, model, short))


def peaks(way, length, heads):
    """The peak of every provider, in MiB. PyTorch's FlexAttention has no backward on a CPU."""
    values = {}
    for provider in ("pyfused", *IMPLEMENTATIONS):
        if provider != "flex" or way is forward:
            command = [sys.executable, "-m", __name__, provider, way.__name__, str(length), str(heads)]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | ALLOCATOR)
            values[provider] = float(done.stdout.split()[-1])
    return Values("MiB", values)


if __name__ == "__main__":
    provider, way, *sizes = sys.argv[1:]
    print(peak(provider, {"forward": forward, "train": train}[way], *map(int, sizes)))
