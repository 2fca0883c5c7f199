"""Does a float32 mask mean the same to a half-precision model? Finite stays finite, -inf hides."""

import pytest
import torch

import pyfused
from pyfused.nn.attention import bias_in

LEAST = torch.finfo(torch.float32).min
HALVES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", HALVES)
def test_the_least_number_stays_finite_and_infinity_stays(dtype):
    bias = torch.tensor([0.0, -1.0, LEAST, -torch.inf, torch.inf])
    expected = torch.tensor([0.0, -1.0, torch.finfo(dtype).min, -torch.inf, torch.inf]).to(dtype)
    assert torch.equal(bias_in(bias, dtype), expected)
    assert bias_in(bias, torch.float32) is bias


@pytest.mark.parametrize("dtype", HALVES)
def test_a_layer(dtype):
    torch.manual_seed(0)
    layer = torch.nn.MultiheadAttention(16, 2, batch_first=True).to(dtype)
    pyfused.fuse_(layer)
    x = torch.randn(2, 5, 16).to(dtype)

    def call(least):
        padding = torch.stack([torch.zeros_like(least), least]).expand(5, 2).t()  # the second text is all padding
        return layer(x, x, x, key_padding_mask=padding, need_weights=False)[0]

    assert torch.equal(call(torch.tensor(LEAST)), call(torch.tensor(torch.finfo(dtype).min, dtype=dtype)))
    assert torch.equal(call(torch.tensor(-torch.inf))[1], layer.out_proj.bias.expand(5, -1))


@pytest.mark.parametrize("dtype", HALVES)
def test_a_backbone(dtype):
    torch.manual_seed(0)
    model = pyfused.GPT2Backbone(
        vocabulary_size=40, num_layers=1, num_heads=2, hidden_dim=16, intermediate_dim=32, max_sequence_length=8, dtype=dtype
    ).eval()
    inputs = {"token_ids": torch.randint(40, (1, 6)), "padding_mask": None}
    least = torch.full((1, 1, 6, 6), torch.finfo(dtype).min, dtype=dtype)
    expected = model({**inputs, "attention_mask": least})
    assert torch.equal(model({**inputs, "attention_mask": torch.full((1, 1, 6, 6), LEAST)}), expected)
    hidden = model({**inputs, "attention_mask": torch.full((1, 1, 6, 6), -torch.inf)})
    assert not torch.equal(hidden, expected)
