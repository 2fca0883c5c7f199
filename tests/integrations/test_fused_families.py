"""Are transformers models of many families right after fuse_, and is each fused as far as the documents say?"""

import collections
import copy
import functools
import pickle
from pathlib import Path

import pytest
import torch
import transformers as hf
from family_cases import FAMILIES, summary, text
from fused_pairs import Trio
from hf_cases import BERT, DECODER, T5, livened, tokens
from torch import nn

import pyfused
from pyfused.integrations.transformers import shapes
from pyfused.own_forward import is_fused

PAGE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "families.md"
NOT_IN_DOUBLE = ("CANINE", "XGLM")  # float64 is no truth for them; see test_by_hand


@functools.cache
def family(name):
    make, _ = FAMILIES[name]
    torch.manual_seed(0)
    return livened(make())


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in NOT_IN_DOUBLE])
def test_outputs(name):
    trio = Trio(copy.deepcopy(family(name)))
    assert trio.report.replaced
    trio.check(**FAMILIES[name][1]())


@pytest.mark.parametrize(
    "name", ["BERT", "ViT", "Llama", "Gemma", "ModernBERT", "mT5", "UMT5", "DistilBERT", "MPNet", "DPT"]
)
def test_gradients(name):
    torch.manual_seed(1)
    trio = Trio(copy.deepcopy(family(name)))
    trio.check_gradients(lambda output: output[0].square().mean(), **FAMILIES[name][1]())


