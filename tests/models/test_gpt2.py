"""Does GPT-2 do with masks, caches and an encoder what its two originals do, and refuse what it cannot do?"""

import numpy as np
import pytest
import torch
from backbone_cases import backbone_of, call_of, hf_model, ids_of, weights_of
from golden_cases import case

from pyfused import GPT2Backbone
from pyfused.testing import assert_close

SIZES = {"vocabulary_size": 61, "num_layers": 2, "num_heads": 4, "hidden_dim": 24, "intermediate_dim": 56}


def test_a_query_that_sees_no_key_gets_zeros(device):
    model = GPT2Backbone(**{**SIZES, "num_layers": 1}).to(device).eval()
    ids, mask = ids_of((2, 5)), torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]])
    out = model(token_ids=ids, padding_mask=mask, return_attentions=True, return_hidden_states=True)
    dead = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool, device=device)
    assert out.attentions[0].transpose(1, 2)[dead].abs().max() == 0
    layer = model.layers[0]
    with torch.no_grad():  # attention gives zeros, and its output projection's bias is zero here
        x = out.hidden_states[0]
        alone = model.final_norm(x + layer.feed_forward(layer.feed_forward_norm(x)))
    torch.testing.assert_close(out.last_hidden_state[dead], alone[dead])
    assert not torch.isnan(out.last_hidden_state).any()


def test_left_padding_leaves_what_a_text_gives(device):
    model = GPT2Backbone(**SIZES).to(device).eval()
    ids = ids_of((1, 6))
    padded = torch.cat([ids_of((1, 3), seed=1), ids], 1)
    mask = torch.tensor([[0] * 3 + [1] * 6])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        alone = model(token_ids=ids, padding_mask=None)
        beside = model(token_ids=padded, padding_mask=mask, position_ids=positions)[:, 3:]
        twice = {"token_ids": padded.expand(2, -1), "padding_mask": mask.expand(2, -1)}
        both = model(twice, position_ids=positions)[:, 3:]  # (1, S) for all rows
    torch.testing.assert_close(alone, beside)
    torch.testing.assert_close(alone.expand_as(both), both)
    with torch.no_grad():
        shifted = model(token_ids=padded, padding_mask=mask)[:, 3:]
    assert (alone - shifted).abs().max() > 1e-3  # as in both originals, positions count from the padding unless given


@pytest.mark.parametrize(
    "kind", [np.int64, np.int32, np.uint16, np.bool_, np.float32, torch.int8, torch.float16], ids=str
)
def test_any_dtype_of_mask_and_ids(kind, device):
    model = GPT2Backbone(**SIZES).to(device).eval()
    ids, mask = ids_of((2, 7)), torch.ones(2, 7)
    mask[1, 5:] = 0
    expected = model(token_ids=ids, padding_mask=mask)
    cast = mask.to(kind) if isinstance(kind, torch.dtype) else mask.numpy().astype(kind)
    if kind in (np.float32, torch.float16):
        cast[1, 6] = 0.4  # Keras casts to int32
        token_ids = ids
    elif kind is np.bool_:
        token_ids = ids.numpy()
    else:
        token_ids = ids.to(kind) if isinstance(kind, torch.dtype) else ids.numpy().astype(kind)
    assert torch.equal(model({"token_ids": token_ids, "padding_mask": cast}), expected)


def test_a_mask_of_ones_is_no_mask(device):
    model = GPT2Backbone(**SIZES).to(device).eval()
    ids = ids_of((2, 7))
    assert torch.equal(
        model(token_ids=ids, padding_mask=None), model({"token_ids": ids.numpy()}, padding_mask=np.ones((2, 7)))
    )


def test_untied_reverse_embedding(device):
    model = GPT2Backbone(**SIZES, tie_embedding_weights=False).to(device)
    hidden = torch.randn(2, 3, 24, device=device)
    expected = hidden @ model.token_embedding.reverse_weight.t()
    torch.testing.assert_close(model.token_embedding(hidden, reverse=True), expected)
    assert (expected - hidden @ model.token_embedding.weight.t()).abs().max() > 1e-3


