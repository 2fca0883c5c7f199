"""FNet base with random weights beside transformers, eager and compiled: two texts of 512 tokens.

Floor: the products of the feed-forward networks; the mixing is 4% of transformers' eager time.
"""

import tempfile

import torch

import pyfused
from pyfused.bench import Case

from .peers import references


def models(device, dtype):
    """The same random weights, which dtype holds, in transformers' model, in float32, and in pyfused's."""
    from transformers import FNetConfig, FNetModel

    torch.manual_seed(0)
    theirs = FNetModel(FNetConfig()).to(dtype).float()
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        mine = pyfused.FNetBackbone.from_preset(directory, device=device, dtype=dtype)
    return mine, theirs.to(device).eval()


def cases(device):
    ids = torch.randint(32000, (2, 512), generator=torch.Generator().manual_seed(1)).to(device)
    for dtype in (torch.float32, torch.bfloat16):
        mine, theirs = models(device, dtype)
        compiled = torch.compile(theirs)

        def run(model=mine):
            return model(token_ids=ids, segment_ids=None)["sequence_output"]

        with torch.no_grad():
            yield Case(
                f"2x512 {str(dtype).removeprefix('torch.')}",
                {
                    "pyfused": run,
                    "transformers float32": lambda theirs=theirs: theirs(ids).last_hidden_state,
                    "torch.compile float32": lambda compiled=compiled: compiled(ids).last_hidden_state,
                },
                **references(mine, run),
                baseline="torch.compile float32",
                flops=2 * 12 * 2 * 768 * 3072 * 1024,
                seconds=40.0,
            )
