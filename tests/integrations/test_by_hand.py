"""Are models of transformers that compute attention by hand right on pyfused?"""

import copy
import functools
import pickle

import pytest
import torch
import transformers as hf
from by_hand_cases import DEBERTA, GPTJ, MODELS, MPT, NEO, TROCR, WAVES, XGLM, pair, text
from draws import to_double
from family_cases import FAMILIES
from fused_pairs import Trio, tensors
from hf_cases import BART, DECODER, IDS, livened, tokens
from torch import nn

import pyfused
from pyfused.integrations.transformers import blind, by_hand, masks
from pyfused.kernels.cpu.mask_structure import slopes

NOT_IN_DOUBLE = ("CANINE", "XGLM")  # their code makes a float32 number of float64's least
SOFTMAX_IN_FLOAT32 = ("BLOOM", "CodeGen", "FlauBERT", "GPT-J", "GPT-Neo", "MPT", "XLM")


def made(name):
    torch.manual_seed(0)
    _, make, inputs = MODELS[name]
    return livened(make()), inputs()


def in_double(model, inputs):
    """(fused, plain, inputs), all in float64."""
    plain = copy.deepcopy(model).double()
    fused = copy.deepcopy(plain)
    pyfused.fuse_(fused)
    return fused, plain, {name: to_double(value) for name, value in inputs.items()}


def fused_and_plain(name):
    """(fused, plain, inputs), in float64 where the model can be."""
    model, inputs = made(name)
    if name not in NOT_IN_DOUBLE:
        return in_double(model, inputs)
    fused = copy.deepcopy(model)
    pyfused.fuse_(fused)
    return fused, model, inputs


def states(output):
    return torch.cat([t.flatten() for t in output.values() if isinstance(t, torch.Tensor)])


@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients(name):
    """Padding on both sides, where there is a mask. test_fused_families judges float32."""
    fused, plain, inputs = fused_and_plain(name)
    tolerances = (1e-3, 1e-5) if name in (*NOT_IN_DOUBLE, *SOFTMAX_IN_FLOAT32) else (1e-7, 1e-9)
    near = functools.partial(torch.testing.assert_close, rtol=tolerances[0], atol=tolerances[1], equal_nan=True)
    ours, theirs = (states(one(**inputs)) for one in (fused, plain))
    near(ours, theirs)
    for found in (ours, theirs):
        found.square().mean().backward()
    expected = dict(plain.named_parameters())
    for parameter, ours in fused.named_parameters():
        if expected[parameter].grad is not None:
            near(ours.grad, expected[parameter].grad)


@pytest.mark.parametrize("name", MODELS)
def test_the_report(name):
    row, make, _ = MODELS[name]
    notes = {
        entry.note.partition(",")[0] for entry in pyfused.fuse_(make()).replaced if entry.kind == row.rpartition(".")[2]
    }
    assert notes == {"pyfused.attention"}


def test_every_row_is_tried():
    rows = {*by_hand.ROWS, *by_hand.ROWS_OF_METHODS, "wavlm.WavLMAttention"}
    assert rows == {row for row, _, _ in MODELS.values()}


@pytest.mark.parametrize("name", ["BLOOM", "DeBERTa v2", "GPT-J", "MVP"])
def test_few_scores_are_left_to_the_class(name, calls, monkeypatch):
    """Of 2 rows, 4 heads and 9 tokens, 7 of them in MVP's decoder."""
    model, inputs = made(name)
    pyfused.fuse_(model)
    for least, kernel in ((2 * 4 * 9 * 9, True), (2 * 4 * 9 * 9 + 1, False)):
        monkeypatch.setattr(by_hand, "WORTH_THE_KERNEL", least)
        calls.clear()
        model(**inputs)
        assert bool(calls) == kernel
    model.bfloat16()(**inputs)
    assert calls


def test_the_number_of_scores():
    """Of a mask's keys, where there is one. Without a mask nobody knows how long a cache is."""
    module, x = nn.Module(), torch.zeros(2, 3, 8)
    module.num_heads = 4
    heads, cache = 2 * 3 * 4, object()
    mask, others = torch.zeros(2, 1, 3, 70), torch.zeros(2, 50, 8)
    alibi, positions = torch.zeros(8, 1, 70), torch.zeros(100, 8)
    for more, keys in (
        ({}, 3),
        ({"positions": positions, "past_key_values": None}, 3),
        ({"key_value_states": others}, 50),
        ({"alibi": alibi, "attention_mask": mask, "layer_past": cache}, 70),
    ):
        given = {"hidden_states": x, **more}
        with pytest.MonkeyPatch.context() as patch:
            for least in (heads * keys, heads * keys + 1):
                patch.setattr(by_hand, "WORTH_THE_KERNEL", least)
                assert by_hand._few(module, given) == (least > heads * keys)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(by_hand, "WORTH_THE_KERNEL", 1 << 15)
        for given in (
            {"x": x, "cache": cache},
            {"x": x[0]},
            {"x": x.half()},
            {"x": x.double()},
            {"x": x.to("meta")},
            {},
        ):
            assert not by_hand._few(module, given)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "MobileViT"])  # whose calls cannot ask for them
