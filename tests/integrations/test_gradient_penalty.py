"""Can a fused model train with a gradient penalty? Whole models' second-order gradients equal the plain model's."""

import copy

import pytest
import torch
from fused_pairs import Trio, padded
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import pyfused
from pyfused.testing import assert_close

transformers = pytest.importorskip("transformers")

EAGER = {"attn_implementation": "eager"}  # torch's fused attention on a CPU cannot be differentiated twice


def gpt2():
    sizes = {"vocab_size": 61, "n_layer": 2, "n_head": 4, "n_embd": 24, "n_positions": 48}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, **EAGER)
    return transformers.GPT2Model(config), {"attention_mask": padded(3, 13, 61)[1]}


def albert():
    sizes = {"vocab_size": 61, "hidden_size": 24, "embedding_size": 24, "num_attention_heads": 4, "intermediate_size": 40}
    config = transformers.AlbertConfig(**sizes, num_hidden_layers=2, **EAGER)
    return transformers.AlbertModel(config, add_pooling_layer=False), {"attention_mask": padded(3, 13, 61)[1]}


def t5(feed_forward="gated-gelu"):
    sizes = {"vocab_size": 61, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4}
    buckets = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20}
    config = transformers.T5Config(**sizes, **buckets, feed_forward_proj=feed_forward, **EAGER)
    decoder_ids, decoder_mask = padded(3, 9, 61, seed=1)
    masks = {"attention_mask": padded(3, 13, 61)[1], "decoder_attention_mask": decoder_mask}
    return transformers.T5Model(config), {**masks, "decoder_input_ids": decoder_ids}


def t5_relu():
    return t5("relu")


def fnet():
    sizes = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 40}
    return transformers.FNetModel(transformers.FNetConfig(**sizes), add_pooling_layer=False), {}


@pytest.mark.parametrize("family", [gpt2, albert, t5, t5_relu, fnet], ids=lambda f: f.__name__)
def test_of_transformers(family):
    model, inputs = family()
    trio = Trio(model)
    assert trio.report.replaced
    embeddings = torch.randn(3, 13, 24, dtype=torch.float64, requires_grad=True)

    def loss(output):
        hidden = output.last_hidden_state
        (g,) = torch.autograd.grad(hidden.sin().sum(), embeddings, create_graph=True)
        return hidden.square().mean() + g.square().mean()

    trio.check_gradients(loss, inputs_embeds=embeddings, **inputs)


class Layers(nn.Module):
    """torch.nn's layers, with padding."""

    def __init__(self, norm_first):
        super().__init__()
        options = {"dropout": 0.0, "batch_first": True, "activation": "gelu", "norm_first": norm_first}
        self.layer = nn.TransformerEncoderLayer(24, 4, 40, **options)
        self.attention = nn.MultiheadAttention(24, 4, batch_first=True)
        self.norms = nn.Sequential(nn.LayerNorm(24), nn.RMSNorm(24))

    def forward(self, x, padding):
        y = self.layer(x, src_key_padding_mask=padding)
        return self.norms(y + self.attention(y, x, x, key_padding_mask=padding, need_weights=False)[0])


@pytest.mark.parametrize("norm_first", [False, True])
def test_of_torch_nn(norm_first):
    plain = Layers(norm_first)
    truth, fused = copy.deepcopy(plain).double(), copy.deepcopy(plain)
    assert pyfused.fuse_(fused).replaced
    x, padding = torch.randn(3, 9, 24), torch.arange(9) >= torch.tensor([9, 4, 6])[:, None]

    def gradients(model):
        given = x.to(next(model.parameters()).dtype).requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):
            y = model(given, padding)
            (g,) = torch.autograd.grad(y.sin().sum(), given, create_graph=True)
            grads = torch.autograd.grad(y.square().mean() + g.square().mean(), list(model.parameters()))
        return dict(zip(dict(model.named_parameters()), grads, strict=True))

    found, expected, exact = gradients(fused), gradients(plain), gradients(truth)
    for name, grad in found.items():
        assert_close(grad, expected[name], exact[name], name)
