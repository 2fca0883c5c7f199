"""What do the models' benchmarks share? The same random weights in transformers' model and in pyfused's, in one dtype."""

import copy
import tempfile
from functools import partial

import torch

import pyfused
from pyfused.bench import Calls
from pyfused.testing import running

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def pair(cls, config, backbone, setup, dtype, weights=None, dynamic=False):
    """(pyfused's model, transformers' model) in eval mode, with the same random weights in this dtype.

    weights: "int8" or "int4" for pyfused's model; transformers' has the values that the integers stand for. Random weights lose
        so much in int4 that the results of others would count as wrong.
    dynamic: as quantize_'s.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    theirs = cls(config).to(dtype).eval()
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        mine = backbone.from_preset(directory, device=setup.device, dtype=dtype)
        if weights:
            pyfused.quantize_(mine, weights, dynamic=dynamic)
            pyfused.unquantize_(copy.deepcopy(mine)).save_to_preset(directory)
            theirs = cls.from_pretrained(directory, config=config, dtype=dtype).eval()
    return mine.eval(), theirs.to(setup.device)


def in_implementation(model, name):
    """A copy of transformers' model with this attn_implementation."""
    other = copy.deepcopy(model)
    other.set_attn_implementation(name)
    return other


def model_calls(mine, theirs, my_call, their_call, *, run=None, peers=None, **options):
    """The Calls of two models.

    my_call, their_call: call(model) returns the result.
    run: the call of pyfused's to time; by default my_call.
    pyfused's own model in plain PyTorch sets the scale of errors, since transformers fails in some dtypes.
    """

    def scale(model=mine):
        with running("reference", strict=False):
            return my_call(model)

    return Calls(
        run or partial(my_call, mine),
        partial(their_call, theirs),
        exact=lambda: scale(copy.deepcopy(mine).double()),
        scale=scale,
        peers=peers or {},
        **options,
    )


def train_calls(mine, theirs, my_call, their_call):
    """Forward and backward without dropout. Compares the gradient of the token embedding for a weighted sum of the result, and
    computes that of every parameter. (The models end in a norm, so a mean square would be constant.)"""
    weights = {}

    def step(call, model):
        parameters, out = list(model.parameters()), call(model)
        embeddings = max(range(len(parameters)), key=lambda i: parameters[i].numel() * (parameters[i].dim() == 2))
        if out.dtype not in weights:
            generator = torch.Generator(out.device).manual_seed(7)
            weights[out.dtype] = torch.randn(out.shape, generator=generator, device=out.device).to(out.dtype)
        return torch.autograd.grad(out, parameters, weights[out.dtype], allow_unused=True)[embeddings]

    return model_calls(mine, theirs, partial(step, my_call), partial(step, their_call), trains=True)
