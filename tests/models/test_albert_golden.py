"""Does ALBERT reproduce KerasHub's and transformers' outputs in every recorded case?"""

import copy

import pytest
import torch
from albert_cases import ROOT, albert_of_case, albert_state, call_of, case, manifest, outputs_of
from safetensors.torch import load_file

from pyfused import AlbertBackbone
from pyfused.testing import assert_close

PLAIN = [c["id"] for c in manifest()["cases"] if c["id"].startswith("albert") and c["hf_call"]]
SPECIAL = {"albert_inputs_embeds_pos", "albert_states_attn", "albert_grad"}


def on(device, tensors):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in tensors.items()}


def test_every_recorded_albert_case_is_tested():
    assert set(PLAIN) | SPECIAL == {c["id"] for c in manifest()["cases"] if c["id"].startswith("albert")}
    assert len(PLAIN) == 20


def compare(name, inputs, outputs, actual):
    """If rows that see no key are zeros, compares only with the truth and the sources that give zeros too; else with all."""
    truth = outputs.pop("ref64")
    if "ref64_zero" in outputs:
        truth = outputs.pop("ref64_zero")
        outputs = {source: outputs[source] for source in ("hf_sdpa", "keras_drop1")}
    assert actual.keys() == truth.keys()
    assert len(outputs) >= 2  # transformers eager and sdpa, and KerasHub if it supports the configuration
    for what, value in actual.items():
        assert_close(value, [source[what] for source in outputs.values()], truth[what], f"{name} {what}")


@torch.no_grad()
@pytest.mark.parametrize("name", PLAIN)
def test_outputs(name, device):
    entry, inputs, outputs = case(name)
    compare(name, inputs, outputs, outputs_of(albert_of_case(entry).to(device), call_of(inputs)))


@torch.no_grad()
def test_each_backend(each_backend, device):
    for name in ("albert_g2i2_left_t13", "albert_g1_fullrow_t13"):
        entry, inputs, outputs = case(name)
        compare(name, inputs, outputs, outputs_of(albert_of_case(entry).to(device), on(device, call_of(inputs))))


@torch.no_grad()
def test_float64_is_the_truth(device):
    for name in PLAIN:
        entry, inputs, outputs = case(name)
        truth = outputs.get("ref64_zero", outputs["ref64"])
        for what, value in outputs_of(albert_of_case(entry, torch.float64).to(device), call_of(inputs)).items():
            # negligible beside float32's rounding, so such outputs serve as the truth
            error = (value.cpu() - truth[what]).abs().max()
            assert error <= 1e-6 * torch.finfo(torch.float32).eps * truth[what].abs().max(), (name, what)


@torch.no_grad()
def test_embeddings_and_positions_as_inputs(device):
    entry, inputs, outputs = case("albert_inputs_embeds_pos")
    inputs["position_ids"] = inputs["position_ids"].expand(inputs["inputs_embeds"].shape[:2])
    compare(entry["id"], inputs, outputs, outputs_of(albert_of_case(entry).to(device), call_of(inputs)))


@torch.no_grad()
def test_hidden_states_and_attentions(device):
    entry, inputs, outputs = case("albert_states_attn")
    model = albert_of_case(entry).to(device)
    out = model(call_of(inputs), return_hidden_states=True, return_attentions=True)
    actual = {"last_hidden_state": out["sequence_output"]}
    for name in ("hidden_states", "attentions"):
        actual |= {f"{name}.{i}": v for i, v in enumerate(out[name])}
    assert actual.keys() == outputs["ref64"].keys()
    for key, value in actual.items():
        assert_close(value, [outputs["hf_eager"][key]], outputs["ref64"][key], key)
    bare = model(call_of(inputs))
    assert list(bare) == ["sequence_output", "pooled_output"]
    assert torch.equal(out["sequence_output"], bare["sequence_output"])


def test_gradients(device):
    from transformers import AlbertConfig, AlbertModel

    entry, inputs, outputs = case("albert_grad")
    loss = outputs["ref64"].pop("loss")
    recorded = albert_state({k.removeprefix("grad."): v for k, v in outputs["ref64"].items()})
    weights = manifest()["weights"][entry["weights"]]
    state, plains = load_file(ROOT / weights["file"]), []
    names = [name for name in inputs if name != "cotangent"]
    for attention in ("sdpa", "eager"):
        config = AlbertConfig(**copy.deepcopy(weights["hf_config"]))
        hf = AlbertModel._from_config(config, attn_implementation=attention).eval()
        hf.load_state_dict(state)
        (hf(**{k: inputs[k] for k in names}).last_hidden_state * inputs["cotangent"]).sum().backward()
        plains.append(albert_state({k: p.grad for k, p in hf.named_parameters() if p.grad is not None}))
    grads = {}
    for dtype in (torch.float64, torch.float32):
        model = albert_of_case(entry, dtype).to(device)
        value = (model(call_of(inputs))["sequence_output"] * inputs["cotangent"].to(device, dtype)).sum()
        value.backward()
        grads[dtype] = {k: p.grad.cpu() for k, p in model.named_parameters() if p.grad is not None}
    assert abs(value.item() - loss.item()) < 1e-4 * abs(loss.item())
    truths = grads[torch.float64]
    assert truths.keys() == grads[torch.float32].keys()
    assert recorded.keys() - truths.keys() == {"pooler.weight", "pooler.bias"}  # the loss does not depend on them: zeros
    for name, truth in truths.items():
        # The record is float64 rounded to float32.
        assert (truth - recorded[name]).abs().max() <= torch.finfo(torch.float32).eps * truth.abs().max(), name

    def together(found):
        """All gradients, each divided by its own size. The errors within one share causes, so each counts as one draw. The
        keys' bias is left out: it shifts all scores of a query alike, so its gradient is zero."""
        units = {name: truth.square().mean().sqrt() for name, truth in truths.items()}
        return torch.cat([(live_rows(name, found[name].detach()) / units[name]).flatten() for name in truths])

    def live_rows(name, grad):
        if not name.endswith("query_key_value.bias"):
            return grad
        query, _, value = grad.chunk(3)
        return torch.cat([query, value])

    assert_close(together(grads[torch.float32]).float(), map(together, plains), together(truths), "gradients")


def test_it_is_exported():
    import pyfused

    assert pyfused.AlbertBackbone is AlbertBackbone