GOOD = {"token_ids": torch.zeros(2, 5, dtype=torch.int64), "padding_mask": None}
CROSS = {"encoder_hidden_states": torch.zeros(2, 3, 24), "padding_mask": None}


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"token_ids": np.array([["a"]])}, TypeError, "token_ids is a numpy array"),
        ({"token_ids": torch.zeros(5, dtype=torch.int64)}, ValueError, r"token_ids has shape \(5,\)"),
        ({"token_ids": torch.zeros(2, 41, dtype=torch.int64)}, ValueError, "length 41; it takes at most max_sequence"),
        ({"padding_mask": torch.ones(2, 4)}, ValueError, r"padding_mask has shape \(2, 4\).*\(B, Sk\) = \(2, 5\)"),
        ({"padding_mask": 1}, TypeError, "padding_mask is an int"),
        ({"token_type_ids": torch.full((2, 5), 61)}, IndexError, "token_type_ids holds 61"),
        ({"token_type_ids": torch.zeros(2, 4, dtype=torch.int64)}, ValueError, "token_type_ids has shape"),
        ({"position_ids": torch.full((2, 5), 40)}, IndexError, "position_ids holds 40; it takes 0 to 39"),
        ({"inputs_embeds": torch.zeros(2, 5, 24).int(), "token_ids": None}, TypeError, "inputs_embeds is int32"),
        ({"attention_mask": torch.ones(2, 5)}, ValueError, r"attention_mask has shape \(2, 5\).*padding_mask"),
        ({"attention_mask": torch.ones(2, 1, 5, 5).long()}, TypeError, "attention_mask is int64"),
        ({"packed": True}, ValueError, "packed=True needs position_ids"),
        ({"encoder_hidden_states": torch.zeros(2, 3, 24)}, ValueError, "without cross-attention"),
        ({"cache": "yes"}, TypeError, "cache is a str"),
    ],
)
def test_bad_input_is_refused_by_name(change, error, message, device):
    model = GPT2Backbone(**SIZES, max_sequence_length=40).to(device)
    with pytest.raises(error, match=message):
        model({**GOOD, **change})


def test_more_bad_input(device):
    model = GPT2Backbone(**SIZES, max_sequence_length=40).to(device)
    with pytest.raises(ValueError, match="token_ids is given in the dict and as a keyword"):
        model(GOOD, token_ids=GOOD["token_ids"])
    with pytest.raises(ValueError, match="packed=True takes neither"):
        model(GOOD, packed=True, position_ids=GOOD["token_ids"], attention_mask=torch.ones(2, 1, 5, 5))
    with pytest.raises(ValueError, match="cache has 3 rows"):
        model(GOOD, cache=model.new_cache(3, 8))
    with pytest.raises(ValueError, match="room for 4; it cannot take 5 more"):
        model(GOOD, cache=model.new_cache(2, 4))
    other = GPT2Backbone(**{**SIZES, "num_heads": 2}).to(device)
    with pytest.raises(ValueError, match="cache is for"):
        model(GOOD, cache=other.new_cache(2, 8))
    with pytest.raises(ValueError, match="batch_size is 0"):
        model.new_cache(0)
    cross = GPT2Backbone(**SIZES, cross_attention=True).to(device)
    with pytest.raises(ValueError, match="encoder_padding_mask is given without"):
        cross(GOOD, encoder_padding_mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match="encoder_padding_mask has shape"):
        cross({**GOOD, **CROSS}, encoder_padding_mask=torch.ones(2, 4))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"num_heads": 25}, ValueError, "num_heads is 25 and hidden_dim 24"),
        ({"hidden_dim": 2048}, ValueError, "hidden_dim // num_heads"),
        ({"max_sequence_length": None}, TypeError, "max_sequence_length is None"),
        ({"attention_dropout": "a"}, TypeError, "attention_dropout is 'a'"),
        ({"scale_attention": 1}, TypeError, "scale_attention is 1"),
    ],
)
def test_bad_arguments_are_refused_by_name(change, error, message):
    with pytest.raises(error, match=message):
        GPT2Backbone(**{**SIZES, **change})


def test_a_cache_carries_no_gradient(device):
    model = GPT2Backbone(**SIZES).to(device)
    assert model(GOOD).requires_grad
    assert not model(GOOD, cache=model.new_cache(2, 5)).requires_grad


# ---- recorded cases beyond test_golden.py ------------------------------------------------------------------------------


