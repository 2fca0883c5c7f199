"""ALBERT base with random weights beside transformers, eager and compiled: 8 texts of up to 128 tokens, half of it padding.

Floor: the products of the layers, over the real tokens alone where padding is left out, over all of them where it is not.
"""

import tempfile

import torch

import pyfused
from pyfused.bench import Case

from .peers import references

LENGTHS = (128, 96, 64, 32, 112, 40, 24, 16)  # 512 of 8 * 128


def models(device, dtype):
    """The same random weights, which dtype holds, in transformers' model, in float32, and in pyfused's."""
    from transformers import AlbertConfig, AlbertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "num_hidden_layers": 12}
    theirs = AlbertModel(AlbertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)).to(dtype).float()
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        mine = pyfused.AlbertBackbone.from_preset(directory, device=device, dtype=dtype)
    return mine, theirs.to(device).eval()


def cases(device):
    ids = torch.randint(30000, (8, 128), generator=torch.Generator().manual_seed(1)).to(device)
    mask = torch.arange(128, device=device) < torch.tensor(LENGTHS, device=device)[:, None]
    for dtype in (torch.float32, torch.bfloat16):
        mine, theirs = models(device, dtype)
        compiled = torch.compile(theirs)

        def run(skip, model=mine):
            model.skip_padding = skip
            return model(token_ids=ids, segment_ids=None, padding_mask=mask)["sequence_output"][mask]

        def peer(model):
            return model(input_ids=ids, attention_mask=mask.long()).last_hidden_state[mask]

        with torch.no_grad():
            matrices = 4 * 768 * 768 + 2 * 768 * 3072
            yield Case(
                f"8x128, half padding {str(dtype).removeprefix('torch.')}",
                {
                    "pyfused": lambda run=run: run(True),  # skip_padding
                    "pyfused masked": lambda run=run: run(False),
                    "transformers float32": lambda theirs=theirs: peer(theirs),
                    "torch.compile float32": lambda compiled=compiled: peer(compiled),
                },
                **references(mine, lambda model, run=run: run(False, model)),
                baseline="torch.compile float32",
                flops=2 * matrices * 12 * sum(LENGTHS),
                seconds=60.0,
            )
