"""Does quantize_ replace the right modules, and does its report say what it did and left?"""

import copy

import pytest
import torch
from quantized_cases import BACKBONES, DTYPES, assert_same_model, kinds, spread
from torch import nn
from torch.nn.utils import prune

import pyfused
from pyfused import GPT2Backbone, quantize_, unquantize_
from pyfused.nn import QuantizedLinear
from pyfused.testing import assert_close


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(30, 8)
        self.positions = nn.Embedding(30, 8)
        self.first = nn.Linear(8, 16)
        self.again = self.first
        self.norm = nn.LayerNorm(16)
        self.last = nn.Linear(16, 8, bias=False)
        self.head = nn.Linear(8, 30)
        self.head.weight = self.table.weight

    def forward(self, ids):
        x = self.table(ids) + self.positions(ids)
        return self.head(self.last(self.norm(self.first(x).relu())))


def test_any_model():
    model = Model()
    report = quantize_(model)
    assert kinds(report) == {"table": "Embedding", "head": "Linear", "first": "Linear", "last": "Linear"}
    assert [entry.name for entry in report.left] == ["positions"]
    assert model.again is model.first
    assert str(report).splitlines()[0] == "replaced: 4"
    assert f"bytes: {report.bytes_before:,} before" in str(report)
    ids = torch.arange(30)[None]
    plain = unquantize_(copy.deepcopy(model))
    torch.testing.assert_close(model(ids), plain(ids))
    assert type(plain.table) is nn.Embedding
    assert plain.head.weight is plain.table.weight


def test_rounding():
    layer = nn.Linear(40, 6)
    with torch.no_grad():
        layer.weight[2] = 0
        layer.weight[3] *= 1e-30
        layer.weight[4, 7] = 1000.0
    weight = layer.weight.detach().clone()
    quantize_(layer)
    assert layer.weight.dtype == torch.int8
    assert torch.equal(layer.weight.abs().amax(1), torch.tensor([127, 127, 0, 127, 127, 127], dtype=torch.int8))
    assert layer.scale[2] == 1
    assert ((layer.dequantized() - weight).abs() <= weight.abs().amax(1, keepdim=True) / 254 * 1.0001).all()
    assert not layer(torch.zeros(1, 40)).sub(layer.bias).any()


def left_of(change):
    model = Model()
    changed = change(model)
    weight = model.last._parameters.get("weight")
    before = weight.clone() if type(weight) is nn.Parameter else None
    report = quantize_(model)
    assert model.last._parameters.get("weight") is weight
    assert before is None or before.is_meta or torch.equal(weight, before)
    return {entry.name: entry.note for entry in report.left if entry.name != "positions"}, changed


def test_what_is_left_says_why():
    def subclass(model):
        class Own(nn.Linear):
            pass

        model.last = Own(16, 8)

    def forward(model):
        model.last.forward = lambda x: x

    def weight_norm(model):
        nn.utils.parametrizations.weight_norm(model.last)

    def pruned(model):
        prune.random_unstructured(model.last, "weight", 0.5)

    def infinite(model):
        with torch.no_grad():
            model.last.weight[0, 0] = float("inf")

    def buffer(model):
        model.last.register_buffer("mask", torch.ones(3))

    def shared(model):
        model.tied = nn.Bilinear(16, 16, 8)
        model.tied.bias = None
        model.tied.weight = model.last.weight

    reasons = {
        subclass: "its class is Own",
        forward: "a forward of its own",
        weight_norm: "is computed at every call",
        pruned: "is computed at every call",
        infinite: "holds NaN or infinity",
        buffer: "has the buffers mask",
        shared: "tied.weight too",
        lambda m: m.last.double(): "is float64",
        lambda m: m.last.to("meta"): "meta device",
        lambda m: setattr(m, "last", nn.Linear(0, 8)): "is empty",
        lambda m: setattr(m, "last", nn.LazyLinear(8)): "its class is LazyLinear",
        lambda m: quantize_(m.last): "is quantised already",
    }
    for change, reason in reasons.items():
        left, _ = left_of(change)
        assert list(left) == ["last"], (reason, left)
        assert reason in left["last"]


