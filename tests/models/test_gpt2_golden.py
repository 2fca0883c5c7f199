"""Does GPT-2 reproduce KerasHub's and transformers' outputs in every recorded case?"""

import pytest
import torch
from gpt2_cases import ROOT, case, gpt2_of_case, gpt2_state, hf_gpt2, manifest
from safetensors.torch import load_file

from pyfused.testing import assert_close

RENAMED = {"input_ids": "token_ids", "attention_mask": "padding_mask", "encoder_attention_mask": "encoder_padding_mask"}
PLAIN = [c["id"] for c in manifest()["cases"] if c["id"].startswith("gpt2") and (c["hf_call"] or c["keras_call"])]
SPECIAL = {"gpt2_a_mask4d", "gpt2_a_states_attn", "gpt2_cross_t7"}


def call_of(inputs, *names):
    """The inputs by pyfused's names; a missing padding_mask is None."""
    call = {RENAMED.get(k, k): v for k, v in inputs.items() if not names or k in names}
    return {"padding_mask": None, **call}


def truth_of(outputs):
    """The float64 outputs, with zeros in rows that see no key."""
    return outputs.get("ref64_zero", outputs.get("ref64"))


def on(device, tensors):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in tensors.items()}


@pytest.mark.parametrize("name", [c for c in PLAIN if c not in SPECIAL])
def test_last_hidden_state(name, device):
    entry, inputs, outputs = case(name)
    call = call_of(inputs)
    if "packed" in name:
        call["packed"] = True
    actual = gpt2_of_case(entry).to(device)(call)
    truth = truth_of(outputs)["last_hidden_state"]
    references = {k: v["last_hidden_state"] for k, v in outputs.items() if not k.startswith("ref64")}
    live = [
        v for v in references.values() if (v.double() - truth).abs().max() < 1e-3
    ]  # the others give means in rows that see no key
    assert live
    for plain in live:
        assert_close(actual, plain, truth, name)


def test_every_recorded_gpt2_case_is_tested():
    named = set(PLAIN) | {"gpt2_a_past_kv", "gpt2_a_keras_cache", "gpt2_a_grad"}
    assert named == {c["id"] for c in manifest()["cases"] if c["id"].startswith("gpt2")}
    assert named >= SPECIAL
    assert len(PLAIN) >= 18


def test_each_backend(each_backend, device):
    for name in ("gpt2_a_left_t13", "gpt2_a_packed_posids"):
        entry, inputs, outputs = case(name)
        call = {**call_of(inputs), "packed": "packed" in name}
        with torch.no_grad():
            actual = gpt2_of_case(entry).to(device)(on(device, call))
        assert_close(actual, outputs["hf_sdpa"]["last_hidden_state"], truth_of(outputs)["last_hidden_state"], name)


def test_attention_mask_replaces_causality(device):
    entry, inputs, outputs = case("gpt2_a_mask4d")
    state = load_file(ROOT / manifest()["weights"][entry["weights"]]["file"])
    config = {k: v for k, v in manifest()["weights"][entry["weights"]]["hf_config"].items() if k.startswith("n_")}
    hf = hf_gpt2(state, torch.float64, **config)
    allowed = inputs["attention_mask_bool"]
    with torch.no_grad():
        truth = hf(inputs["input_ids"], attention_mask=allowed).last_hidden_state
    model = gpt2_of_case(entry).to(device)
    additive = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    for attention_mask in (allowed, additive, allowed.expand(-1, 4, -1, -1).numpy()):
        actual = model(token_ids=inputs["input_ids"], padding_mask=None, attention_mask=attention_mask)
        for source in ("hf_sdpa", "hf_eager"):
            assert_close(actual, outputs[source]["last_hidden_state"], truth, source)


def test_hidden_states_and_attentions(device):
    entry, inputs, outputs = case("gpt2_a_states_attn")
    model = gpt2_of_case(entry).to(device)
    out = model(call_of(inputs), return_hidden_states=True, return_attentions=True)
    actual = {"last_hidden_state": out.last_hidden_state}
    actual |= {f"hidden_states.{i}": v for i, v in enumerate(out.hidden_states)}
    actual |= {f"attentions.{i}": v for i, v in enumerate(out.attentions)}
    assert actual.keys() == outputs["ref64"].keys()
    for key, value in actual.items():
        assert_close(value, outputs["hf_eager"][key], outputs["ref64"][key], key)
    assert torch.equal(out.last_hidden_state, model(call_of(inputs)))
    only = model(call_of(inputs), return_hidden_states=True)
    assert only.attentions is None
    assert len(only.hidden_states) == 4


def test_past_keys_and_values(device):
    entry, inputs, outputs = case("gpt2_a_past_kv")
    model, cache = gpt2_of_case(entry).to(device), None
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
        model = gpt2_of_case(entry, dtype).to(device)
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
    model = gpt2_of_case(entry).to(device)
    call = call_of(inputs)
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
    truth = truth_of(outputs)
    assert actual.keys() == truth.keys()
    for key, value in actual.items():
        assert_close(value, outputs["hf_sdpa"][key], truth[key], key)
    out = model(call, return_attentions=True)
    assert [tuple(p.shape) for p in out.cross_attentions] == [(3, 3, 7, 5)] * 2
    assert out.cross_attentions[0][2].abs().max() == 0  # every encoder key of row 2 is masked
    with pytest.raises(ValueError, match="encoder_hidden_states is given, but the cache"):
        model(token_ids=ids[:, :0], padding_mask=mask, cache=cache, **encoder)


def test_gradients(device):
    entry, inputs, outputs = case("gpt2_a_grad")
    recorded = gpt2_state({k.removeprefix("grad."): v for k, v in outputs["ref64"].items() if k != "loss"})
    state = load_file(ROOT / manifest()["weights"][entry["weights"]]["file"])
    config = {k: v for k, v in manifest()["weights"][entry["weights"]]["hf_config"].items() if k.startswith("n_")}
    hf = hf_gpt2(state, **config)
    out = hf(inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
    (out * inputs["cotangent"]).sum().backward()
    plain = gpt2_state({k: p.grad for k, p in hf.named_parameters()})
    grads = {}
    for dtype in (torch.float64, torch.float32):
        model = gpt2_of_case(entry, dtype).to(device)
        loss = (model(call_of(inputs, "input_ids", "attention_mask")) * inputs["cotangent"].to(device, dtype)).sum()
        loss.backward()
        grads[dtype] = {k: p.grad.cpu() for k, p in model.named_parameters()}
    assert recorded.keys() == grads[torch.float32].keys()
    for name, truth in grads[torch.float64].items():
        # The record is float64 rounded to float32.
        assert (truth - recorded[name]).abs().max() <= torch.finfo(torch.float32).eps * truth.abs().max(), name
        assert_close(grads[torch.float32][name], plain[name], truth, name)
