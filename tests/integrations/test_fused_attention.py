"""Do models compute the same after fuse_ switched their attention layers, with masks that they make themselves?"""

import copy

import draws
import pytest
import torch
import transformers as hf
from fused_pairs import Trio
from hf_cases import (
    BART,
    DECODERS,
    ENCODERS,
    MODELS,
    build,
    check_against_eager,
    livened,
    padding,
    tokens,
    with_implementation,
)

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
    first.set_attn_implementation("eager")  # the user's choice counts
    assert fused.config._attn_implementation == "eager"
    pyfused.unfuse_(first)
    assert fused.config is config


@pytest.mark.parametrize("name", [*ENCODERS, *DECODERS, "bart", "t5"])
def test_fused_models(name):
    """Masks stay transformers' own, for sdpa or eager as before."""
    for had in ("sdpa", "eager"):
        plain = build(name, attn_implementation=had)
        inputs = {"input_ids": tokens(2, 9), "attention_mask": padding(2, 9, "left")}
        if plain.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = tokens(2, 7)
        if name not in ENCODERS:
            inputs["use_cache"] = False  # nobody reads the cache's keys at padding
        trio = Trio(plain)
        if name in DECODERS[1:]:  # their eager softmax is float32, where float64's minimum becomes -inf
            trio.truth.set_attn_implementation("sdpa")
        assert any("attention" in e.note for e in trio.report.replaced)
        trio.check(live=inputs["attention_mask"], **inputs)


def test_fused_models_on_a_static_cache():
    trio = Trio(build("gpt2"))

    @torch.no_grad()
    def once():
        ids, out = tokens(2, 9), []
        cache = hf.StaticCache(config=trio.fused.config, max_cache_len=12)
        for begin, end in ((0, 5), (5, 8), (8, 9)):
            out.append(trio.fused(ids[:, begin:end], past_key_values=cache)[0])
        return {"states": (torch.cat(out, 1), trio.plain(ids)[0], trio.truth(ids)[0])}

    draws.check(once)


def test_a_causal_layer_that_does_not_say_so():
    """NLLB-MoE's decoder has is_causal False and runs only on eager in transformers; its masks are never left out."""
    sizes = {k: v for k, v in BART.items() if k != "dropout"}
    model = livened(hf.NllbMoeForConditionalGeneration(hf.NllbMoeConfig(**sizes, num_experts=4)))
    inputs = {"input_ids": tokens(2, 6), "decoder_input_ids": tokens(2, 7), "use_cache": False}
    check_against_eager(model, inputs)
    Trio(with_implementation(model, "eager")).check(**inputs)


@pytest.mark.parametrize("had", ["sdpa", "eager"])
def test_a_layer_without_a_mask(had):
    """sdpa matches a causal layer's queries with the first keys; eager code lets them see every key."""
    model = build("gpt2", attn_implementation=had)
    plain, wide = model.h[0].attn, copy.deepcopy(model).double().h[0].attn
    fused = copy.deepcopy(model)
    pyfused.fuse_(fused)
    fused = fused.h[0].attn

    @torch.no_grad()
    def once():
        hidden = torch.randn(2, 5, model.config.n_embd)
        truth, first = wide(hidden.double())[0], wide(hidden[:, :1].double())[0]
        assert (truth[:, :1] - first).abs().max() < 1e-3 if had == "sdpa" else (truth[:, :1] - first).abs().max() > 1e-2
        return {"output": (fused(hidden)[0], plain(hidden)[0], truth)}

    draws.check(once)


@pytest.mark.parametrize("side", [None, "left"])
def test_an_encoder_that_says_nothing_of_causality(side):
    """Splinter runs only on eager code in transformers, where its missing is_causal never mattered."""
    config = {
        "vocab_size": 50,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    model = livened(hf.SplinterModel(hf.SplinterConfig(**config, question_token_id=3)))
    inputs = {"input_ids": tokens(2, 9), "attention_mask": padding(2, 9, side)}
    live = inputs["attention_mask"]
    check_against_eager(model, inputs, live.bool())
    Trio(with_implementation(model, "eager")).check(live=live, **inputs)