def test_attention_weights(name):
    """A call that wants them runs the class's own code."""
    fused, plain, inputs = fused_and_plain(name)
    with torch.no_grad():
        ours, theirs = (tensors(one(**inputs, output_attentions=True)) for one in (fused, plain))
    assert ours.keys() == theirs.keys()
    assert any("attentions" in name for name in ours)
    for path, found in ours.items():
        torch.testing.assert_close(found, theirs[path], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["Deberta", "DebertaV2"])
def test_deberta_rows_that_see_no_key(kind):
    """A query that is padding sees all keys alike, and its scores have no gradient."""
    config = getattr(hf, f"{kind}Config")(**DEBERTA)
    fused, plain, _ = in_double(livened(getattr(hf, f"{kind}Model")(config)), {})
    seen = torch.ones(2, 5, 5, dtype=torch.long)
    seen[0, :, 3:], seen[0, 4], seen[1, 1] = 0, 0, 0
    for one in (fused, plain):
        x = torch.linspace(-1.0, 1.0, 320, dtype=torch.float64).view(2, 5, 32)
        one.encoder(x, seen, return_dict=False)[0].square().sum().backward()
    for a, b in zip(fused.parameters(), plain.parameters()):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)


def eager_llama():
    config = hf.LlamaConfig(**DECODER)
    config._attn_implementation = "eager"
    return hf.LlamaModel(config)


SEE_NOTHING = {name: MODELS[name][1] for name in ("DeBERTa", "BLOOM", "CodeGen", "GPT-J", "GPT-Neo", "MPT")}
SEE_NOTHING |= {"Llama, eager": eager_llama}


@pytest.mark.parametrize("name", SEE_NOTHING)
@pytest.mark.parametrize("apart", [False, True])
def test_gradients_of_queries_that_see_no_key(name, apart, monkeypatch):
    """In float32, where the least number swallows the scores beside it. Padding counts in this loss."""
    monkeypatch.setattr(masks, "WORTH_TELLING_APART", 0 if apart else 1 << 40)
    torch.manual_seed(0)
    plain = livened(SEE_NOTHING[name]())
    fused, inputs, found = copy.deepcopy(plain), text(left=3), []
    pyfused.fuse_(fused)
    for model in (fused, plain):
        model(**inputs)[0].square().mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in found[1].items():
        torch.testing.assert_close(found[0][name], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item())


@pytest.mark.parametrize("name", [name for name in SEE_NOTHING if name not in ("DeBERTa", "GPT-Neo")])
def test_left_padding_makes_no_dense_bias(name, calls, monkeypatch):
    """Padding counts here too. GPT-Neo has windows, DeBERTa biases of its own."""
    monkeypatch.setattr(masks, "WORTH_TELLING_APART", 0)
    torch.manual_seed(0)
    plain = livened(SEE_NOTHING[name]())
    fused, inputs = copy.deepcopy(plain), text(left=3)
    pyfused.fuse_(fused)
    with torch.no_grad():
        torch.testing.assert_close(fused(**inputs)[0], plain(**inputs)[0], rtol=1e-3, atol=1e-4)
    for call in calls:
        assert torch.equal(call["padding_mask"], inputs["attention_mask"].bool())
        assert call["attn_bias"] is None or call["attn_bias"].shape[2] == 1


