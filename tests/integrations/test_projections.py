"""Do the projections of attention run on pyfused.linear where that pays, and on the class's own code elsewhere?"""

import copy
import pickle

import pytest
import torch
import transformers as hf
from fused_pairs import Trio, check_changed_child, counted, padded
from hf_cases import BERT, DECODER, GPT2, VOCABULARY, livened, tokens
from torch import nn

import pyfused
from pyfused.integrations.transformers import projections
from pyfused.own_forward import is_fused
from pyfused.testing import assert_close

MODELS = {
    "BERT": lambda: hf.BertModel(hf.BertConfig(**BERT)),
    "MPNet": lambda: hf.MPNetModel(hf.MPNetConfig(**BERT)),
    "Llama": lambda: hf.LlamaModel(hf.LlamaConfig(**DECODER)),
    "GPT-2": lambda: hf.GPT2Model(hf.GPT2Config(**GPT2)),
}
COUNTS = {"BERT": 6, "MPNet": 8, "Llama": 8, "GPT-2": 4}  # GPT-2's keys and values lie in one Conv1D with the queries


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch):
    monkeypatch.setattr(projections, "WORTH_A_CALL", 0)


@pytest.fixture
def products(monkeypatch):
    return counted(monkeypatch, projections, "linear")


@pytest.mark.parametrize("name", MODELS)
def test_outputs(name, products):
    trio, (ids, mask) = Trio(livened(MODELS[name]())), padded(2, 9, VOCABULARY)
    trio.check(live=mask, input_ids=ids, attention_mask=mask)
    assert products["linear"] >= min(COUNTS[name], 6)
    notes = [entry.note for entry in trio.report.replaced if entry.kind in ("Linear", "Conv1D")]
    assert notes == ["pyfused.linear"] * COUNTS[name]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    ids, mask = padded(2, 9, VOCABULARY)
    Trio(livened(MODELS["BERT"]()), dtype=dtype).check(live=mask, input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize("name, place", [("BERT", "encoder.layer.0.attention.self.query"), ("GPT-2", "h.0.attn.c_attn")])
def test_where_the_own_code_runs(products, name, place):
    """Where a gradient is wanted, in a trace, for one row or many, and in float64."""
    model = livened(MODELS[name]())
    pyfused.fuse_(model)
    layer, x = model.get_submodule(place), torch.randn(2, 3, 32)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad():
        layer(x[:1, :1]), layer(x.repeat(1, 50, 1))
        torch.compile(layer, backend="eager", fullgraph=True)(x)
        copy.deepcopy(layer).double()(x.double())
        assert products == {"linear": 0}
        torch.testing.assert_close(layer(x), type(layer).forward(layer, x))
        assert products == {"linear": 1}
        layer.requires_grad_(False)
    layer(x)
    assert products == {"linear": 2}
    layer(x.requires_grad_()).sum().backward()
    assert products == {"linear": 2}
    assert x.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name, place", [("BERT", "encoder.layer.0.attention.self.query"), ("GPT-2", "h.0.attn.c_attn")])
def test_half_precision_trains_and_takes_any_rows(products, name, place, dtype):
    model = livened(MODELS[name]())
    pyfused.fuse_(model)
    layer = model.get_submodule(place).to(dtype)
    for count, rows in enumerate((1, 3, 300), start=1):
        x = torch.randn(rows, 32).to(dtype).requires_grad_()
        given = x, layer.weight, layer.bias
        grad = torch.randn_like(layer(x))
        assert products == {"linear": 2 * count - 1}
        found = torch.autograd.grad(layer(x), given, grad)
        near = torch.autograd.grad(type(layer).forward(layer, x), given, grad)
        wide = copy.deepcopy(layer).double()
        wide_x = x.detach().double().requires_grad_()
        exact = torch.autograd.grad(type(wide).forward(wide, wide_x), (wide_x, wide.weight, wide.bias), grad.double())
        for one in zip(found, near, exact, strict=True):
            assert_close(*one)


@pytest.mark.parametrize("place", ["query", "value"])
def test_replaced_and_hooked_later(place):
    ids = tokens(2, 9)
    trio = Trio(livened(MODELS["BERT"]()))
    check_changed_child(trio, lambda model: model.encoder.layer[0].attention.self, place, input_ids=ids)


@torch.no_grad()
@pytest.mark.parametrize("name, place", [("BERT", "encoder.layer.0.attention.self.query"), ("GPT-2", "h.0.attn.c_attn")])
def test_a_class_that_is_patched_later(monkeypatch, name, place):
    model, x = livened(MODELS[name]()), torch.randn(2, 3, 32)
    pyfused.fuse_(model)
    layer = model.get_submodule(place)
    kind, before = type(layer), layer(x)
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: forward(self, x) * 0.5)
    torch.testing.assert_close(layer(x), before * 0.5)


