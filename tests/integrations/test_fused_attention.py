"""Do models whose attention layers fuse_ put on the interface compute what they did, with the masks they make themselves?"""

import pytest
import torch
import transformers as hf
from hf_cases import BART, DECODERS, ENCODERS, MODELS, build, livened, padding, tokens, with_implementation

import pyfused


def test_two_models_with_one_config():
    config = MODELS["bert"]().config
    first, second = (livened(hf.BertModel(config)) for _ in range(2))
    pyfused.fuse_(first)
    fused, plain = (model.encoder.layer[0].attention.self for model in (first, second))
    assert fused.config._attn_implementation == "pyfused"
    assert plain.config is first.config is second.config is config
    assert config._attn_implementation == "sdpa"
    assert fused.config.hidden_size == config.hidden_size
    fused.config.name_or_path = "through"
    assert config.name_or_path == "through"
    first.set_attn_implementation("eager")  # the user's word counts
    assert fused.config._attn_implementation == "eager"
    pyfused.unfuse_(first)
    assert fused.config is config


@pytest.mark.parametrize("name", [*ENCODERS, *DECODERS, "bart", "t5"])
def test_fused_models(name):
    """Whose masks are transformers' own for sdpa or eager, whichever the model had."""
    for had in ("sdpa", "eager"):
        plain = build(name, attn_implementation=had)
        inputs = {"input_ids": tokens(2, 9), "attention_mask": padding(2, 9, "left")}
        if plain.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = tokens(2, 7)
        expected = plain(**inputs)[0]
        report = pyfused.fuse_(plain)
        assert any("attention" in e.note for e in report.replaced)
        live = ... if plain.config.is_encoder_decoder else inputs["attention_mask"].bool()
        torch.testing.assert_close(plain(**inputs)[0][live], expected[live], rtol=1e-4, atol=1e-4)


def test_fused_models_on_a_static_cache():
    plain = build("gpt2")
    ids, out = tokens(2, 9), []
    expected = plain(ids)[0]
    pyfused.fuse_(plain)
    cache = hf.StaticCache(config=plain.config, max_cache_len=12)
    for begin, end in ((0, 5), (5, 8), (8, 9)):
        out.append(plain(ids[:, begin:end], past_key_values=cache)[0])
    torch.testing.assert_close(torch.cat(out, 1), expected)


def test_a_causal_layer_that_does_not_say_so():
    """NLLB-MoE's decoder has is_causal False and runs on eager alone in transformers; its masks are never left out."""
    sizes = {k: v for k, v in BART.items() if k != "dropout"}
    model = livened(hf.NllbMoeForConditionalGeneration(hf.NllbMoeConfig(**sizes, num_experts=4)))
    inputs = {"input_ids": tokens(2, 6), "decoder_input_ids": tokens(2, 7)}
    expected = model(**inputs)[0]
    torch.testing.assert_close(with_implementation(model, "pyfused")(**inputs)[0], expected)
    pyfused.fuse_(with_implementation(model, "eager"))
    torch.testing.assert_close(model(**inputs)[0], expected)


@pytest.mark.parametrize("had", ["sdpa", "eager"])
def test_a_layer_without_a_mask(had):
    """sdpa takes a causal layer's queries for the first keys; eager code lets them see every key."""
    model = build("gpt2", attn_implementation=had)
    layer, hidden = model.h[0].attn, torch.randn(2, 5, model.config.n_embd)
    expected, first = layer(hidden)[0], layer(hidden[:, :1])[0]
    assert torch.allclose(expected[:, :1], first, atol=1e-5) == (had == "sdpa")
    pyfused.fuse_(model)
    torch.testing.assert_close(layer(hidden)[0], expected)


@pytest.mark.parametrize("side", [None, "left"])
def test_an_encoder_that_says_nothing_of_causality(side):
    """Splinter runs on eager code alone in transformers: that it has no is_causal never mattered."""
    config = {
        "vocab_size": 50,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    model = livened(hf.SplinterModel(hf.SplinterConfig(**config, question_token_id=3)))
    inputs = {"input_ids": tokens(2, 9), "attention_mask": padding(2, 9, side)}
    live = inputs["attention_mask"].bool()
    expected = model(**inputs)[0][live]
    torch.testing.assert_close(with_implementation(model, "pyfused")(**inputs)[0][live], expected)
    pyfused.fuse_(with_implementation(model, "eager"))
    torch.testing.assert_close(model(**inputs)[0][live], expected)
