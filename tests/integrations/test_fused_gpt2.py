"""Does a fused GPT-2 do everything that transformers documents, with the same results?"""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
import transformers as hf
from fused_pairs import Trio, counted, gradients, tensors
from hf_cases import GPT2, livened, padding, tokens
from torch import nn

import pyfused
from pyfused import notices
from pyfused.integrations.transformers import gpt2 as gpt2_integration
from pyfused.own_forward import is_fused

HEADS = {
    "model": hf.GPT2Model,
    "language model": hf.GPT2LMHeadModel,
    "double heads": hf.GPT2DoubleHeadsModel,
    "sequence": hf.GPT2ForSequenceClassification,
    "token": hf.GPT2ForTokenClassification,
    "question": hf.GPT2ForQuestionAnswering,
}


def gpt2(head="model", **more):
    return livened(HEADS[head](hf.GPT2Config(**{**GPT2, **more})))


def test_what_is_replaced():
    fused = Trio(gpt2("language model", add_cross_attention=True)).fused
    names = {n for n, m in fused.named_modules() if is_fused(m)}
    layers = {f"transformer.h.{i}{part}" for i in (0, 1) for part in ("", ".ln_1", ".ln_cross_attn", ".ln_2", ".mlp")}
    assert names == {"transformer", *layers, "transformer.ln_f", "lm_head"}
    attentions = [getattr(layer, name) for layer in fused.transformer.h for name in ("attn", "crossattention")]
    assert {a.config._attn_implementation for a in attentions} == {"pyfused"}
    assert fused.config._attn_implementation == "sdpa"  # the model's own config does not change
    pyfused.unfuse_(fused)
    assert not any(is_fused(m) for m in fused.modules())
    assert {a.config._attn_implementation for a in attentions} == {"sdpa"}


@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu", "tanh", "mish"])
def test_activations(activation, monkeypatch):
    trio = Trio(gpt2(activation_function=activation))
    calls = counted(monkeypatch, gpt2_integration, "ffn")
    trio.fused(tokens(2, 6))
    assert calls == {"ffn": 0 if activation == "mish" else 2}
    trio.check(input_ids=tokens(2, 6))
    reason = ["the kernels do not have the activation MishActivation"]
    assert [entry.note for entry in trio.report.left] == (reason * 2 if activation == "mish" else [])


@pytest.mark.parametrize(
    "options",
    [
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"reorder_and_upcast_attn": True},
        {"n_inner": 40, "layer_norm_epsilon": 1e-3},
    ],
)
def test_options(options):
    Trio(gpt2(**options)).check(input_ids=tokens(2, 6))


@pytest.mark.parametrize("side", [None, "left", "right"])
def test_inputs(side):
    """All inputs at once: ids or embeddings, segments, positions, masks, an encoder with its own mask."""
    trio, mask = Trio(gpt2(add_cross_attention=True)), padding(2, 7, side)
    inputs = {"token_type_ids": tokens(2, 7), "position_ids": torch.randint(0, 60, (2, 7)), "attention_mask": mask}
    inputs |= {"encoder_hidden_states": torch.randn(2, 5, 32), "encoder_attention_mask": padding(2, 5, side)}
    inputs |= {"use_cache": False}  # nobody reads the cache's keys at padding
    trio.check(live=mask, input_ids=tokens(2, 7), **inputs)
    trio.check(live=mask, inputs_embeds=torch.randn(2, 7, 32), **inputs)
    trio.check(input_ids=tokens(2, 7))  # no encoder: cross-attention is skipped


@pytest.mark.parametrize("cross", [False, True])
def test_caches_hold_the_same(cross):
    """A prompt, three tokens at once, then one."""
    trio, ids, cache, parts = Trio(gpt2(add_cross_attention=cross)), tokens(2, 8), None, []
    encoder = {"encoder_hidden_states": torch.randn(2, 5, 32)} if cross else {}
    for begin, end in ((0, 4), (4, 7), (7, 8)):
        out = trio.fused(ids[:, begin:end], past_key_values=cache, use_cache=True, **encoder)
        cache = out.past_key_values
        parts.append(out[0])
    assert isinstance(cache, hf.EncoderDecoderCache if cross else hf.DynamicCache)
    assert cache.get_seq_length() == 8
    whole = trio.plain(ids, use_cache=True, **encoder)
    torch.testing.assert_close(torch.cat(parts, 1), whole[0])
    found, expected = tensors(cache), tensors(whole.past_key_values)
    assert len(found) == (8 if cross else 4)
    torch.testing.assert_close(found, expected)