def test_gradients_of_alike():
    """Of first and second order, with fewer heads of keys; the scores' plain way is a softmax beside float32's least number."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, length, 3, requires_grad=True) for heads, length in ((4, 5), (2, 6), (2, 6)))
    weights, again, found = torch.randn(2, 5, 4, 3), torch.randn(3), []

    def plain():
        scores = q @ k.repeat_interleave(2, 1).transpose(2, 3) * 0.7 + torch.finfo(torch.float32).min
        return (torch.softmax(scores, -1) @ v.repeat_interleave(2, 1)).transpose(1, 2)

    for compute in (lambda: blind.alike(q, k, v, 0.7), plain):
        grads = torch.autograd.grad((compute() * weights).sum(), (q, k, v), create_graph=True)
        loss = sum(w * g.square().sum() for w, g in zip(again, grads))
        once = torch.autograd.grad((compute() * weights).sum(), (q, k, v))
        found.append((compute().detach(), *once, *grads, *torch.autograd.grad(loss, (q, k, v), retain_graph=True)))
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("left", [0, 3])
@pytest.mark.parametrize("name", ["BLOOM", "MPT"])
def test_alibi_is_read_as_a_table(name, left, dtype, calls, monkeypatch):
    """In float32 wherever it is worth it, in half precision where ALiBi is float32, which BLOOM's is not."""
    monkeypatch.setattr(masks, "WORTH_A_LOOK", 0)
    monkeypatch.setattr(masks, "WORTH_TELLING_APART", 0)
    model, inputs = made(name)[0], text(left=left)
    trio, live = Trio(model, dtype=dtype), inputs["attention_mask"].bool()
    table = name == "MPT" or dtype == torch.float32
    if left:  # in float64 their code gives NaN to queries that see no key
        with torch.no_grad():
            ours, theirs = (one(**inputs)[0] for one in (trio.fused, trio.plain))
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 if dtype == torch.float32 else 0.1)
    else:
        trio.check(live=live, **inputs)
        trio.check_gradients(lambda output: (output[0] * live[..., None]).square().mean(), **inputs)
    assert calls
    for call in calls:
        assert (call["attn_bias"] is None) == table
        assert (call["relative_bias"] is not None) == table


