"""Does FNet reproduce KerasHub's and transformers' outputs in every recorded case?"""

import copy

import pytest
import torch
from fnet_cases import ROOT, call_of, case, fnet_of_case, fnet_state, manifest, outputs_of
from safetensors.torch import load_file

import pyfused
from pyfused.testing import assert_close

PLAIN = [c["id"] for c in manifest()["cases"] if c["id"].startswith("fnet") and c["hf_call"]]
SPECIAL = {"fnet_b_states", "fnet_b_grad", "fnet_mixing_op"}


def on(device, tensors):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in tensors.items()}


def test_every_recorded_fnet_case_is_tested():
    assert set(PLAIN) | SPECIAL == {c["id"] for c in manifest()["cases"] if c["id"].startswith("fnet")}
    assert len(PLAIN) == 10


@torch.no_grad()
@pytest.mark.parametrize("name", PLAIN)
def test_outputs_on_each_backend(name, each_backend, device):
    entry, inputs, outputs = case(name)
    actual = outputs_of(fnet_of_case(entry).to(device), on(device, call_of(inputs)))
    truths = outputs.pop("ref64")
    assert actual.keys() == truths.keys()
    assert outputs.keys() == {"hf_eager", "keras"}
    for what, truth in truths.items():
        assert_close(actual[what], [references[what] for references in outputs.values()], truth, f"{name} {what}")


@torch.no_grad()
@pytest.mark.parametrize("name", PLAIN)
def test_the_reference_in_float64_is_the_truth(name):
    entry, inputs, outputs = case(name)
    actual = outputs_of(fnet_of_case(entry, torch.float64), call_of(inputs))
    for what, truth in outputs["ref64"].items():
        assert (actual[what] - truth).abs().max() <= 1e-12 * truth.abs().max(), what


@torch.no_grad()
def test_the_mixing_alone(each_backend, device):
    _, inputs, outputs = case("fnet_mixing_op")
    (x,) = inputs.values()
    actual = pyfused.nn.FourierMixing()(x.float().to(device))
    assert_close(actual, [outputs["hf_eager"]["real_fft2"]], outputs["ref64"]["real_fft2"], "mixing")


@torch.no_grad()
def test_hidden_states(device):
    entry, inputs, outputs = case("fnet_b_states")
    model = fnet_of_case(entry).to(device)
    out = model(call_of(inputs), return_hidden_states=True)
    actual = {f"hidden_states.{i}": value for i, value in enumerate(out["hidden_states"])}
    actual |= {"last_hidden_state": out["sequence_output"], "pooler_output": out["pooled_output"]}
    assert actual.keys() == outputs["ref64"].keys()
    for key, value in actual.items():
        assert_close(value, [outputs["hf_eager"][key]], outputs["ref64"][key], key)
    bare = model(call_of(inputs))
    assert list(bare) == ["sequence_output", "pooled_output"]
    assert torch.equal(out["sequence_output"], bare["sequence_output"])


def test_gradients(each_backend, device):
    from transformers import FNetConfig, FNetModel

    entry, inputs, outputs = case("fnet_b_grad")
    loss = outputs["ref64"].pop("loss")
    recorded = fnet_state({k.removeprefix("grad."): v for k, v in outputs["ref64"].items()})
    weights = manifest()["weights"][entry["weights"]]
    hf = FNetModel(FNetConfig(**copy.deepcopy(weights["hf_config"]))).eval()
    hf.load_state_dict(load_file(ROOT / weights["file"]))
    out = hf(**{k: v for k, v in inputs.items() if k != "cotangent"}).last_hidden_state
    (out * inputs["cotangent"]).sum().backward()
    plain = fnet_state({k: p.grad for k, p in hf.named_parameters() if p.grad is not None})
    call = on(device, call_of({k: v for k, v in inputs.items() if k != "cotangent"}))
    grads = {}
    for dtype in (torch.float64, torch.float32):
        model = fnet_of_case(entry, dtype).to(device)
        with pyfused.backend("reference" if dtype == torch.float64 else each_backend.partition(":")[0]):
            value = (model(call)["sequence_output"] * inputs["cotangent"].to(device, dtype)).sum()
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

    assert_close(together(grads[torch.float32]).float(), [together(plain)], together(truths), "gradients")
