"""Do backbones with int8 weights compute what their integers stand for, and can they be copied, saved and restored?"""

import copy

import pytest
import torch
import torch.nn.functional as F
from quantized_cases import BACKBONES, DTYPES, SIZES, assert_same_model, bytes_of, inputs_of, kinds, outputs, spread
from torch import nn

import pyfused
from pyfused import T5Backbone, quantize_, unquantize_
from pyfused.nn import QuantizedEmbedding, QuantizedLinear


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BACKBONES)
def test_backbone(name, dtype):
    model = spread(BACKBONES[name](dtype=dtype))
    before, float_outputs = copy.deepcopy(model), outputs(model)
    report = quantize_(model)
    linears = {n for n, m in before.named_modules() if isinstance(m, nn.Linear)}
    assert kinds(report) == dict.fromkeys(linears, "Linear") | {"token_embedding": "ReversibleEmbedding"}
    assert {e.name for e in report.left} == {
        n for n in ("position_embedding", "segment_embedding") if hasattr(model, n)
    }
    assert report.bytes_before == bytes_of(before)
    assert report.bytes_after == bytes_of(model) < 0.8 * report.bytes_before
    assert model.dtype == dtype
    assert model.get_config() == before.get_config()
    restored = unquantize_(copy.deepcopy(model))
    assert_same_model(model, restored)
    for key, found in outputs(model).items():
        assert F.cosine_similarity(found.float().flatten(), float_outputs[key].float().flatten(), 0) > 0.9, key


@pytest.mark.parametrize("name", BACKBONES)
def test_unquantize_restores_the_classes(name):
    model = spread(BACKBONES[name]())
    before = copy.deepcopy(model)
    quantize_(model)
    assert unquantize_(model) is model
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in before.named_modules()]
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in before.named_parameters()]
    assert repr(model) == repr(before)
    for (key, p), q in zip(model.named_parameters(), before.parameters()):
        largest = q.abs().amax(-1, keepdim=True) if q.dim() > 1 else 0
        assert ((p - q).abs() <= largest / 254 * 1.001).all(), key
    assert model.load_state_dict(before.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(outputs(model).values(), outputs(before).values()))


def test_encode_and_skip_padding():
    for name in ("albert", "fnet", "t5"):
        model = spread(BACKBONES[name]())
        quantize_(model)
        plain = unquantize_(copy.deepcopy(model))
        rows = [[3, 4, 5, 6, 7], [8, 9]]
        for a, b in zip(pyfused.encode(model, rows), pyfused.encode(plain, rows)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_float16_t5_keeps_what_float16_cannot_hold():
    """Flan-T5's feed-forward networks give more than 65,504."""
    for name in ("t5", "t5, relu"):
        model = spread(BACKBONES[name]())
        with torch.no_grad():
            for layer in model.encoder.layers:
                layer.feed_forward.outer.weight.mul_(2000.0)
        model.half()
        quantize_(model)
        found = outputs(model)
        assert all(t.isfinite().all() for t in found.values())
        states = model.encoder.layers[0].feed_forward(torch.randn(4, 32).half(), wide=True)
        assert states.dtype == torch.float32
        assert_same_model(model, unquantize_(copy.deepcopy(model)))


def test_dynamic_is_passed_on():
    model = spread(BACKBONES["gpt2"]())
    quantize_(model, dynamic=True)
    assert all(m.dynamic for m in model.modules() if isinstance(m, (QuantizedLinear, QuantizedEmbedding)))
    exact = copy.deepcopy(model)
    for m in exact.modules():
        m.dynamic = False
    with pyfused.backend("reference"):
        found, expected = outputs(model)["logits"], outputs(exact)["logits"]
    assert not torch.equal(found, expected)
    assert F.cosine_similarity(found.flatten(), expected.flatten(), 0) > 0.99


def test_training_of_what_is_left():
    """Norms, biases and inputs get the gradients of the dequantised model."""
    for name, scheme in (("gpt2", "int8"), ("t5", "int8"), ("gpt2", "int4")):
        model = spread(BACKBONES[name](dtype=torch.float32))
        quantize_(model, scheme)
        plain = unquantize_(copy.deepcopy(model))
        assert not any(
            "weight" in n and "norm" not in n and p.dim() == 2
            for n, p in model.named_parameters()
            if "position" not in n
        )
        for m in (model, plain):
            m.train()
            out = m(inputs_of(m))
            out = out["decoder_sequence_output"] if isinstance(out, dict) else out
            (out if torch.is_tensor(out) else out[0]).square().sum().backward()
        expected = dict(plain.named_parameters())
        for key, p in model.named_parameters():
            torch.testing.assert_close(
                p.grad, expected[key].grad, rtol=1e-3, atol=1e-3 * float(expected[key].grad.abs().max())
            )


def test_dropout_in_feed_forward():
    model = T5Backbone(**{**SIZES, "dropout": 0.5})
    spread(model)
    quantize_(model)
    plain = unquantize_(copy.deepcopy(model))
    for m in (model, plain):
        torch.manual_seed(3)
        m.train()
    x = torch.randn(2, 5, 32)
    found, expected = [], []
    for m, out in ((model, found), (plain, expected)):
        torch.manual_seed(3)
        out.append(m.encoder.layers[0].feed_forward(x))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_compiled():
    model = spread(BACKBONES["gpt2"]())
    quantize_(model)
    inputs = inputs_of(model)
    with torch.no_grad():
        found, expected = torch.compile(model)(inputs), model(inputs)
    for a, b in zip(
        *(o.values() if isinstance(o, dict) else [o if torch.is_tensor(o) else o[0]] for o in (found, expected))
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
