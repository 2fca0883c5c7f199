"""Does fuse_(model, skip_padding=True) compute the real tokens alone, and give them the same states?"""

import copy
import functools

import draws
import pytest
import torch
import transformers as hf
from family_cases import FAMILIES
from fused_pairs import Trio, vary
from hf_cases import BERT, T5, livened, tokens
from torch import nn

import pyfused
from pyfused.integrations.transformers import padding

MODELS = {
    **{
        name: FAMILIES[name][0]
        for name in ("BERT", "RoBERTa", "XLM-RoBERTa", "CamemBERT", "ELECTRA", "DistilBERT", "MPNet")
    },
    "ALBERT": lambda: hf.AlbertModel(hf.AlbertConfig(**BERT, embedding_size=16)),
    "Data2Vec": lambda: hf.Data2VecTextModel(hf.Data2VecTextConfig(**BERT)),
    "ERNIE": lambda: hf.ErnieModel(hf.ErnieConfig(**BERT)),
    "RoBERTa, norm first": lambda: hf.RobertaPreLayerNormModel(hf.RobertaPreLayerNormConfig(**BERT)),
    "XLM-RoBERTa XL": lambda: hf.XLMRobertaXLModel(hf.XLMRobertaXLConfig(**BERT)),
    "T5, encoder": lambda: hf.T5EncoderModel(hf.T5Config(**T5)),
    "mT5, encoder": lambda: hf.MT5EncoderModel(hf.MT5Config(**T5)),
}
LENGTHS = (11, 2, 7, 1)


@functools.cache
def built(name):
    torch.manual_seed(0)
    return vary(livened(MODELS[name]()))


def model_of(name):
    return copy.deepcopy(built(name))


def batch(side="right", lengths=LENGTHS):
    ids, mask = tokens(len(lengths), max(lengths)), torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in zip(mask, lengths):
        row[slice(0, length) if side == "right" else slice(len(row) - length, None)] = 1
    return {"input_ids": ids * mask + (1 - mask), "attention_mask": mask}


class Tokens:
    """Counts the tokens of each packed row."""

    def __init__(self, monkeypatch):
        self.counts, packed = [], padding.Packing.pack

        def pack(packing, x):
            y = packed(packing, x)
            self.counts.append(y.shape[1])
            return y

        monkeypatch.setattr(padding.Packing, "pack", pack)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_real_tokens_get_the_same_states(name, side, monkeypatch):
    plain = model_of(name)
    truth, fused = copy.deepcopy(plain).double(), copy.deepcopy(plain)
    report = pyfused.fuse_(fused, skip_padding=True)
    assert any("real tokens alone" in entry.note for entry in report.replaced)
    seen = Tokens(monkeypatch)

    @torch.no_grad()
    def once():
        inputs = batch(side)
        real = inputs["attention_mask"].bool()
        found = [model(**inputs).last_hidden_state for model in (fused, plain, truth)]
        assert name == "RoBERTa, norm first" or not found[0][~real].any()  # it has a norm behind the encoder
        return {"states": [states[real] for states in found]}

    draws.check(once)
    assert set(seen.counts) == {sum(LENGTHS)}


@pytest.mark.parametrize("name", ["BERT", "ALBERT", "MPNet", "mT5, encoder"])
def test_gradients(name):
    inputs = batch()
    real = inputs["attention_mask"][..., None]
    trio = Trio(model_of(name), skip_padding=True)
    trio.check_gradients(lambda output: (output.last_hidden_state * real).square().mean(), **inputs)


@pytest.mark.parametrize(
    "head", ["ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"]
)
def test_heads(head):
    torch.manual_seed(0)
    plain = vary(livened(getattr(hf, f"Bert{head}")(hf.BertConfig(**BERT))))
    fused = copy.deepcopy(plain)
    pyfused.fuse_(fused, skip_padding=True)
    inputs = batch()
    with torch.no_grad():
        ours, theirs = fused(**inputs)[0], plain(**inputs)[0]
    real = inputs["attention_mask"].bool()
    pick = (lambda t: t[real]) if ours.shape[:2] == real.shape else (lambda t: t)
    torch.testing.assert_close(pick(ours), pick(theirs), rtol=1e-4, atol=1e-4)


def test_an_encoder_and_decoder_model():
    torch.manual_seed(0)
    plain = vary(livened(hf.T5ForConditionalGeneration(hf.T5Config(**T5, decoder_start_token_id=0))))
    fused = copy.deepcopy(plain)
    pyfused.fuse_(fused, skip_padding=True)
    for side in ("right", "left"):
        inputs = batch(side)
        options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 2}
        assert torch.equal(fused.generate(**inputs, **options), plain.generate(**inputs, **options))


