"""Do the four backbones reproduce KerasHub's and transformers' outputs and gradients in every recorded case?"""

import pytest
import torch
from backbone_cases import RENAMED_OUTPUTS, backbone_of, call_of, hf_model, live, outputs_of, renamed, weights_of
from golden_cases import case, manifest

import pyfused
from pyfused.testing import assert_close

# The cases that a test of their own reads
STATES = ["gpt2_a_states_attn", "albert_states_attn", "t5_states_attn", "fnet_b_states"]
GRADIENTS = ["gpt2_a_grad", "albert_grad", "t5_grad", "fnet_b_grad"]
ALONE = {*STATES, *GRADIENTS, "gpt2_a_mask4d", "gpt2_cross_t7", "gpt2_a_past_kv", "gpt2_a_keras_cache", "t5_buckets",
         "t5_past_kv", "fnet_mixing_op"}  # fmt: skip
PLAIN = [c["id"] for c in manifest()["cases"] if c["id"] not in ALONE]
FNET = [name for name in PLAIN if name.startswith("fnet")]


def on(device, tensors):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in tensors.items()}


def truth_of(outputs):
    """The float64 outputs, with zeros in rows that see no key."""
    return outputs.get("ref64_zero", outputs.get("ref64"))


def call_of_case(name, inputs):
    return call_of(name.split("_")[0], inputs) | ({"packed": True} if "packed" in name else {})


@torch.no_grad()
def check(name, device):
    """Compares with every library whose outputs are near the truth. In rows that see no key some give means, not zeros."""
    entry, inputs, outputs = case(name)
    actual = outputs_of(backbone_of(entry).to(device), on(device, call_of_case(name, inputs)))
    truths = truth_of(outputs)
    assert actual.keys() == truths.keys()
    for what, truth in truths.items():
        rows = live(inputs, what) if name.startswith("t5") else ...
        sources = [found[what][rows] for source, found in outputs.items() if not source.startswith("ref64")]
        plains = [found for found in sources if (found - truth[rows]).abs().max() < 1e-3]
        assert plains
        assert_close(actual[what].cpu()[rows], plains, truth[rows], f"{name} {what}")


def test_every_recorded_case_is_tested():
    assert {c["id"] for c in manifest()["cases"]} >= ALONE
    assert len(PLAIN) == 60


@pytest.mark.parametrize("name", PLAIN)
def test_outputs(name, device):
    check(name, device)


@pytest.mark.parametrize(
    "name",
    ["gpt2_a_left_t13", "gpt2_a_packed_posids", "albert_g2i2_left_t13", "albert_g1_fullrow_t13", "t5_gated_gelu_new_pads",
     "t5_relu_dec_longer", *FNET],
)  # fmt: skip
def test_each_backend(name, each_backend, device):
    check(name, device)


@torch.no_grad()
@pytest.mark.parametrize("name", PLAIN)
def test_float64_is_the_truth(name, device):
    """So near to it that such outputs serve as the truth elsewhere."""
    entry, inputs, outputs = case(name)
    for what, value in outputs_of(backbone_of(entry, torch.float64).to(device), call_of_case(name, inputs)).items():
        rows, truth = live(inputs, what) if name.startswith("t5") else ..., truth_of(outputs)[what]
        assert (value.cpu()[rows] - truth[rows]).abs().max() <= 1e-12 * truth.abs().max(), what


@torch.no_grad()
@pytest.mark.parametrize("name", STATES)
def test_hidden_states_and_attentions(name, device):
    entry, inputs, outputs = case(name)
    model, call = backbone_of(entry).to(device), call_of_case(name, inputs)
    flags = {"return_hidden_states": True} | ({} if name.startswith("fnet") else {"return_attentions": True})
    out, bare = model(call, **flags), outputs_of(model, call)
    actual = {"logits": bare["logits"]} if "logits" in bare else {}
    for field, value in (out if isinstance(out, dict) else vars(out)).items():
        if isinstance(value, tuple):
            actual |= {f"{field}.{i}": state for i, state in enumerate(value)}
        elif value is not None:
            actual[RENAMED_OUTPUTS.get(field, field)] = value
    truths = outputs["ref64"]
    assert {key for key in actual if "." in key} == {key for key in truths if "." in key}
    for key, truth in truths.items():
        assert_close(actual[key], [outputs["hf_eager"][key]], truth, key)
    for key, value in bare.items():
        assert torch.equal(actual[key], value), key


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients(name, device):
    entry, inputs, outputs = case(name)
    (config, state), family = weights_of(entry), name.split("_")[0]
    loss, cotangent = outputs["ref64"].pop("loss"), inputs.pop("cotangent")
    recorded = renamed(config, {k.removeprefix("grad."): v for k, v in outputs["ref64"].items()})
    plains = []
    for attention in ("sdpa", "eager") if family != "fnet" else ("eager",):
        hf = hf_model(family, kind="T5Model" if family == "t5" else None, attention=attention, **config)
        missing = hf.load_state_dict(state, strict=False).missing_keys
        assert all("embed_tokens" in key for key in missing)  # T5's copies of `shared`
        (hf(**inputs).last_hidden_state * cotangent).sum().backward()
        plains.append(renamed(config, {k: p.grad for k, p in hf.named_parameters() if p.grad is not None}))
    grads = {}
    for dtype in (torch.float64, torch.float32):
        model = backbone_of(entry, dtype).to(device)
        states = outputs_of(model, call_of(family, inputs))["last_hidden_state"]
        value = (states * cotangent.to(device, dtype)).sum()
        value.backward()
        grads[dtype] = {k: p.grad.cpu() for k, p in model.named_parameters() if p.grad is not None}
    assert abs(value.item() - loss.item()) < 1e-4 * abs(loss.item())
    truths = grads[torch.float64]
    assert truths.keys() == grads[torch.float32].keys()
    # The loss does not depend on the pooler: zeros
    assert recorded.keys() - truths.keys() <= {"pooler.weight", "pooler.bias"}
    for key, truth in truths.items():
        # The record is float64 rounded to float32.
        assert (truth - recorded[key]).abs().max() <= torch.finfo(torch.float32).eps * truth.abs().max(), key

    def together(found):
        """All gradients, each divided by its own size. The errors within one share causes, so each counts as one draw.
        The bias of the keys is left out: it shifts all scores of a query alike, so its gradient is zero."""
        parts = []
        for key, truth in truths.items():
            scaled = found[key].detach() / truth.square().mean().sqrt()
            query, _, value = scaled.chunk(3) if key.endswith("query_key_value.bias") else (scaled, None, scaled[:0])
            parts += [query.flatten(), value.flatten()]
        return torch.cat(parts)

    assert_close(together(grads[torch.float32]).float(), [together(p) for p in plains], together(truths), "gradients")


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


@torch.no_grad()
def test_the_mixing_alone(each_backend, device):
    _, inputs, outputs = case("fnet_mixing_op")
    (x,) = inputs.values()
    actual = pyfused.nn.FourierMixing()(x.float().to(device))
    assert_close(actual, [outputs["hf_eager"]["real_fft2"]], outputs["ref64"]["real_fft2"], "mixing")
