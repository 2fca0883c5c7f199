"""Which models do the tests of int8 weights use, and how is a quantised model judged? By its dequantised form."""

import copy

import torch

from pyfused import AlbertBackbone, FNetBackbone, GPT2Backbone, T5Backbone
from pyfused.testing import assert_close

SIZES = {
    "vocabulary_size": 50,
    "num_layers": 2,
    "num_heads": 4,
    "hidden_dim": 32,
    "intermediate_dim": 48,
    "dropout": 0.0,
}
ENCODER = {"embedding_dim": 16, "max_sequence_length": 40}
FNET = {"vocabulary_size": 50, "num_layers": 2, "hidden_dim": 32, "intermediate_dim": 48, "dropout": 0.0}
BACKBONES = {
    "gpt2": lambda **more: GPT2Backbone(**SIZES, max_sequence_length=64, **more),
    "gpt2, own head": lambda **more: GPT2Backbone(**SIZES, max_sequence_length=64, tie_embedding_weights=False, **more),
    "t5": lambda **more: T5Backbone(**SIZES, **more),
    "t5, relu": lambda **more: T5Backbone(**SIZES, activation="relu", use_gated_activation=False, **more),
    "t5, own head": lambda **more: T5Backbone(**SIZES, tie_embedding_weights=False, **more),
    "albert": lambda **more: AlbertBackbone(**SIZES, **ENCODER, **more),
    "fnet": lambda **more: FNetBackbone(**FNET, max_sequence_length=40, **more),
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def spread(model):
    """Weights that make attention and activations differ between tokens."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm.weight" in name else 0.0, 0.1 if p.dim() == 1 else 1.5 * p.shape[-1] ** -0.5)
    return model.eval()


def inputs_of(model):
    ids = torch.randint(50, (3, 20), generator=torch.Generator().manual_seed(5))
    mask = torch.ones(3, 20)
    mask[0, 15:] = 0
    if isinstance(model, T5Backbone):
        decoder = {"decoder_token_ids": ids[:, :9], "decoder_padding_mask": None}
        return {"encoder_token_ids": ids, "encoder_padding_mask": mask, **decoder}
    more = {} if isinstance(model, GPT2Backbone) else {"segment_ids": None}
    return {"token_ids": ids, **({} if isinstance(model, FNetBackbone) else {"padding_mask": mask}), **more}


@torch.no_grad()
def outputs(model):
    """Everything that a backbone returns, and the logits of one that has them."""
    found = model(inputs_of(model))
    found = dict(found) if isinstance(found, dict) else {"hidden": found if torch.is_tensor(found) else found[0]}
    if model.predicts_tokens:
        found["logits"] = model.logits(found.get("decoder_sequence_output", next(iter(found.values()))))
    return found


def assert_same_model(actual, plain):
    """Judges a quantised model by its dequantised form, in its own dtype and in float64."""
    truth = copy.deepcopy(plain).double()
    for name, (found, expected, exact) in joined(outputs(actual), outputs(plain), outputs(truth)).items():
        assert found.dtype == expected.dtype, name
        assert_close(found, expected, exact, name)


def joined(*dicts):
    return {name: [d[name] for d in dicts] for name in dicts[0]}


def kinds(report):
    return {entry.name: entry.kind for entry in report.replaced}


def bytes_of(model):
    return sum(
        t.numel() * t.element_size() for t in {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    )
