"""Does T5 reproduce KerasHub's and transformers' outputs in every recorded case?"""

import copy

import pytest
import torch
from safetensors.torch import load_file
from t5_cases import ROOT, call_of, case, live, manifest, outputs_of, t5_of_case, t5_state

import pyfused
from pyfused.testing import assert_close

PLAIN = [c["id"] for c in manifest()["cases"] if c["id"].startswith("t5") and c["hf_call"]]
SPECIAL = {"t5_buckets", "t5_states_attn", "t5_past_kv", "t5_grad"}


def on(device, tensors):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in tensors.items()}


def test_every_recorded_t5_case_is_tested():
    assert set(PLAIN) | SPECIAL == {c["id"] for c in manifest()["cases"] if c["id"].startswith("t5")}
    assert len(PLAIN) == 14


@torch.no_grad()
@pytest.mark.parametrize("name", PLAIN)
def test_outputs(name, device):
    entry, inputs, outputs = case(name)
    actual = outputs_of(t5_of_case(entry).to(device), call_of(inputs))
    truth = outputs.pop("ref64")
    assert actual.keys() == truth.keys()
    assert len(outputs) >= 2  # transformers eager and sdpa, and KerasHub if it supports the configuration
    for what, value in actual.items():
        rows = live(inputs, what)
        assert rows.any()
        plains = [references[what][rows] for references in outputs.values()]
        assert_close(value.cpu()[rows], plains, truth[what][rows], f"{name} {what}")


@torch.no_grad()
def test_each_backend(each_backend, device):
    for name in ("t5_gated_gelu_new_pads", "t5_relu_dec_longer"):
        entry, inputs, outputs = case(name)
        actual = outputs_of(t5_of_case(entry).to(device), on(device, call_of(inputs)))
        truths = outputs.pop("ref64")
        for what, truth in truths.items():
            rows = live(inputs, what)
            plains = [references[what][rows] for references in outputs.values()]
            assert_close(actual[what].cpu()[rows], plains, truth[rows], f"{name} {what}")


def test_buckets(device):
    _, inputs, outputs = case("t5_buckets")
    positions = inputs["relative_position"]
    assert torch.equal(positions, torch.arange(-300, 301))
    for name, expected in outputs["hf_eager"].items():
        _, bidirectional, buckets, distance = name.split(".")
        numbers = torch.arange(float(buckets), device=device)[:, None]
        options = {"bidirectional": bool(int(bidirectional)), "max_distance": int(distance)}
        actual = pyfused.relative_bias(numbers, 1, 601, query_offset=300, **options)
        assert torch.equal(actual[0, 0, 0].cpu(), expected.float()), name


def test_hidden_states_and_attentions(device):
    entry, inputs, outputs = case("t5_states_attn")
    model = t5_of_case(entry).to(device)
    with torch.no_grad():
        out = model(call_of(inputs), return_hidden_states=True, return_attentions=True)
        actual = {"logits": model.logits(out["decoder_sequence_output"])}
        names = ("encoder_hidden_states", "decoder_hidden_states", "encoder_attentions", "decoder_attentions")
        for name in (*names, "cross_attentions"):
            actual |= {f"{name}.{i}": v for i, v in enumerate(out[name])}
        assert actual.keys() == outputs["ref64"].keys()
        for key, value in actual.items():
            assert_close(value, [outputs["hf_eager"][key]], outputs["ref64"][key], key)
        bare = model(call_of(inputs))
    assert list(bare) == ["encoder_sequence_output", "decoder_sequence_output"]
    assert torch.equal(out["decoder_sequence_output"], bare["decoder_sequence_output"])


def test_past_keys_and_values(device):
    entry, inputs, outputs = case("t5_past_kv")
    model = t5_of_case(entry).to(device)
    cache = model.new_cache(2, 7)
    call, actual, end = call_of(inputs), {}, 0
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


def test_gradients(device):
    from transformers import T5Config, T5Model

    entry, inputs, outputs = case("t5_grad")
    loss = outputs["ref64"].pop("loss")
    recorded = t5_state({k.removeprefix("grad."): v for k, v in outputs["ref64"].items()})
    weights = manifest()["weights"][entry["weights"]]
    state = load_file(ROOT / weights["file"])
    copies = {f"{stack}.embed_tokens.weight": state["shared.weight"] for stack in ("encoder", "decoder")}
    names, plains = ("input_ids", "attention_mask", "decoder_input_ids"), []
    for attention in ("sdpa", "eager"):
        config = T5Config(**copy.deepcopy(weights["hf_config"]))
        hf = T5Model._from_config(config, attn_implementation=attention).eval()
        hf.load_state_dict({k: v for k, v in (state | copies).items() if k != "lm_head.weight"})
        out = hf(**{k: inputs[k] for k in names}).last_hidden_state
        (out * inputs["cotangent"]).sum().backward()
        plains.append(t5_state({k: p.grad for k, p in hf.named_parameters()}))
    grads = {}
    for dtype in (torch.float64, torch.float32):
        model = t5_of_case(entry, dtype).to(device)
        out = model(call_of(inputs))["decoder_sequence_output"]
        value = (out * inputs["cotangent"].to(device, dtype)).sum()
        value.backward()
        grads[dtype] = {k: p.grad.cpu() for k, p in model.named_parameters() if p.grad is not None}
    assert abs(value.item() - loss.item()) < 1e-4 * abs(loss.item())
    assert recorded.keys() == grads[torch.float32].keys()
    truths = grads[torch.float64]
    for name, truth in truths.items():
        # The record is float64 rounded to float32.
        assert (truth - recorded[name]).abs().max() <= torch.finfo(torch.float32).eps * truth.abs().max(), name

    def together(found):
        """All gradients, each divided by its own size. The errors within one share causes, so each counts as one draw."""
        return torch.cat(
            [(found[name].detach() / truth.square().mean().sqrt()).flatten() for name, truth in truths.items()]
        )

    assert_close(together(grads[torch.float32]).float(), map(together, plains), together(truths), "gradients")