@pytest.mark.parametrize("name", ["BERT", "MPNet", "T5, encoder"])
@pytest.mark.parametrize(
    "case", ["hidden states", "attentions", "no mask", "no padding", "holes", "hook", "float mask", "compiled"]
)
def test_calls_that_compute_padding(name, case, monkeypatch):
    plain, inputs = model_of(name), batch()
    mask = inputs["attention_mask"]
    fused = copy.deepcopy(plain)
    pyfused.fuse_(fused, skip_padding=True)
    seen, packs = Tokens(monkeypatch), False
    if case == "hidden states":
        inputs["output_hidden_states"] = True
    elif case == "attentions":
        inputs["output_attentions"] = True
    elif case == "no mask":
        inputs["attention_mask"] = None
    elif case == "no padding":
        mask[:] = 1
    elif case == "holes":  # positions of T5 count distances; BERT's are added before
        mask[0, 3], packs = 0, name == "BERT"
    elif case == "hook":
        layers = fused.encoder.block if name == "T5, encoder" else fused.encoder.layer
        layers[0].register_forward_hook(lambda *_: None)
    elif case == "float mask":
        shown = torch.zeros(4, 1, 1, mask.shape[1]).masked_fill(
            mask[:, None, None] == 0, torch.finfo(torch.float32).min
        )
        inputs["attention_mask"] = shown.expand(-1, -1, mask.shape[1], -1)
        packs = name != "T5, encoder"
    run = torch.compile(fused, backend="eager") if case == "compiled" else fused
    with torch.no_grad():
        ours, theirs = run(**inputs), plain(**inputs)
    real = mask.bool()
    torch.testing.assert_close(ours.last_hidden_state[real], theirs.last_hidden_state[real], rtol=1e-4, atol=1e-4)
    assert bool(seen.counts) == packs
    if case in ("hidden states", "attentions"):
        for a, b in zip(ours[-1], theirs[-1]):
            assert a.shape == b.shape
        with torch.no_grad():  # transformers' idle hooks do not count
            del inputs[list(inputs)[-1]]
            fused(**inputs)
        assert seen.counts


def test_padded_rows_and_empty_ones():
    model = model_of("BERT")
    pyfused.fuse_(model, skip_padding=True)
    inputs = batch(lengths=(5, 3))
    inputs["attention_mask"][1] = 0
    with torch.no_grad():
        states = model(**inputs).last_hidden_state
    assert states.isfinite().all()
    assert not states[1].any()


class Sums(nn.Module):
    """Attention of someone's own: a token sees all before it, whatever the masks say."""

    def forward(self, hidden_states, *args, **kwargs):
        return 0.1 * hidden_states.cumsum(1), None


@pytest.mark.parametrize("case", ["own attention", "own attention, later", "chunks", "chunks, later"])
def test_encoders_that_cannot_run_packed(case):
    plain, inputs = model_of("BERT"), batch(lengths=(12, 2, 7, 1))

    def change(model):
        for layer in model.encoder.layer[:1]:
            if case.startswith("chunks"):
                layer.chunk_size_feed_forward = 4
            else:
                layer.attention.self = Sums()

    fused = copy.deepcopy(plain)
    if case.endswith("later"):
        pyfused.fuse_(fused, skip_padding=True)
        change(fused)
    else:
        change(fused)
        report = pyfused.fuse_(fused, skip_padding=True)
        assert [e.note for e in report.left if e.note.startswith("skip_padding: ")]
    change(plain)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(fused(**inputs)[0][real], plain(**inputs)[0][real], rtol=1e-4, atol=1e-4)


def test_a_mean_over_tokens():
    """As sentence-transformers does it: the tokens' states, weighted by the mask, whatever stands at the padding."""
    plain, inputs = model_of("BERT"), batch()
    fused = copy.deepcopy(plain)
    pyfused.fuse_(fused, skip_padding=True)
    with torch.no_grad():
        found, expected, alone = [], [], []
        for model, means in ((fused, found), (plain, expected)):
            states, weights = model(**inputs).last_hidden_state, inputs["attention_mask"][..., None].float()
            means.append((states * weights).sum(1) / weights.sum(1))
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"].bool()):
            alone.append(fused(ids[mask][None]).last_hidden_state.mean(1))
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[0], torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_refused():
    with pytest.raises(
        ValueError, match="skip_padding is True, but this GPT2Model has no encoder that can leave padding out"
    ):
        pyfused.fuse_(hf.GPT2Model(hf.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9)), skip_padding=True)
    with pytest.raises(TypeError, match="skip_padding is 1; it takes True or False"):
        pyfused.fuse_(nn.LayerNorm(3), skip_padding=1)
    decoder = hf.BertModel(hf.BertConfig(**BERT, is_decoder=True))
    left = {entry.note for entry in pyfused.fuse_(decoder, skip_padding=True).left}
    assert "skip_padding: it is a decoder" in left


def test_linear_everywhere():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3, bias=False), nn.MultiheadAttention(3, 1)
    ).bfloat16()
    x = torch.randn(5, 6).bfloat16()
    plain, truth = model[:3](x), copy.deepcopy(model[:3]).double()(x.double())
    assert not any("linear" in entry.note for entry in pyfused.fuse_(model).replaced)
    report = pyfused.fuse_(model, linear=True)
    assert {e.name for e in report.replaced if e.note == "pyfused.linear"} == {"0", "2"}
    found = model[:3](x)
    assert pyfused.testing.judge(found, plain, truth).ok
    with pytest.raises(TypeError, match="linear is None; it takes True or False"):
        pyfused.fuse_(model, linear=None)
    bert = model_of("BERT")
    inputs = batch()
    expected = bert(**inputs)[0]
    report = pyfused.fuse_(bert, linear=True, skip_padding=True)
    assert any(e.name.endswith("query") for e in report.replaced)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(bert(**inputs)[0][real], expected[real], rtol=1e-4, atol=1e-4)