@pytest.mark.parametrize("name", ["BART", "BERT", "Llama", "Gemma", "GPT-NeoX", "TrOCR", "UMT5", "Whisper"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name, dtype):
    trio = Trio(copy.deepcopy(family(name)), dtype=dtype)
    trio.check(**FAMILIES[name][1]())


@pytest.mark.parametrize("name", ["BART", "BERT", "GPT-NeoX", "Llama", "MPNet", "Switch Transformers", "T5", "UMT5", "ViT"])
def test_a_module_runs_as_often_as_before(name):
    """Where the children's hooks keep a layer from the kernels, no child has run before the class's own statements do."""
    plain, fused = (copy.deepcopy(family(name)) for _ in range(2))
    pyfused.fuse_(fused)
    given, calls = FAMILIES[name][1](), []
    for model in (plain, fused):
        count = collections.Counter()
        for place, module in model.named_modules():
            if not isinstance(module, nn.Dropout) and not any(module.children()):
                module.register_forward_hook(lambda *_, place=place, count=count: count.update([place]))
        with torch.no_grad():
            model(**given)
        calls.append(count)
    assert calls[0] == calls[1]


@pytest.mark.parametrize("length", [9, 150])
@pytest.mark.parametrize("name", ["mT5", "T5", "UMT5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_text_without_tokens(name, length, dtype):
    """Beside T5's bias sdpa hides keys with the least number: the queries of such a text get the mean of all values, in the
    decoder too, and so do queries in front of a decoder's text. In float16 the scores count, as that number is small."""
    trio, given = Trio(copy.deepcopy(family(name)), dtype=dtype), {"input_ids": tokens(2, length)}
    given["attention_mask"] = torch.stack((torch.ones(length), torch.zeros(length))).long()
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, :3] = 0
    given |= {"decoder_input_ids": tokens(2, length), "decoder_attention_mask": mask, "use_cache": False}
    trio.check(**given)


def test_answers_to_a_text_without_tokens():
    given = {"input_ids": tokens(3, 9), "attention_mask": torch.tensor([1, 0, 1])[:, None].expand(3, 9)}
    plain = hf.T5ForConditionalGeneration(hf.T5Config(**T5, decoder_start_token_id=0)).eval()
    fused = copy.deepcopy(plain)
    pyfused.fuse_(fused)
    options = {"max_new_tokens": 8, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    ours, theirs = (model.generate(**given, **options) for model in (fused, plain))
    torch.testing.assert_close(ours.sequences, theirs.sequences)
    torch.testing.assert_close(torch.stack(ours.scores), torch.stack(theirs.scores), rtol=1e-4, atol=1e-5)


def test_the_page_of_families():
    """Prints the page's rows when they differ: paste them."""
    rows = []
    for name in FAMILIES:
        model = copy.deepcopy(family(name))
        used, left = summary(pyfused.fuse_(model))
        rows.append(f"| {name} | {used} | {left or '-'} |")
    written = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")][1:]
    assert written == rows, "\n" + "\n".join(rows)


class Tomorrow(nn.Module):
    """A feed-forward of no usual shape, as if transformers had it."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.act = nn.Linear(8, 16), nn.Linear(16, 8), nn.GELU()

    def forward(self, x):
        return self.down(self.act(self.up(x)) * 2.0)


class Usual(Tomorrow):
    def forward(self, hidden):
        return self.down(self.act(self.up(hidden)))


class LooksAtValues(Tomorrow):
    def forward(self, x):
        if x.sum() > 0:
            return self.down(self.act(self.up(x)))
        return x


class WritesItself(Tomorrow):
    def forward(self, x):
        self.seen = x
        return self.down(self.act(self.up(x)))


class AsksWhetherItTrains(Tomorrow):
    def forward(self, x):
        return self.down(self.act(self.up(x))) if self.training else self.down(self.act(2.0 * self.up(x)))


class Dropping(Tomorrow):
    """Torch's function for dropout, and a residual that is given."""

    first = 0.5

    def __init__(self):
        super().__init__()
        self.chance = self.first

    def forward(self, x, residual):
        return nn.functional.dropout(self.down(self.act(self.up(x))), p=self.chance, training=self.training) + residual


class DropsAlways(Dropping):
    def forward(self, x, residual):
        return nn.functional.dropout(self.down(self.act(self.up(x))), p=self.chance) + residual


class Doubled(nn.Module):
    """An RMS norm with two of its parts in another order, and one that is none."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(8)), 1e-3

    def forward(self, x):
        return self.weight * (torch.rsqrt(self.eps + x.float().pow(2).mean(-1, keepdim=True)) * x.float()).type_as(x)


class NoNorm(Doubled):
    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-2, keepdim=True) + self.eps))


class TooWide(Doubled):
    """Its result stays in float32."""

    def forward(self, x):
        x = x.float()
        return self.weight.float() * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


@pytest.mark.parametrize(
    ("kind", "fused"),
    [
        (Tomorrow, False),
        (Usual, True),
        (LooksAtValues, False),
        (WritesItself, False),
        (AsksWhetherItTrains, False),
        (Doubled, True),
        (NoNorm, False),
        (TooWide, False),
    ],
)
def test_a_class_that_transformers_adds_tomorrow(kind, fused, pair):
    plain, model, report = pair(kind)
    assert is_fused(model) == fused
    assert set(vars(model)) == set(vars(plain))
    if not fused and kind not in (NoNorm, TooWide):
        assert [entry.note for entry in report.left if entry.name == "0"] == ["of no shape that fuse_ knows"]
    x = torch.randn(3, 8)
    torch.testing.assert_close(model(x), plain(x))


@pytest.mark.parametrize("first", [0.5, 0])
@pytest.mark.parametrize(("kind", "fused"), [(Dropping, True), (DropsAlways, False)])
def test_a_class_with_dropout_and_a_residual(kind, fused, first, pair, monkeypatch):
    """Whether the module trains, and the chance, are read at each call. It may be a whole number, as configurations have it."""
    shapes._shapes.pop(kind, None)
    monkeypatch.setattr(kind, "first", first)
    _, one, report = pair(kind)
    assert [entry.note for entry in report.replaced if entry.name == "0"] == ["pyfused.ffn with the residual"] * fused
    x, residual = torch.randn(2, 30, 8)
    for train, chance in ((True, 0.5), (True, 0.0), (False, 0.5), (True, 1.0), (True, 0)):
        one.train(train).chance = chance
        torch.manual_seed(1)
        ours = one(x, residual)
        torch.manual_seed(1)
        torch.testing.assert_close(ours, kind.forward(one, x, residual))


class TomorrowAttention(nn.Module):
    """Attention as no other model has it: the keys are the queries."""

    def __init__(self):
        super().__init__()
        self.query, self.value = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        q = self.query(x)
        return torch.softmax(q @ q.transpose(-1, -2), -1) @ self.value(x)


class TomorrowLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.norm, self.mlp, self.odd = TomorrowAttention(), nn.LayerNorm(8), Usual(), Tomorrow()

    def forward(self, x):
        x = x + self.mlp(self.norm(x + self.attention(x)))
        return self.odd(x)


class TomorrowConfig(hf.PreTrainedConfig):
    model_type = "tomorrow"


class TomorrowModel(hf.PreTrainedModel):
    config_class = TomorrowConfig

    def __init__(self, config):
        super().__init__(config)
        self.embeddings, self.layers = nn.Embedding(20, 8), nn.ModuleList([TomorrowLayer(), TomorrowLayer()])
        self.post_init()

    def forward(self, input_ids):
        x = self.embeddings(input_ids)
        for layer in self.layers:
            x = layer(x)
        return (x,)


def test_a_model_that_transformers_adds_tomorrow(monkeypatch):
    """What is known in it is fused, the rest is left, and the report names both."""
    for kind in (TomorrowAttention, TomorrowLayer, Usual, Tomorrow):
        monkeypatch.setattr(kind.forward, "__module__", "transformers.models.tomorrow.modeling_tomorrow")
    trio = Trio(livened(TomorrowModel(TomorrowConfig())))
    assert {(entry.kind, entry.note) for entry in trio.report.replaced} == {
        ("LayerNorm", "pyfused.layer_norm"),
        ("Usual", "pyfused.ffn"),
    }
    assert [(entry.name, entry.note.partition(", which")[0]) for entry in trio.report.left] == [
        ("", "attention: TomorrowModel has attention code of its own"),
        ("layers.0.odd", "of no shape that fuse_ knows"),
        ("layers.1.odd", "of no shape that fuse_ knows"),
    ]
    trio.check(input_ids=torch.arange(14).view(2, 7))
    trio.check_gradients(lambda output: output[0].square().mean(), input_ids=torch.arange(14).view(2, 7))


def test_classes_of_others_are_left():
    model = nn.Sequential(Usual(), hf.models.bert.modeling_bert.BertPooler(hf.BertConfig(hidden_size=8)))
    assert "0" not in {entry.name for entry in pyfused.fuse_(model).replaced}


def test_changes_after_fusing_count():
    """Children are read at each call: another activation, LoRA's subclasses, hooks, dropout in training."""
    model = livened(hf.LlamaModel(hf.LlamaConfig(**DECODER)))
    mlp, x = model.layers[0].mlp, torch.randn(2, 3, 32)
    pyfused.fuse_(model)
    before = mlp(x)
    mlp.act_fn = nn.Sigmoid()
    plain = mlp.down_proj(torch.sigmoid(mlp.gate_proj(x)) * mlp.up_proj(x))
    torch.testing.assert_close(mlp(x), plain)
    assert not torch.allclose(before, plain)
    seen = []
    mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
    mlp(x)
    assert seen == [1]
    norm = model.norm
    norm.variance_epsilon = 10.0
    torch.testing.assert_close(norm(x), type(norm).forward(norm, x))


@pytest.mark.parametrize("name, layer", [("BERT", "encoder.layer.0"), ("OPT", "decoder.layers.0")])
def test_copies_pickles_and_checkpoints(name, layer, tmp_path):
    """BERT's feed-forward is a method of its layer, OPT's stands in line."""
    model, x = copy.deepcopy(family(name)), FAMILIES[name][1]()
    names = list(model.state_dict())
    pyfused.fuse_(model)
    expected = model(**x)[0]
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        shapes._shapes.clear()  # as in a new process
        assert is_fused(clone.get_submodule(layer))
        torch.testing.assert_close(clone(**x)[0], expected, rtol=0, atol=0)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert list(loaded.state_dict()) == names
    torch.testing.assert_close(loaded(**x)[0], expected)
    pyfused.unfuse_(model)
    assert not any("feed_forward_chunk" in vars(m) for m in model.modules())


def test_dropout_in_training():
    config = hf.BertConfig(**{**BERT, "hidden_dropout_prob": 0.5})
    fused, plain = (hf.BertModel(config).train() for _ in range(2))
    plain.load_state_dict(fused.state_dict())
    pyfused.fuse_(fused)
    x, outputs = text(), []
    for model in (fused, plain):
        torch.manual_seed(3)
        outputs.append(model.encoder.layer[0].output(torch.ones(2, 3, 48), torch.ones(2, 3, 32)))
    torch.testing.assert_close(*outputs)
    assert fused(**x)[0].isfinite().all()


@pytest.mark.parametrize("kind", ["MT5", "UMT5", "SwitchTransformers"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generate(kind, beams):
    torch.manual_seed(2)
    config = getattr(hf, f"{kind}Config")(**T5, num_decoder_layers=2, decoder_start_token_id=0)
    model = livened(getattr(hf, f"{kind}ForConditionalGeneration")(config))
    ids = tokens(2, 140)  # beyond the last bucket
    mask = torch.ones_like(ids)
    mask[1, 90:] = 0
    options = {"attention_mask": mask, "max_new_tokens": 9, "num_beams": beams, "do_sample": False}
    expected = model.generate(ids, **options)
    pyfused.fuse_(model)
    assert torch.equal(model.generate(ids, **options), expected)


def test_mpnet_beyond_the_last_bucket(monkeypatch):
    """No tensor of S x S is made for the bias, unless attentions are asked for."""
    plain = livened(hf.MPNetModel(hf.MPNetConfig(**{**BERT, "max_position_embeddings": 300})))
    fused = copy.deepcopy(plain)
    pyfused.fuse_(fused)
    ids = tokens(2, 280)
    with torch.no_grad():
        expected = plain(ids, output_attentions=True)
        torch.testing.assert_close(fused(ids)[0], expected[0], rtol=1e-4, atol=1e-4)
        for ours, theirs in zip(fused(ids, output_attentions=True).attentions, expected.attentions):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        monkeypatch.setattr(type(fused.encoder), "compute_position_bias", None)
        fused(ids)


def test_umt5_makes_no_dense_bias(monkeypatch):
    model = livened(hf.UMT5EncoderModel(hf.UMT5Config(**T5)))
    pyfused.fuse_(model)
    monkeypatch.setattr(type(model.encoder.block[0].layer[0].SelfAttention), "compute_bias", None)
    model(input_ids=tokens(2, 9))


def test_pop2piano_reads_its_table(monkeypatch):
    """No tensor of S x S is made for the bias, and the table gets its gradient; generation is as before."""
    model = livened(hf.Pop2PianoForConditionalGeneration(hf.Pop2PianoConfig(**T5, composer_vocab_size=1)))
    trio = Trio(model)
    inputs = {"input_features": torch.randn(2, 140, 32), "decoder_input_ids": tokens(2, 7), "use_cache": False}
    trio.check_gradients(lambda output: output.logits.square().mean(), **inputs)
    for stack in (trio.fused.encoder, trio.fused.decoder):
        assert stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight.grad.any()
    notes = {entry.name: entry.note for entry in trio.report.replaced}
    assert "relative position" in notes["encoder.block.0.layer.0.SelfAttention"]
    written = []
    for one in (trio.plain, trio.fused):
        one.generation_config.composer_to_feature_token = {"composer1": 3}
        one.generation_config.update(max_new_tokens=6, min_new_tokens=6, do_sample=False)
        written.append(one.generate(inputs["input_features"], composer="composer1"))
    assert torch.equal(*written)
    monkeypatch.setattr(type(trio.fused.encoder.block[0].layer[0].SelfAttention), "compute_bias", None)
    trio.fused(**inputs)
