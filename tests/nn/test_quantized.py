"""Do QuantizedLinear and QuantizedEmbedding keep their buffers, hooks and flags through casts, copies and files?"""

import copy
import pickle

import pytest
import torch
from quantized_cases import BACKBONES, assert_same_model, outputs, spread
from safetensors.torch import load_model, save_model
from torch import nn

import pyfused
from pyfused import quantize_, unquantize_
from pyfused.nn import QuantizedEmbedding, QuantizedLinear


def test_hooks_flags_and_gradients_stay():
    layer = nn.Linear(8, 4).eval()
    layer.bias.requires_grad_(False)
    bias, calls = layer.bias, []
    layer.note = "mine"
    handle = layer.register_forward_hook(lambda *a: calls.append(1))
    quantize_(layer)
    layer(torch.randn(2, 8))
    assert calls == [1]
    assert layer.bias is bias
    assert not layer.training
    assert layer.note == "mine"
    handle.remove()
    layer(torch.randn(2, 8))
    assert calls == [1]
    unquantize_(layer)
    assert type(layer) is nn.Linear
    assert layer.weight.requires_grad
    assert not layer.bias.requires_grad
    frozen = nn.Linear(8, 4).requires_grad_(False)
    assert not unquantize_(quantize_(frozen) and frozen).weight.requires_grad


@pytest.mark.parametrize("name", BACKBONES)
def test_state_dict_and_copies(name, tmp_path):
    model = spread(BACKBONES[name]())
    quantize_(model)
    state = model.state_dict()
    assert {str(t.dtype) for n, t in state.items() if n.endswith("scale")} == {"torch.float32"}
    fresh = spread(BACKBONES[name]())
    quantize_(fresh)
    fresh.load_state_dict(state)
    save_model(model, tmp_path / "model.safetensors")
    read = spread(BACKBONES[name]())
    quantize_(read)
    load_model(read, tmp_path / "model.safetensors")
    torch.save(model, tmp_path / "model.pt")
    copies = [fresh, read, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model)]
    copies.append(torch.load(tmp_path / "model.pt", weights_only=False))
    expected = outputs(model)
    for made in copies:
        assert all(torch.equal(a, b) for a, b in zip(outputs(made).values(), expected.values()))


def test_casts_keep_the_buffers():
    for make in (lambda: QuantizedLinear(8, 4), lambda: QuantizedEmbedding(8, 4)):
        for cast in (
            lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.double(), lambda m: m.to(torch.float16),
            lambda m: m.type(torch.float16), lambda m: m.to("cpu", torch.bfloat16), lambda m: m.half().float(),
        ):  # fmt: skip
            module = make()
            scale = module.scale.uniform_(0.001, 0.01).clone()
            module.weight.random_(-127, 128)
            weight = module.weight.clone()
            cast(module)
            assert torch.equal(module.weight, weight)
            assert torch.equal(module.scale, scale)
            expected = cast(nn.Linear(2, 2)).weight.dtype
            assert module.dtype == expected
            ids = torch.zeros(2, dtype=torch.int64)
            given = ids if isinstance(module, QuantizedEmbedding) else torch.randn(2, 8).to(expected)
            assert module(given).dtype == expected
    model = spread(BACKBONES["t5"]())
    quantize_(model)
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        model.to(dtype)
        assert model.dtype == dtype
        plain = unquantize_(copy.deepcopy(model))
        if dtype != torch.float64:
            assert_same_model(model, plain)
        else:
            torch.testing.assert_close(outputs(model), outputs(plain))


def test_constructors():
    layer = QuantizedLinear(8, 4, bias=False, dynamic=True, dtype=torch.float16)
    assert "in_features=8, out_features=4, bias=False" in repr(layer)
    assert layer(torch.ones(3, 8, dtype=torch.float16)).shape == (3, 4)
    residual = torch.randn(3, 4, dtype=torch.float16)
    assert torch.equal(layer(torch.ones(3, 8, dtype=torch.float16), residual), residual)
    assert type(unquantize_(layer)) is pyfused.nn.Linear
    assert layer.weight.shape == (4, 8)
    for tied in (True, False):
        table = QuantizedEmbedding(10, 6, tied)
        assert table(torch.tensor([[1, 2]])).shape == (1, 2, 6)
        assert table(torch.randn(1, 2, 6), reverse=True).shape == (1, 2, 10)
        assert ("reverse.weight" in table.state_dict()) != tied
        restored = unquantize_(table)
        assert type(restored) is pyfused.nn.ReversibleEmbedding
        assert restored(torch.tensor([[1, 2]])).shape == (1, 2, 6)
        assert restored(torch.randn(1, 2, 6), reverse=True).shape == (1, 2, 10)
    with pytest.raises(IndexError):
        QuantizedEmbedding(10, 6)(torch.tensor([10]))


def test_linear_agrees_with_the_operator():
    layer = nn.Linear(33, 12)
    quantize_(layer)
    x, residual = torch.randn(2, 5, 33), torch.randn(2, 5, 12)
    expected = pyfused.linear(x, layer.weight, layer.bias, residual=residual, scale=layer.scale)
    assert torch.equal(layer(x, residual), expected)


def test_a_float_weight_is_not_loaded_into_int8():
    layer = nn.Linear(8, 4)
    state = copy.deepcopy(layer.state_dict())
    quantize_(layer)
    kept = layer.weight.clone()
    with pytest.raises(RuntimeError, match=r"weight is torch.float32; this layer is quantised and takes int8"):
        layer.load_state_dict(state, strict=False)
    assert torch.equal(layer.weight, kept)