def test_slopes():
    """A bias of keys is a table of distances only if each value is slope * place, and real tokens are neighbours."""
    slope, places = torch.rand(3, 1) + 0.1, torch.arange(6)
    real = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    counted = (real.cumsum(1) - 1) * real
    for bias, padding in ((slope * places, None), (slope * (places - 5), real), (slope * counted[:, None], real)):
        bias = bias.expand(len(bias) if bias.dim() == 3 else 1, 3, 6)[:, :, None].contiguous()
        assert torch.equal(slopes(bias, padding), slope)
        for place in range(6):
            other = bias.clone()
            other[-1, 1, 0, place] += 0.25
            assert slopes(other, padding) is None
    apart = torch.tensor([[1, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    bias = (slope * ((apart.cumsum(1) - 1) * apart)[:, None])[:, :, None]
    for other in (bias, bias.bfloat16(), bias[..., :1], bias.expand(2, 3, 6, 6), bias.to("meta")):
        assert slopes(other, apart) is None


def test_deberta_is_left_where_heads_talk():
    model = hf.DebertaModel(hf.DebertaConfig(**DEBERTA, talking_head=True))
    left = {entry.kind: entry.note for entry in pyfused.fuse_(model).left}
    assert left["DisentangledSelfAttention"] == "its attention has a head_logits_proj"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["DeBERTa v2", "BLOOM", "CodeGen", "GPT-J", "GPT-Neo", "MPT", "WavLM"])
def test_half_precision(name, dtype):
    model, inputs = made(name)
    live = inputs["attention_mask"] if "input_ids" in inputs else None
    Trio(model, dtype=dtype).check(live=live, **inputs)


def test_dropout():
    """Of all probabilities in training, of none in eval."""
    torch.manual_seed(0)
    config = hf.MvpConfig(**BART, attention_dropout=1.0)
    fused, plain, inputs = in_double(livened(hf.MvpModel(config)), pair())
    for train in (False, True):
        fused.train(train), plain.train(train)
        torch.testing.assert_close(*(one(**inputs)[0] for one in (fused, plain)))
    plain.eval()
    assert not torch.allclose(*(one(**inputs)[0] for one in (fused, plain)))


def test_a_hook_on_the_dropout_sees_the_probabilities():
    model, inputs = made("RemBERT")
    pyfused.fuse_(model)
    expected, seen = model(**inputs)[0], []
    model.encoder.layer[0].attention.self.dropout.register_forward_hook(
        lambda module, args, out: seen.append(out.shape)
    )
    torch.testing.assert_close(model(**inputs)[0], expected, rtol=1e-4, atol=1e-5)
    assert seen == [(2, 4, 9, 9)]


CAUSAL = {
    "BLOOM": lambda: hf.BloomForCausalLM(hf.BloomConfig(**IDS, hidden_size=32, n_layer=2, n_head=4)),
    "CodeGen": lambda: hf.CodeGenForCausalLM(hf.CodeGenConfig(**GPTJ)),
    "GPT-J": lambda: hf.GPTJForCausalLM(hf.GPTJConfig(**GPTJ)),
    "GPT-Neo": lambda: hf.GPTNeoForCausalLM(hf.GPTNeoConfig(**NEO)),
    "MPT": lambda: hf.MptForCausalLM(hf.MptConfig(**MPT)),
    "TrOCR": lambda: hf.TrOCRForCausalLM(hf.TrOCRConfig(**{**TROCR, "use_cache": True})),
    "XGLM": lambda: hf.XGLMForCausalLM(hf.XGLMConfig(**XGLM)),
}
WITH_BEAMS = [("TrOCR", 1), *((kind, beams) for kind in CAUSAL if kind != "TrOCR" for beams in (1, 2))]


@pytest.mark.parametrize(("kind", "beams"), [*WITH_BEAMS, ("GPT-J", "static"), ("GPT-Neo", "static")])
def test_generate(kind, beams):
    """With a static cache GPT-Neo's window hides all that the mask shows."""
    torch.manual_seed(1)
    model, ids = livened(CAUSAL[kind]()), tokens(2, 6)
    padded = torch.ones_like(ids)
    padded[0, :2] = 0
    options = {
        "attention_mask": padded,
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "num_beams": 1 if beams == "static" else beams,
        "do_sample": False,
        "pad_token_id": 0,
    }
    if beams == "static":
        options |= {"cache_implementation": "static"}
    if kind == "TrOCR":
        options |= {"encoder_hidden_states": torch.randn(2, 5, 32)}
    expected = model.generate(ids, **options)
    pyfused.fuse_(model)
    assert torch.equal(model.generate(ids, **options), expected)


def test_padding_reaches_the_kernel_as_a_row_of_the_mask(calls):
    model, inputs = made("RemBERT")
    pyfused.fuse_(model)
    model(**inputs)
    assert [call["attn_bias"] for call in calls] == [None, None]
    assert all(torch.equal(call["padding_mask"], inputs["attention_mask"] != 0) for call in calls)


@pytest.mark.parametrize("name", ["TrOCR", "GPT-J"])
def test_copies_and_unfuse(name, calls):
    model, inputs = made(name)
    plain = model(**inputs)[0]
    pyfused.fuse_(model)
    expected = model(**inputs)[0]
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        by_hand._known.clear()  # as in a new process
        clone = pickle.loads(pickle.dumps(clone))
        calls.clear()
        assert torch.equal(clone(**inputs)[0], expected)
        assert len(calls) >= 2
    pyfused.unfuse_(model)
    assert torch.equal(model(**inputs)[0], plain)


@pytest.mark.parametrize("name", ["Megatron-BERT", "GPT-J"])
def test_compiled(name):
    model, inputs = made(name)
    pyfused.fuse_(model)
    expected = model(**inputs)[0]
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(**inputs)[0], expected)


def test_wavlm_reads_weights_as_torch_does():
    """torch's function calls no projection, so a hook on one does not run."""
    model = livened(hf.WavLMModel(hf.WavLMConfig(**WAVES)))
    pyfused.fuse_(model)
    seen = []
    model.encoder.layers[0].attention.q_proj.register_forward_hook(lambda *_: seen.append(1))
    model(torch.randn(1, 200))
    assert not seen


def test_positions_stay_in_float32_beside_half_precision():
    """So does a checkpoint load CodeGen: its queries are float32 then."""
    model, inputs = made("CodeGen")
    trio = Trio(model, dtype=torch.bfloat16)
    for one in (trio.fused, trio.plain):
        for block in one.h:
            block.attn.embed_positions = model.h[0].attn.embed_positions.float()
    trio.check(**inputs)


def test_a_method_of_the_users_own():
    model, _ = made("GPT-J")
    mine = model.h[0].attn._attn = lambda *args: None
    left = {entry.name: entry.note for entry in pyfused.fuse_(model).left}
    assert left == {"h.0.attn": "this instance has an _attn of its own already"}
    assert vars(pyfused.unfuse_(model).h[0].attn)["_attn"] is mine


@pytest.mark.parametrize("name", ["Funnel", "LED", "LiLT", "Longformer", "LUKE", "Nystromformer", "XLNet"])
def test_attention_of_another_shape_is_named(name):
    report = pyfused.fuse_(FAMILIES[name][0]())
    notes = {entry.note for entry in report.left if "Attention" in entry.kind}
    assert notes
    assert notes <= set(by_hand.LEFT.values())
