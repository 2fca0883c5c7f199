"""FNet base with random weights beside transformers: two texts of 512 tokens, and a training step.

Lower bound: the matrix products of the feed-forward networks. The mixing is 4% of transformers' eager time. transformers' FNet
has no half precision on a CPU (torch.fft has none): there the baseline is pyfused's own model in plain PyTorch.
"""

from functools import partial

import torch

import pyfused
from pyfused.bench import Case
from pyfused.bench.peers import compiled
from pyfused.testing import running

from .models import NO_DROPOUT, model_calls, pair, train_calls

SMALL = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": 101}


def cases(setup):
    b, s = (2, 9) if setup.small else (2, 512)
    for dtype in setup.model_dtypes:
        yield Case(f"{b}x{s}", dtype, partial(forward, setup, (b, s), dtype))
        trained = (b, s) if dtype == torch.float32 else (1, s // 4)  # a step of plain PyTorch can take minutes
        yield Case("train {}x{}".format(*trained), dtype, partial(train, setup, trained, dtype))


def models(setup, shape, dtype):
    from transformers import FNetConfig, FNetModel

    config = FNetConfig(**(SMALL if setup.small else {}), **{k: v for k, v in NO_DROPOUT.items() if "hidden" in k})
    ids = torch.randint(config.vocab_size, shape, device=setup.device)
    return *pair(FNetModel, config, pyfused.FNetBackbone, setup, dtype), ids


def calls_of(mine, theirs, ids, dtype):
    """The plain model, and the calls of pyfused's and of the plain model."""

    def states(model):
        return model(token_ids=ids, segment_ids=None)["sequence_output"]

    def their_states(model):
        if model is theirs:
            return model(ids).last_hidden_state
        with running("reference", strict=False):
            return states(model)

    return (theirs if dtype == torch.float32 else mine), states, their_states


def forward(setup, shape, dtype):
    mine, theirs, ids = models(setup, shape, dtype)
    plain, states, their_states = calls_of(mine, theirs, ids, dtype)
    peers = compiled(partial(their_states, theirs)) if plain is theirs else {}
    return model_calls(mine, plain, states, their_states, peers=peers)


def train(setup, shape, dtype):
    mine, theirs, ids = models(setup, shape, dtype)
    plain, states, their_states = calls_of(mine, theirs, ids, dtype)
    return train_calls(mine, plain, states, their_states)