@torch.no_grad()
@pytest.mark.parametrize("place", ["attention.self.query", "intermediate.dense", "output.dense"])
def test_a_sparse_weight_is_left_to_torch(place):
    ids, model = tokens(2, 9), livened(MODELS["BERT"]())
    expected = model(ids).last_hidden_state
    pyfused.fuse_(model, linear=True)
    layer = model.encoder.layer[0].get_submodule(place)
    layer.weight = nn.Parameter(layer.weight.to_sparse_csr(), requires_grad=False)
    torch.testing.assert_close(model(ids).last_hidden_state, expected)


class Own(nn.Linear):
    """As LoRA and quantisation have them."""


def test_linear_layers_that_are_fused_stay_so():
    model = livened(MODELS["BERT"]())
    pyfused.fuse_(model, linear=True)
    before = model.encoder.layer[0].attention.self.query.forward.func
    pyfused.fuse_(model)
    assert model.encoder.layer[0].attention.self.query.forward.func is before


def test_a_parametrized_layer_computes_its_weight_once():
    model = livened(MODELS["BERT"]())
    pyfused.fuse_(model)
    layer, calls = model.encoder.layer[0].attention.self.query, []

    class Counted(nn.Module):
        def forward(self, weight):
            calls.append(1)
            return weight

    nn.utils.parametrize.register_parametrization(layer, "weight", Counted())
    calls.clear()
    with torch.no_grad():
        layer(torch.randn(2, 3, 32))
    assert len(calls) == 1


def test_what_is_left(monkeypatch):
    """Layers of a class of their own, what filter_fn does not want, small ones, and the linear layers beside attention."""
    model = livened(MODELS["BERT"]())
    attention = model.encoder.layer[0].attention.self
    attention.key = Own(32, 32)
    pyfused.fuse_(model, filter_fn=lambda name, module: not name.endswith("query"))
    fused = [name for name, module in attention.named_children() if is_fused(module)]
    assert fused == ["value"]
    assert not is_fused(model.pooler.dense)
    pyfused.unfuse_(model)
    assert not is_fused(attention.value)
    monkeypatch.setattr(projections, "WORTH_A_CALL", 32 * 32 + 1)
    pyfused.fuse_(model)
    assert not is_fused(attention.value)
    for least in (32 * 32 + 1, 32 * 32):
        half = livened(MODELS["BERT"]()).bfloat16()
        monkeypatch.setattr(projections, "WORTH_IN_HALF", least)
        pyfused.fuse_(half)
        assert is_fused(half.encoder.layer[0].attention.self.value) == (least == 32 * 32)


def test_copies():
    model, ids = livened(MODELS["BERT"]()), tokens(2, 9)
    names = list(model.state_dict())
    pyfused.fuse_(model)
    assert list(model.state_dict()) == names
    with torch.no_grad():
        expected = model(ids)[0]
        for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert is_fused(clone.encoder.layer[1].attention.self.key)
            assert torch.equal(clone(ids)[0], expected)