def test_hidden_states_and_attentions(monkeypatch):
    monkeypatch.setattr(notices, "_said", set())
    trio = Trio(gpt2(add_cross_attention=True))
    fused, plain = trio.fused, trio.plain
    plain.set_attn_implementation("eager")
    inputs = {"input_ids": tokens(2, 6), "encoder_hidden_states": torch.randn(2, 5, 32)}
    inputs |= {"output_hidden_states": True, "output_attentions": True}
    with pytest.warns(notices.FallbackWarning, match="output_attentions"):
        actual = fused(**inputs)
    expected = plain(**inputs)
    for name, count in (("hidden_states", 3), ("attentions", 2), ("cross_attentions", 2)):
        assert len(actual[name]) == count
        torch.testing.assert_close(actual[name], expected[name])
    assert actual.attentions[0].shape == (2, 4, 6, 6)
    as_tuple = fused(**inputs, return_dict=False)
    torch.testing.assert_close(as_tuple[0], expected[0])
    only = fused(inputs["input_ids"], output_hidden_states=True)
    assert only.attentions is None
    torch.testing.assert_close(only.hidden_states[-1], only[0])


def test_head_mask_is_refused_beside_cross_attention():
    """transformers does not pass it to cross-attention. Other models honour it (test_attention_interface)."""
    with pytest.raises(ValueError, match="head_mask"):
        Trio(gpt2(add_cross_attention=True)).fused(tokens(1, 4), head_mask=torch.ones(4))


LABELS = {
    "language model": lambda: {"labels": tokens(2, 7)},
    "sequence": lambda: {"labels": torch.tensor([0, 1])},
    "token": lambda: {"labels": torch.randint(0, 2, (2, 7))},
    "question": lambda: {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 5])},
}


@pytest.mark.parametrize("head", LABELS)
def test_heads_and_losses(head):
    trio, mask = Trio(gpt2(head, use_cache=False)), padding(2, 7, "right")
    inputs = {"input_ids": tokens(2, 7), "attention_mask": mask}
    trio.check(live=mask, **inputs)
    trio.check(live=mask, **inputs, **LABELS[head]())


def test_double_heads():
    trio = Trio(gpt2("double heads"))
    inputs = {"input_ids": tokens(2, 3, 6), "mc_token_ids": torch.randint(0, 6, (2, 3))}
    trio.check(**inputs)
    trio.check(**inputs, labels=tokens(2, 3, 6), mc_labels=torch.tensor([0, 2]))


GENERATE = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 10, "temperature": 0.8},
    "beams": {"num_beams": 3, "do_sample": False, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "greedy, no cache": {"do_sample": False, "use_cache": False},
    "greedy, static cache": {"do_sample": False, "cache_implementation": "static", "disable_compile": True},
}


@pytest.mark.parametrize("how", GENERATE)
def test_generate(how):
    """The same tokens from prompts padded on the left, in float64, so no rounding decides between two tokens."""
    trio = Trio(gpt2("language model"), torch.float64)
    inputs = {"input_ids": tokens(2, 5), "attention_mask": padding(2, 5, "left"), "max_new_tokens": 12, **GENERATE[how]}
    results = []
    for model in (trio.plain, trio.fused):
        torch.manual_seed(7)
        results.append(model.generate(**inputs, eos_token_id=None))
    assert torch.equal(*results)
    assert results[0].shape == (4 if how == "beams" else 2, 17)


def test_left_padding_changes_nothing():
    fused, ids = Trio(gpt2("language model")).fused, tokens(1, 5)
    padded, mask = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1), padding(1, 8, "left")
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    torch.testing.assert_close(fused(padded, attention_mask=mask, position_ids=positions)[0][:, 3:], fused(ids)[0])


def test_saves_loads_and_resizes(tmp_path):
    trio, ids = Trio(gpt2("language model")), tokens(2, 6)
    fused, expected = trio.fused, trio.fused(ids)[0]
    assert list(fused.state_dict()) == list(trio.plain.state_dict())
    fused.save_pretrained(tmp_path)
    again = hf.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert again.config._attn_implementation == "sdpa"
    torch.testing.assert_close(again(ids)[0], expected)
    fused.resize_token_embeddings(60)
    assert fused.lm_head.weight is fused.transformer.wte.weight
    assert fused.config.vocab_size == fused.transformer.config.vocab_size == 60
    torch.testing.assert_close(fused(ids)[0][..., :50], expected)
    assert fused.generate(ids, max_new_tokens=2).shape == (2, 8)


def test_copies_and_pickles(tmp_path):
    fused, ids = Trio(gpt2("language model")).fused, tokens(2, 6)
    expected = fused(ids)[0]
    other = copy.deepcopy(fused)
    with torch.no_grad():
        other.transformer.h[0].mlp.c_fc.weight.zero_()
    assert not torch.equal(other(ids)[0], expected)
    assert torch.equal(fused(ids)[0], expected)
    (tmp_path / "model").write_bytes(pickle.dumps((fused, ids, expected)))
    loads = (
        "import pickle, sys; m, i, e = pickle.load(open(sys.argv[1], 'rb')); assert (m(i)[0] - e).abs().max() < 1e-5"
    )
    loads += "; assert m.transformer.h[0].attn.config._attn_implementation == 'pyfused'"
    subprocess.run([sys.executable, "-c", loads, str(tmp_path / "model")], check=True)


