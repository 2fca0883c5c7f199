"""ALBERT base with random weights beside transformers: 8 texts of up to 128 tokens, half of it padding, and a training step.

Lower bound: the layers' matrix products, over the real tokens with skip_padding, otherwise over all tokens.
"""

from functools import partial

import torch

import pyfused
from pyfused.bench import Case
from pyfused.bench.peers import compiled
from pyfused.bench.peers_models import exported

from .models import NO_DROPOUT, model_calls, pair, train_calls

LENGTHS = 128, 96, 64, 32, 112, 40, 24, 16  # 512 of 8 * 128
BASE = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "num_hidden_layers": 12}
SMALL = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "vocab_size": 101,
}


def cases(setup):
    lengths = (9, 5) if setup.small else LENGTHS
    size = f"{len(lengths)}x{max(lengths)}"
    for dtype in setup.model_dtypes:
        yield Case(f"{size}, half padding, skip_padding", dtype, partial(forward, setup, lengths, True, dtype))
        yield Case(f"{size}, half padding", dtype, partial(forward, setup, lengths, False, dtype))
        trained = lengths if dtype == torch.float32 else lengths[:1]  # plain PyTorch can take minutes
        yield Case(f"train {len(trained)}x{max(trained)}", dtype, partial(train, setup, trained, dtype))


def models(setup, lengths, dtype):
    from transformers import AlbertConfig, AlbertModel

    config = AlbertConfig(**(SMALL if setup.small else BASE), **NO_DROPOUT)
    ids = torch.randint(config.vocab_size, (len(lengths), max(lengths)), device=setup.device)
    mask = torch.arange(ids.shape[1], device=setup.device) < torch.tensor(lengths, device=setup.device)[:, None]
    return *pair(AlbertModel, config, pyfused.AlbertBackbone, setup, dtype), ids, mask


def calls_of(ids, mask):
    """The calls of pyfused's and of transformers' model. They return the states of the real tokens."""

    def states(model):
        return model(token_ids=ids, segment_ids=None, padding_mask=mask)["sequence_output"][mask]

    def their_states(model):
        return model(input_ids=ids, attention_mask=mask.long()).last_hidden_state[mask]

    return states, their_states


def forward(setup, lengths, skip, dtype):
    mine, theirs, ids, mask = models(setup, lengths, dtype)
    mine.skip_padding = skip
    states, their_states = calls_of(ids, mask)

    def output(model, ids, mask):
        return model(input_ids=ids, attention_mask=mask).last_hidden_state

    def after(states):
        return states[mask]

    peers = {}
    if skip:
        peers = {**compiled(partial(their_states, theirs)), **exported(theirs, output, (ids, mask.long()), after)}
    return model_calls(mine, theirs, states, their_states, peers=peers)


def train(setup, lengths, dtype):
    mine, theirs, ids, mask = models(setup, lengths, dtype)
    return train_calls(mine, theirs, *calls_of(ids, mask))
