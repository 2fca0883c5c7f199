"""Do all ways to compute a transformers model's attention agree on real tokens, wherever padding is, and give no NaN?"""

import copy

import pytest
import torch
from hf_cases import build, tokens, with_implementation

import pyfused

LENGTH = 8
MASKS = {
    "left": [[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8, [0, 1, 1, 1, 1, 1, 1, 1]],
    "right": [[1, 1, 1, 1, 1, 0, 0, 0], [1] * 8, [1, 1, 1, 1, 1, 1, 1, 0]],
    "middle": [[1, 1, 0, 0, 1, 1, 1, 1], [1] * 8, [0, 1, 0, 1, 1, 0, 1, 0]],
    "a row of padding": [[0, 0, 1, 1, 1, 1, 1, 1], [0] * 8, [1, 1, 1, 1, 1, 1, 0, 0]],
}
WIDE = {"n_embd": 264, "n_head": 1}  # heads above 256, the kernels' limit
CASES = {
    **{
        f"upcast, scaled {scaled}, by layer {by_layer}": (
            "gpt2",
            {"reorder_and_upcast_attn": True, "scale_attn_weights": scaled, "scale_attn_by_inverse_layer_idx": by_layer},
            {},
        )
        for scaled in (True, False)
        for by_layer in (True, False)
    },
    "scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, {}),
    "wide heads": ("gpt2", WIDE, {}),
    "no probability is left": ("gpt2", {"attn_pdrop": 1.0}, {}),
    **{f"attentions of {name}": (name, {}, {"output_attentions": True}) for name in ("gpt2", "bert", "albert", "t5")},
    **{name: (name, {}, {}) for name in ("gpt2", "albert", "t5", "llama", "mistral, window 4")},
}  # fmt: skip


def given(name, mask, options):
    torch.manual_seed(2)
    inputs = {"input_ids": tokens(len(mask), LENGTH), "attention_mask": mask, **options}
    if name == "t5":
        inputs |= {"decoder_input_ids": tokens(len(mask), LENGTH), "decoder_attention_mask": mask}
    return inputs


def call(model, inputs, live):
    """The output, every tensor of probabilities, and the gradients of a loss over the real tokens."""
    model.zero_grad()
    output = model(**inputs, use_cache=False) if "decoder_input_ids" in inputs else model(**inputs)
    (output[0][live] * torch.linspace(-1.0, 1.0, output[0].shape[-1])).sum().backward()
    found = {"output": output[0], **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}
    for name in ("attentions", "decoder_attentions"):
        for i, weights in enumerate(output.get(name) or ()):
            found[f"{name}.{i}"] = weights.transpose(1, 2)
    return found


def ways(name, options):
    """The ways to run the model on pyfused."""
    for had in ("eager", "sdpa"):
        model = build(name, attn_implementation=had, **options)
        yield f"fused from {had}", model, lambda m: pyfused.fuse_(m)
    yield "by its name", build(name, **options), lambda m: with_implementation(m, "pyfused")


def in_double(model):
    """transformers' own code with all of it in float64, the scores too."""
    name = "sdpa" if model.config.model_type in ("llama", "mistral") else "eager"
    truth = with_implementation(copy.deepcopy(model).double(), name)
    for module in truth.modules():
        if getattr(module, "reorder_and_upcast_attn", False):
            module.reorder_and_upcast_attn = False
    return truth


@pytest.mark.parametrize("side", MASKS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore::pyfused.notices.FallbackWarning")
def test_real_tokens(case, side):
    name, options, arguments = CASES[case]
    mask = torch.tensor(MASKS[side])
    live = mask.bool()
    for way, model, enter in ways(name, options):
        model.train("attn_pdrop" in options)
        inputs = given(name, mask, arguments)
        truth = call(in_double(model), inputs, live)
        enter(model)
        found = call(model, inputs, live)
        assert found.keys() == truth.keys(), way
        for what, tensor in found.items():
            assert tensor.isfinite().all(), (way, what)
            rows = live if tensor.shape[:2] == live.shape else ...
            error, size = (tensor - truth[what])[rows].norm().item(), truth[what][rows].norm().item()
            assert error <= 1e-4 * size + 1e-5, (way, what, error, size)
