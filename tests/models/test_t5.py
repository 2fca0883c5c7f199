"""Does T5 do with masks, caches and each stack alone what its two originals do, and refuse what it cannot do?"""

import pytest
import torch
from backbone_cases import backbone_of, call_of, ids_of, inputs_of
from golden_cases import case

from pyfused import T5Backbone
from pyfused.testing import assert_close

SIZES = {"vocabulary_size": 61, "num_layers": 2, "num_heads": 4, "hidden_dim": 24, "intermediate_dim": 56}


def test_encode_alone(device):
    model = T5Backbone(**SIZES).to(device).eval()
    call = call_of("t5", inputs_of("t5", padding="right"))
    source = {k: v for k, v in call.items() if k.startswith("encoder")}
    with torch.no_grad():
        both = model(call)
        alone = model.encode(source)
        assert torch.equal(alone, both["encoder_sequence_output"])
        given = {k: v for k, v in call.items() if k != "encoder_token_ids"} | {"encoder_sequence_output": alone}
        assert torch.equal(model(given)["decoder_sequence_output"], both["decoder_sequence_output"])
        embedded = {f"{side}_inputs_embeds": model.token_embedding(call[f"{side}_token_ids"].to(device))
                    for side in ("encoder", "decoder")}  # fmt: skip
        masks = {k: v for k, v in call.items() if k.endswith("mask")}
        assert torch.equal(model(masks, **embedded)["decoder_sequence_output"], both["decoder_sequence_output"])


def test_padding_changes_no_real_row(device):
    model = T5Backbone(**SIZES).to(device).eval()
    ids, target = ids_of((1, 6)), ids_of((1, 5), seed=2)
    with torch.no_grad():
        alone = model(call_of("t5", {"input_ids": ids, "decoder_input_ids": target}))["decoder_sequence_output"]
        for left, right in ((3, 0), (0, 3), (2, 2)):
            padded = torch.cat([ids_of((1, left), seed=3), ids, ids_of((1, right), seed=4)], 1)
            mask = torch.tensor([[0] * left + [1] * 6 + [0] * right])
            out = model(call_of("t5", {"input_ids": padded, "attention_mask": mask, "decoder_input_ids": target}))
            torch.testing.assert_close(out["decoder_sequence_output"], alone)


def test_wholly_padded_sources_give_finite_rows(device):
    model = T5Backbone(**SIZES).to(device).eval()
    inputs = inputs_of("t5", 2, 12)
    inputs["attention_mask"] = torch.tensor([[0] * 12, [1] * 12])
    out = model(call_of("t5", inputs), return_attentions=True)
    assert torch.isfinite(out["decoder_sequence_output"]).all()
    assert out["cross_attentions"][1][0].abs().max() == 0


def test_only_the_pass_writes_to_a_cache(device):
    """A call that fails before the decoder runs does not change the cache."""
    model = T5Backbone(**SIZES).to(device).eval()
    cache, call = model.new_cache(3, 12), call_of("t5", inputs_of("t5", padding="right"))

    def fail(*_):
        raise RuntimeError("on the way")

    hook = model.decoder.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="on the way"):
        model(call, cache=cache)
    assert (cache.length, cache.encoder_mask, cache.cross[0]) == (0, None, None)
    hook.remove()
    model(call, cache=cache)
    assert torch.equal(cache.encoder_mask, call["encoder_padding_mask"].bool().to(device))


def test_logits_are_scaled_where_the_weights_are_tied(device):
    hidden = torch.randn(2, 3, 24, device=device)
    for tied in (True, False):
        for scaled in (None, True, False):
            model = T5Backbone(**SIZES, tie_embedding_weights=tied, scale_logits=scaled).to(device)
            embedding = model.token_embedding
            head = embedding.weight if tied else embedding.reverse_weight
            expected = (hidden * (24**-0.5 if (tied if scaled is None else scaled) else 1.0)) @ head.t()
            torch.testing.assert_close(model.logits(hidden), expected)