def test_gradients_and_checkpointing():
    trio = Trio(gpt2("language model"))
    inputs = {"input_ids": tokens(2, 7), "attention_mask": padding(2, 7, "right"), "labels": tokens(2, 7)}
    expected = trio.check_gradients(lambda output: output.loss, **inputs)
    for reentrant in (True, False):
        found = gradients(trio.fused, lambda model: model(**inputs).loss, reentrant)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], msg=name)


def test_dropout_is_everywhere():
    """Each site alone makes two training calls differ; no site changes evaluation."""
    ids = tokens(2, 6)
    for site in ("attn_pdrop", "embd_pdrop", "resid_pdrop"):
        trio = Trio(gpt2(**{site: 0.5}))
        trio.check(input_ids=ids)
        trio.fused.train()
        assert not torch.equal(trio.fused(ids)[0], trio.fused(ids)[0])


def test_residual_dropout_is_the_plain_models():
    """The same modules draw it in the same order, so one seed gives both models the same mask."""
    trio, ids, results = Trio(gpt2(resid_pdrop=0.5)), tokens(2, 6), []
    for model in (trio.plain.train(), trio.fused.train()):
        torch.manual_seed(3)
        results.append(model(ids)[0])
    torch.testing.assert_close(results[1], results[0])


class Halved(nn.Module):
    """Stands for a LoRA or quantised layer that replaces another."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) / 2


CHANGES = {
    "a part of the MLP": lambda block: setattr(block.mlp, "c_fc", Halved(block.mlp.c_fc)),
    "the MLP": lambda block: setattr(block, "mlp", Halved(block.mlp)),
    "a norm": lambda block: setattr(block, "ln_2", Halved(block.ln_2)),
    "hook on the MLP": lambda block: block.mlp.register_forward_hook(lambda m, args, out: out / 2),
    "hook on a projection": lambda block: block.mlp.c_proj.register_forward_hook(lambda m, args, out: out / 2),
    "hook on a norm": lambda block: block.ln_2.register_forward_pre_hook(lambda m, args: (args[0] / 2,)),
    "hook on the attention": lambda block: block.attn.register_forward_hook(lambda m, args, out: (out[0] / 2, None)),
}


@pytest.mark.parametrize("what", CHANGES)
def test_changes_after_fusing_count(what):
    trio, ids = Trio(gpt2()), tokens(2, 6)
    before = trio.fused(ids)[0]
    for model in trio.models:
        CHANGES[what](model.h[1])
    assert not torch.allclose(trio.fused(ids)[0], before)
    trio.check(input_ids=ids)


def test_functional_call_takes_other_weights():
    fused, ids, other = Trio(gpt2("language model")).fused, tokens(2, 6), gpt2("language model")
    with torch.no_grad():
        actual = torch.func.functional_call(fused, dict(other.named_parameters()), (ids,))[0]
        torch.testing.assert_close(actual, other(ids)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    Trio(gpt2(), dtype).check(input_ids=tokens(2, 6))


def test_float64():
    trio, ids = Trio(gpt2(), torch.float64), tokens(2, 6)
    torch.testing.assert_close(trio.fused(ids)[0], trio.plain(ids)[0])


def test_autocast_keeps_the_residual_stream():
    Trio(gpt2()).check_autocast(input_ids=tokens(2, 6))


def test_filter():
    model = gpt2()
    report = pyfused.fuse_(model, filter_fn=lambda name, module: name.endswith("mlp"))
    assert {e.name for e in report.replaced} == {"h.0.mlp", "h.1.mlp"}
    assert {e.note for e in report.left if e.kind == "GPT2Attention"} == {"filter_fn says no"}
    assert model.h[0].attn.config._attn_implementation == "sdpa"
    pyfused.fuse_(model, filter_fn=lambda name, module: name == "h.1.attn")
    assert [layer.attn.config._attn_implementation for layer in model.h] == ["sdpa", "pyfused"]
    model = gpt2()
    pyfused.fuse_(model, filter_fn=lambda name, module: not isinstance(module, nn.LayerNorm))
    assert is_fused(model.h[0])
    assert not is_fused(model.h[0].ln_2)


@pytest.mark.parametrize("head", ["model", "language model"])
def test_compiles_whole(head):
    torch._dynamo.reset()
    trio = Trio(gpt2(head))
    compiled = torch.compile(trio.fused, fullgraph=True, dynamic=True, backend="eager")
    for length in (5, 9):
        ids = tokens(2, length)
        torch.testing.assert_close(compiled(ids)[0], trio.plain(ids)[0])
