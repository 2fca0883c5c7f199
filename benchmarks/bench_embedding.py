"""Embeddings of 256 texts by transformers' BERT of MiniLM's shape after pyfused.fuse_(skip_padding=True), random weights.

In batches of 32, as sentence-transformers makes them: the texts sorted by length, longest first, or as they come. A batch is
padded to its longest text. An embedding is the mean of the states of the real tokens.
"""

import copy
from functools import partial

import torch

import pyfused
from pyfused.bench import Calls, Case

from .bench_albert import SMALL
from .models import NO_DROPOUT, in_implementation

MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
BATCH = 32
SHORTEST, LONGEST = 4, 256


def cases(setup):
    texts = 12 if setup.small else 256
    for order in ("sorted by length", "unsorted"):
        name = f"{texts} texts, {order}"
        yield Case(name, torch.float32, partial(embedding, setup, texts, order == "sorted by length"))


def lengths_of(texts):
    """The quantiles of a log-normal distribution, its median 30 tokens, in a random order."""
    places = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(texts) + 0.5) / texts)
    lengths = (30 * torch.exp(0.8 * places)).round().long().clamp(SHORTEST, LONGEST)
    return lengths[torch.randperm(texts, generator=torch.Generator().manual_seed(7))]


def batches_of(lengths, in_order, size):
    """(the texts' places, ids, mask) of each batch."""
    places = lengths.argsort(descending=True) if in_order else torch.arange(len(lengths))
    for rows in places.split(size):
        mask = (torch.arange(int(lengths[rows].max())) < lengths[rows, None]).long()
        yield rows, torch.randint(100, mask.shape) * mask, mask


def embedding(setup, texts, in_order):
    from transformers import BertConfig, BertModel

    config = BertConfig(**(SMALL if setup.small else MINILM), **NO_DROPOUT)
    before = BertModel(config, add_pooling_layer=False).to(setup.device).eval()
    after = copy.deepcopy(before)
    pyfused.fuse_(after, skip_padding=True)
    batches = [
        tuple(t.to(setup.device) for t in batch)
        for batch in batches_of(lengths_of(texts), in_order, 4 if setup.small else BATCH)
    ]

    def embed(model):
        """(texts, D), in the texts' order."""
        found = torch.empty(texts, config.hidden_size, dtype=model.dtype, device=setup.device)
        for rows, ids, mask in batches:
            states = model(ids, attention_mask=mask).last_hidden_state * mask[..., None]
            found[rows] = states.sum(1) / mask.sum(1, keepdim=True)
        return found

    return Calls(
        partial(embed, after),
        partial(embed, before),
        exact=lambda: embed(copy.deepcopy(before).double()),
        peers={"eager": lambda: partial(embed, in_implementation(before, "eager"))},
        baseline="sdpa",
    )
