"""Is a small set of everything right with the transformers release that is first on the path? `make test-versions` runs it with
several releases, tests/integrations/test_older_transformers.py with an old one."""

import copy
import os

import pytest
import torch
import transformers as hf
from family_cases import FAMILIES, summary
from fused_pairs import Trio, padded
from hf_cases import BERT, GPT2, IDS, T5, VOCABULARY, WIDTHS, build, check_against_eager, livened, padding, tokens

import pyfused
from pyfused.integrations.transformers import attention
from pyfused.nn import attention as visibility


def test_the_release():
    assert os.environ.get("PYFUSED_TEST_TRANSFORMERS", hf.__version__) == hf.__version__


OURS = {
    "GPT-2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)),
    "ALBERT": lambda: hf.AlbertModel(hf.AlbertConfig(**BERT, embedding_size=16)),
    "FNet": lambda: hf.FNetModel(hf.FNetConfig(**IDS, **WIDTHS, hidden_dropout_prob=0.0, max_position_embeddings=40)),
    "T5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5, decoder_start_token_id=0)),
    "mT5": lambda: hf.MT5ForConditionalGeneration(hf.MT5Config(**T5, decoder_start_token_id=0)),
}
OTHERS = ("BERT", "RoBERTa", "DistilBERT", "MPNet", "ViT", "Whisper", "BART", "Llama", "Gemma", "GPT-NeoX", "UMT5")
WITHOUT_MASK = "FNet", "ViT", "Whisper"


def build_one(name):
    return livened(OURS[name]() if name in OURS else FAMILIES[name][0]())


def inputs_of(name, model, side="right"):
    """Padded text, for the decoder too; or a picture, or speech."""
    if name in WITHOUT_MASK:
        return {"input_ids": tokens(2, 9)} if name == "FNet" else FAMILIES[name][1](), None
    ids, mask = padded(2, 9, VOCABULARY, side)
    given = {"input_ids": ids, "attention_mask": mask}
    if not model.config.is_encoder_decoder:
        return given, mask
    more, live = padded(2, 7, VOCABULARY, "right", seed=1)
    return {**given, "decoder_input_ids": more, "decoder_attention_mask": live, "use_cache": False}, live


@pytest.mark.parametrize("name", [*OURS, *OTHERS])
def test_outputs_and_report(name):
    trio = Trio(build_one(name))
    given, live = inputs_of(name, trio.plain)
    trio.check(live=live, **given)
    print(f"\n{name}: {' | '.join(summary(trio.report))}")
    assert trio.report.replaced
    if name in OURS:
        assert trio.report.left == ()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["GPT-2", "ALBERT", "T5", "BERT", "MPNet", "BART", "Llama"])
def test_padding_is_no_dense_bias(name, implementation, monkeypatch):
    """Whatever a release writes where a key is visible, 0.0 or -0.0, and for each query or for all of them."""
    made, model = [], build_one(name)
    for file in (attention, visibility):
        monkeypatch.setattr(file, "attention", lambda *args, **more: made.append(more) or pyfused.attention(*args, **more))
    for part in model.modules():
        if isinstance(part, hf.PreTrainedModel) and name != "MPNet":
            part.set_attn_implementation(implementation)
    pyfused.fuse_(model)
    model(**inputs_of(name, model)[0])
    assert all(call["attn_bias"] is None for call in made)  # none was made if the release's own code has the attention


@pytest.mark.parametrize("name", ["GPT-2", "ALBERT", "T5", "BERT", "Llama"])
def test_gradients(name):
    trio = Trio(build_one(name))
    given, live = inputs_of(name, trio.plain)
    trio.check_gradients(lambda output: (output[0] * live[..., None].to(output[0].dtype)).square().mean(), **given)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["GPT-2", "T5", "mT5", "Llama"])
def test_generate(name, cache):
    """In float64 no rounding decides between two tokens."""
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**{**IDS, **WIDTHS})) if name == "Llama" else OURS[name]()
    trio = Trio(livened(model), torch.float64)
    ids, mask = padded(2, 9, VOCABULARY, "left")
    options = {"attention_mask": mask, "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    options |= {"cache_implementation": "static"} if cache == "static" else {}
    assert torch.equal(trio.fused.generate(ids, **options), trio.plain.generate(ids, **options))


@pytest.mark.parametrize("name", ["gpt2", "llama", "bart"])
def test_attention_by_name(name):
    model, mask = build(name), padding(2, 9, "left")
    inputs = {"input_ids": tokens(2, 9), "attention_mask": mask}
    check_against_eager(model, inputs, live=mask.bool() if name != "bart" else ...)


@pytest.mark.parametrize("name", ["GPT-2", "ALBERT", "T5", "BERT", "BART", "Llama"])
def test_attentions(name):
    """The weights, and the outputs before and after a call that asks for them."""
    model = build_one(name)
    for part in model.modules():  # 5.15's T5 does not hand it down
        if isinstance(part, hf.PreTrainedModel):
            part.set_attn_implementation("eager")
    trio = Trio(model)
    given, live = inputs_of(name, trio.plain)
    found = trio.check(live=live, **given, output_attentions=True, output_hidden_states=True)
    assert any("attentions" in key for key in found)
    trio.check(live=live, **given)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_layer_called_by_hand(implementation):
    """Without a mask, which means another thing in each implementation and release."""
    model = build_one("GPT-2")
    model.set_attn_implementation(implementation)
    trio, x = Trio(model), torch.randn(2, 5, 32)
    fused, plain = (m.transformer.h[0](x) for m in (trio.fused, trio.plain))
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)


def test_scales_that_only_eager_code_has_are_left_or_refused():
    """Older releases do not pass GPT-2's scales to the interface; newer ones do."""
    model = livened(hf.GPT2Model(hf.GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True)))
    passes = hasattr(model.h[0].attn, "scaling")
    assert any("scale_attn_weights" in entry.note for entry in pyfused.fuse_(model).left) == (not passes)
    model = hf.GPT2Model._from_config(pyfused.unfuse_(model).config, attn_implementation="pyfused")
    if passes:
        model(tokens(1, 4))
    else:
        with pytest.raises(ValueError, match="scale_attn_by_inverse_layer_idx"):
            model(tokens(1, 4))


def test_skip_padding_or_a_reason():
    refused = []
    for name in ("BERT", "MPNet", "T5"):
        model = build_one(name)
        plain = copy.deepcopy(model)
        try:
            report = pyfused.fuse_(model, skip_padding=True)
        except ValueError:
            refused.append(name)
            continue
        notes = [entry.note for entry in (*report.replaced, *report.left)]
        assert any("real tokens alone" in note or note.startswith("skip_padding: ") for note in notes)
        given, live = inputs_of(name, model)
        torch.testing.assert_close(model(**given)[0][live.bool()], plain(**given)[0][live.bool()], rtol=1e-3, atol=1e-3)
    assert refused in ([], ["T5"])  # T5 without the attention interface


def test_copies_and_unfuse():
    trio = Trio(build_one("T5"))
    given, _ = inputs_of("T5", trio.plain)
    expected = trio.fused(**given)[0]
    assert torch.equal(copy.deepcopy(trio.fused)(**given)[0], expected)
    assert torch.equal(pyfused.unfuse_(trio.fused)(**given)[0], trio.plain(**given)[0])