GOOD = {
    "encoder_token_ids": torch.zeros(2, 5, dtype=torch.int64), "encoder_padding_mask": None,
    "decoder_token_ids": torch.zeros(2, 4, dtype=torch.int64), "decoder_padding_mask": None,
}  # fmt: skip


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"decoder_token_ids": None}, ValueError, "decoder_token_ids is missing"),
        ({"token_ids": 1}, ValueError, "unknown key 'token_ids'; it takes encoder_token_ids"),
        ({"decoder_token_ids": torch.zeros(2, 4)}, TypeError, "decoder_token_ids is float32"),
        ({"decoder_token_ids": torch.full((2, 4), -1)}, IndexError, "decoder_token_ids holds -1"),
        ({"encoder_token_ids": torch.zeros(3, 5).long()}, ValueError, "encoder_token_ids has 3 rows.*batch size, 2"),
        ({"encoder_padding_mask": torch.ones(2, 4)}, ValueError, r"encoder_padding_mask has shape \(2, 4\).*\(B, Se\)"),
        ({"decoder_padding_mask": torch.ones(2, 5)}, ValueError, r"decoder_padding_mask has shape \(2, 5\).*\(B, Sd\)"),
        ({"encoder_padding_mask": 1}, TypeError, "encoder_padding_mask is an int"),
        ({"decoder_inputs_embeds": torch.zeros(2, 4, 24)}, ValueError, "given beside decoder_token_ids"),
        ({"encoder_sequence_output": torch.zeros(2, 5, 24)}, ValueError, "given beside encoder_token_ids"),
        ({"encoder_sequence_output": torch.zeros(2, 5, 8), "encoder_token_ids": None}, ValueError, "has shape"),
        ({"encoder_sequence_output": torch.zeros(3, 5, 24), "encoder_token_ids": None}, ValueError, "has shape"),
        ({"cache": "yes"}, TypeError, "cache is a str"),
    ],
)
def test_bad_input_is_refused_by_name(change, error, message, device):
    model = T5Backbone(**SIZES).to(device)
    with pytest.raises(error, match=message):
        model({**GOOD, **change})


def test_more_bad_input(device):
    model = T5Backbone(**SIZES).to(device)
    with pytest.raises(ValueError, match="cache has 3 rows"):
        model(GOOD, cache=model.new_cache(3, 8))
    with pytest.raises(ValueError, match="room for 3; it cannot take 4 more"):
        model(GOOD, cache=model.new_cache(2, 3))
    cache = model.new_cache(2, 8)
    model(GOOD, cache=cache)
    with pytest.raises(ValueError, match="encoder_token_ids is given, but the cache holds"):
        model(GOOD, cache=cache)
    with pytest.raises(ValueError, match="capacity is 0"):
        model.new_cache(2, 0)
    with pytest.raises(ValueError, match="unknown key 'decoder_token_ids'"):
        model.encode(GOOD)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"num_decoder_layers": 1.5}, TypeError, "num_decoder_layers is 1.5"),
        ({"num_heads": 25}, ValueError, "num_heads is 25 and hidden_dim 24"),
        ({"key_value_dim": 257}, ValueError, "key_value_dim is 257; it takes at most 256"),
        ({"key_value_dim": 0}, ValueError, "key_value_dim is 0"),
        ({"activation": None}, ValueError, "activation is None"),
        ({"use_gated_activation": 1}, TypeError, "use_gated_activation is 1"),
        ({"tie_embedding_weights": None}, TypeError, "scale_logits is None|tie_embedding_weights is None"),
        ({"num_buckets": 2}, ValueError, "2 buckets"),
        ({"max_distance": 16}, ValueError, "max_distance is 16"),
        ({"decoder_start_token_id": 61}, ValueError, "decoder_start_token_id is 61"),
        ({"max_sequence_length": 5}, TypeError, "unknown argument 'max_sequence_length'"),
    ],
)
def test_bad_configurations_are_refused_by_name(change, error, message):
    with pytest.raises(error, match=message):
        T5Backbone(**{**SIZES, **change})


@pytest.mark.parametrize("activation", ["gelu", "gelu_python", "gelu_fast", "swish", "keras_hub>gelu_approximate"])
def test_spellings_of_activations(activation):
    model = T5Backbone(**SIZES, activation=activation)
    expected = {"gelu_python": "gelu", "gelu_fast": "gelu_new", "swish": "silu"}.get(activation, activation)
    assert model.get_config()["activation"] == expected.replace("keras_hub>gelu_approximate", "gelu_new")


def test_past_keys_and_values(device):
    """A recorded case beyond test_golden.py."""
    entry, inputs, outputs = case("t5_past_kv")
    model = backbone_of(entry).to(device)
    cache = model.new_cache(2, 7)
    call, actual, end = call_of("t5", inputs), {}, 0
    source = {k: v for k, v in call.items() if k.startswith("encoder")}
    for step, new in enumerate((4, 1, 2)):
        end += new
        ids = inputs["decoder_input_ids"][:, end - new : end]
        out = model(decoder_token_ids=ids, decoder_padding_mask=None, cache=cache, **source)
        assert ("encoder_sequence_output" in out) == (step == 0)
        source = {}
        actual[f"step{step}"] = model.logits(out["decoder_sequence_output"]).detach()
        assert cache.length == end
        if step == 0:
            actual |= {"self.key.0": cache.keys(0).clone(), "cross.key.0": cache.cross[0][0].clone()}
    assert actual.keys() == outputs["ref64"].keys()
    for key, truth in outputs["ref64"].items():
        assert_close(actual[key], [outputs["hf_sdpa"][key], outputs["hf_eager"][key]], truth, key)