def test_members_of_a_group_stay_together():
    model = Model()
    report = quantize_(model, filter_fn=lambda name, module: name != "head")
    notes = {entry.name: entry.note for entry in report.left}
    assert notes["head"] == "filter_fn says no"
    assert "shares its weight with head" in notes["table"]
    assert model.head.weight is model.table.weight
    assert type(model.first) is QuantizedLinear


def test_readers_of_weights_are_left():
    """torch's layers read these weights past the modules."""
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), nn.Linear(16, 4)).eval()
    x = torch.randn(2, 5, 16)
    expected = model[0](x)
    report = quantize_(model)
    assert kinds(report) == {"1": "Linear"}
    assert {entry.name for entry in report.left} == {"0.linear1", "0.linear2", "0.self_attn.out_proj"}
    torch.testing.assert_close(model[0](x), expected)


def test_mixed_policy_is_left():
    model = GPT2Backbone.from_config({**BACKBONES["gpt2"]().get_config(), "dtype": "mixed_bfloat16"})
    report = quantize_(model)
    assert not report.replaced
    assert any("mixed policy" in entry.note for entry in report.left)


def test_filter_and_second_call():
    model = spread(BACKBONES["gpt2"]())
    seen = []
    report = quantize_(model, filter_fn=lambda name, module: seen.append(name) or "feed_forward" in name)
    assert all("feed_forward" in name for name in kinds(report))
    assert "token_embedding" in seen
    again = quantize_(model)
    assert not any("feed_forward" in name for name in kinds(again))
    assert sum(entry.note == "is quantised already" for entry in again.left) == len(report.replaced)
    assert not quantize_(model).replaced
    assert_same_model(model, unquantize_(copy.deepcopy(model)))


@pytest.mark.parametrize("part", ["inner", "outer", "gate", "up"])
def test_half_of_a_feed_forward(part):
    """One quantised layer beside others that are not."""
    for name in ("t5", "t5, relu"):
        for dtype in DTYPES:
            model = spread(BACKBONES[name](dtype=dtype))
            quantize_(model, filter_fn=lambda n, m: n.endswith(part))
            assert_same_model(model, unquantize_(copy.deepcopy(model)))


def test_drop_in_feed_forward_networks():
    for kind in (pyfused.nn.FeedForward, pyfused.nn.GatedFeedForward):
        for dtype in DTYPES:
            module = kind(16, 24).to(dtype)
            quantize_(module)
            plain = unquantize_(copy.deepcopy(module))
            x, residual = torch.randn(5, 16).to(dtype), torch.randn(5, 16).to(dtype)
            truth = copy.deepcopy(plain).double()(x.double(), residual.double())
            assert_close(module(x, residual), plain(x, residual), truth)
        module = kind(16, 24).half()
        module.wo.float()
        quantize_(module)
        assert module(torch.randn(5, 16).half()).dtype == torch.float32


@pytest.mark.parametrize(
    "given, error, message",
    [
        (("model",), TypeError, "model is a str; it takes a torch.nn.Module"),
        ((nn.Linear(1, 1), "int3"), ValueError, "scheme is 'int3'; it takes 'int8' or 'int4'"),
        ((nn.Linear(1, 1), ["int4"]), ValueError, r"scheme is \['int4'\]; it takes 'int8' or 'int4'"),
        ((nn.Linear(1, 1), 8), ValueError, "scheme is 8"),
    ],
)
def test_bad_input(given, error, message):
    with pytest.raises(error, match=message):
        quantize_(*given)
    with pytest.raises(TypeError, match="dynamic is 1; it takes True or False"):
        quantize_(nn.Linear(1, 1), dynamic=1)
    with pytest.raises(ValueError, match="dynamic is True; with scheme 'int4' it takes False"):
        quantize_(nn.Linear(1, 1), "int4", dynamic=True)
    with pytest.raises(TypeError, match="filter_fn is a str"):
        quantize_(nn.Linear(1, 1), filter_fn="all")
    with pytest.raises(TypeError, match="model is a str"):
        unquantize_("model")
