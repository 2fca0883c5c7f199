"""Does fuse_ leave alone what only looks like a usual shape, and what changed later?"""

import copy
import pickle

import pytest
import torch
import transformers as hf
from hf_cases import BERT, DECODER, T5, livened, tokens
from torch import nn

import pyfused
from pyfused.integrations.transformers import shapes


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.act, self.scale, self.seen = nn.Linear(8, 16), nn.Linear(16, 8), nn.GELU(), 1.0, []
        self.norm, self.dense = nn.LayerNorm(8), nn.Linear(8, 8)

    def usual(self, x):
        return self.down(self.act(self.up(x)))


class OtherInTraining(Part):
    def forward(self, x):
        return self.down(self.act(self.act(self.up(x)))) if self.training else self.usual(x)


class Remembers(Part):
    def forward(self, x):
        self.seen.append(x)
        return self.usual(x)


class Draws(Part):
    def forward(self, x):
        return x if torch.rand(1).item() < 0.0 else self.usual(x)


class LaterScaled(Part):
    def forward(self, x):
        return self.usual(x) * self.scale if self.scale != 1.0 else self.usual(x)


class HalfOfIt(Part):
    def forward(self, x):
        return self.norm(torch.add(x, self.dense(x), alpha=0.5))


class Cubes(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(8)), 1e-3

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(exponent=3).mean(-1, keepdim=True) + self.eps))


class OutputOfHalf(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x, residual):
        return self.norm(torch.add(residual, self.dense(x), alpha=0.5))


@pytest.mark.parametrize("kind", [OtherInTraining, Remembers, Draws, LaterScaled, HalfOfIt, Cubes, OutputOfHalf])
def test_almost_a_usual_shape(kind, pair):
    plain, fused, _ = pair(kind)
    assert getattr(fused, "seen", []) == []
    inputs = [torch.rand(3, 8)] * (2 if kind is OutputOfHalf else 1)
    for module in (fused, plain):
        module.scale = 3.0
    torch.testing.assert_close(fused.train()(*inputs), plain.train()(*inputs))


def test_fusing_draws_no_random_number(fuse_tomorrows, monkeypatch):
    pooler = hf.models.bert.modeling_bert.BertPooler(hf.BertConfig(hidden_size=8))
    monkeypatch.setattr(hf.models.bert.modeling_bert, "BertPooler", lambda config: pooler)
    module, random = Draws(), torch.get_rng_state()
    fuse_tomorrows(module)
    assert torch.equal(torch.get_rng_state(), random)


class Tanh(nn.Module):
    def __init__(self):
        super().__init__()
        self.d = nn.Linear(32, 48)

    def forward(self, x):
        return torch.tanh(self.d(x))


class Doubled(hf.models.bert.modeling_bert.BertIntermediate):
    def forward(self, x):
        return super().forward(x) * 2.0


@pytest.mark.parametrize("change", ["another module", "another class"])
def test_half_a_feed_forward_is_replaced_later(change):
    plain = livened(hf.BertModel(hf.BertConfig(**BERT)))
    fused = copy.deepcopy(plain)
    pyfused.fuse_(fused)
    new, ids = Tanh(), tokens(2, 9)
    for model in (plain, fused):
        layer = model.encoder.layer[0]
        if change == "another module":
            layer.intermediate = new
        else:
            layer.intermediate.__class__ = Doubled
    torch.testing.assert_close(fused(ids)[0], plain(ids)[0], rtol=1e-4, atol=1e-4)


def tripled(layer):
    return lambda attended: layer.output(layer.intermediate(attended), attended) * 3.0


def test_a_chunk_of_the_users_own():
    plain = livened(hf.BertModel(hf.BertConfig(**BERT)))
    fused, ids = copy.deepcopy(plain), tokens(2, 9)
    for model in (plain, fused):
        model.encoder.layer[0].feed_forward_chunk = tripled(model.encoder.layer[0])
    report = pyfused.fuse_(fused)
    notes = {entry.name: entry.note for entry in report.left}
    assert notes["encoder.layer.0"] == "this instance has a feed_forward_chunk of its own already"
    torch.testing.assert_close(fused(ids)[0], plain(ids)[0], rtol=1e-4, atol=1e-4)
    pyfused.unfuse_(fused)
    assert "feed_forward_chunk" in vars(fused.encoder.layer[0])


def test_biases_beside_a_gate_are_reported():
    report = pyfused.fuse_(hf.LlamaModel(hf.LlamaConfig(**DECODER, mlp_bias=True)))
    assert {e.note for e in report.left if e.kind == "LlamaMLP"} == {"has biases beside a gate; the kernels take none"}


UNNAMED = {
    "MixtralExperts": (
        lambda: hf.MixtralModel(hf.MixtralConfig(**DECODER, num_local_experts=2)), "of no shape that fuse_ knows"
    ),
    "MobileBertLayer": (lambda: hf.MobileBertModel(hf.MobileBertConfig(**BERT)), "its last feed-forward has two residuals"),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNNAMED)
def test_products_that_are_no_linear_children_are_named(kind):
    """A stack of experts' weights, and a feed-forward that adds twice."""
    make, note = UNNAMED[kind]
    assert {entry.note for entry in pyfused.fuse_(make()).left if entry.kind == kind} == {note}


def test_a_pickle_in_a_new_process_compiles():
    model = livened(hf.MT5EncoderModel(hf.MT5Config(**{**T5, "num_layers": 1})))
    pyfused.fuse_(model)
    ids, pickled = tokens(2, 9), pickle.dumps(model)
    expected = model(input_ids=ids)[0]
    shapes._shapes.clear()
    found = torch.compile(pickle.loads(pickled), fullgraph=True, backend="eager")(input_ids=ids)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_pickle_brings_its_shapes():
    model = hf.BertModel(hf.BertConfig(**BERT))
    pyfused.fuse_(model)
    known, pickled = set(shapes._shapes), pickle.dumps(model)
    shapes._shapes.clear()
    loaded = pickle.loads(pickled)
    layer = loaded.encoder.layer[0]
    assert {type(m) for m in (layer, layer.intermediate, layer.output)} <= set(shapes._shapes) <= known