def test_attention_mask_replaces_causality(device):
    entry, inputs, outputs = case("gpt2_a_mask4d")
    config, state = weights_of(entry)
    hf = hf_model("gpt2", torch.float64, **config)
    hf.load_state_dict(state)
    allowed = inputs["attention_mask_bool"]
    with torch.no_grad():
        truth = hf(inputs["input_ids"], attention_mask=allowed).last_hidden_state
    model = backbone_of(entry).to(device)
    additive = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    for attention_mask in (allowed, additive, allowed.expand(-1, 4, -1, -1).numpy()):
        actual = model(token_ids=inputs["input_ids"], padding_mask=None, attention_mask=attention_mask)
        for source in ("hf_sdpa", "hf_eager"):
            assert_close(actual, outputs[source]["last_hidden_state"], truth, source)


def test_past_keys_and_values(device):
    entry, inputs, outputs = case("gpt2_a_past_kv")
    model, cache = backbone_of(entry).to(device), None
    actual, end = {}, 0
    cache = model.new_cache(2, 9)
    for step, new in enumerate((5, 1, 3)):
        end += new
        ids, mask = inputs["input_ids"][:, end - new : end], inputs["attention_mask"][:, :end]
        actual[f"step{step}"] = model(token_ids=ids, padding_mask=mask, cache=cache)
        assert cache.length == end
        for layer in range(3):
            actual[f"step{step}.key.{layer}"] = cache.keys(layer).clone()
            actual[f"step{step}.value.{layer}"] = cache.values(layer).clone()
    assert outputs["ref64_zero"].keys() <= actual.keys()
    for key, truth in outputs["ref64_zero"].items():
        assert_close(actual[key], outputs["hf_sdpa"][key], truth, key)


def test_keras_cache(device):
    entry, inputs, outputs = case("gpt2_a_keras_cache")
    results = {}
    for dtype in (torch.float32, torch.float64):
        model = backbone_of(entry, dtype).to(device)
        cache = model.new_cache(2, 9)
        hidden = model(token_ids=inputs["input_ids"], padding_mask=None, cache=cache)
        pairs = [torch.stack([cache.keys(i), cache.values(i)], 1) for i in range(3)]  # (B, 2, H, T, d)
        kept = torch.stack(pairs, 1).transpose(3, 4).clone()
        cache.length = 4
        again = model(token_ids=inputs["input_ids"][:, 4:5], padding_mask=None, cache=cache)
        logits = model.token_embedding(hidden, reverse=True)
        results[dtype] = {"hidden": hidden, "cache": kept, "hidden_at4": again, "logits": logits}
    truth = results[torch.float64]
    assert torch.allclose(truth["hidden_at4"], truth["hidden"][:, 4:5], rtol=0, atol=1e-12)
    for key, plain in outputs["keras"].items():
        assert_close(results[torch.float32][key], plain, truth[key], key)


def test_cross_attention(device):
    entry, inputs, outputs = case("gpt2_cross_t7")
    model = backbone_of(entry).to(device)
    call = call_of("gpt2", inputs)
    encoder = {k: call[k] for k in ("encoder_hidden_states", "encoder_padding_mask")}
    ids, mask = call["token_ids"], call["padding_mask"]
    cache = model.new_cache(3, 7)
    model(token_ids=ids[:, :4], padding_mask=mask[:, :4], cache=cache, **encoder)
    with torch.no_grad():
        actual = {
            "last_hidden_state": model(call),
            "no_encoder": model(token_ids=ids, padding_mask=mask),
            "cached_tail": model(token_ids=ids[:, 4:], padding_mask=mask, cache=cache),
            "cross.key.0": cache.cross[0][0],
        }
    truth = outputs["ref64_zero"]
    assert actual.keys() == truth.keys()
    for key, value in actual.items():
        assert_close(value, outputs["hf_sdpa"][key], truth[key], key)
    out = model(call, return_attentions=True)
    assert [tuple(p.shape) for p in out.cross_attentions] == [(3, 3, 7, 5)] * 2
    assert out.cross_attentions[0][2].abs().max() == 0  # every encoder key of row 2 is masked
    with pytest.raises(ValueError, match="encoder_hidden_states is given, but the cache"):
        model(token_ids=ids[:, :0], padding_mask=mask, cache=cache, **encoder)
