"""Are models of transformers that call torch's scaled_dot_product_attention themselves right on pyfused?"""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from by_hand_cases import text
from family_cases import FALCON, WITH_ALIBI, picture
from fused_pairs import Trio, counted, tensors
from hf_cases import IDS, WIDTHS, livened, tokens
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import pyfused
from pyfused.integrations.transformers import sdpa_calls

SAM = {**WIDTHS, "image_size": 32, "patch_size": 8, "output_channels": 8, "window_size": 2, "global_attn_indexes": [1]}


def falcon(**more):
    return lambda: hf.FalconModel(hf.FalconConfig(**IDS, **FALCON, **more))


# Row -> (a tiny model, its inputs)
MODELS = {
    "falcon.FalconAttention": (falcon(), text),
    "falcon.FalconAttention, ALiBi": (falcon(**WITH_ALIBI), text),
    "falcon.FalconAttention, new": (falcon(new_decoder_architecture=True, num_kv_heads=2), text),
    "data2vec:data2vec_vision.Data2VecVisionSdpaSelfAttention": (
        lambda: hf.Data2VecVisionModel(
            hf.Data2VecVisionConfig(**WIDTHS, image_size=32, patch_size=8, use_relative_position_bias=True)
        ),
        picture,
    ),
    "sam.SamVisionSdpaAttention": (lambda: hf.SamVisionModel(hf.SamVisionConfig(**SAM)), picture),
}


def made(row):
    torch.manual_seed(0)
    make, inputs = MODELS[row]
    return livened(make()), inputs()


def test_every_row_is_tried():
    assert set(sdpa_calls.ROWS) == {row.partition(",")[0] for row in MODELS}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("row", MODELS)
def test_outputs(row, dtype, monkeypatch):
    model, inputs = made(row)
    trio = Trio(model, dtype=dtype)
    calls = counted(monkeypatch, sdpa_calls, "attend")
    trio.check(live=inputs.get("attention_mask"), **inputs)
    assert calls["attend"] >= 2
    kind = row.partition(",")[0].rpartition(".")[2]
    assert {entry.note for entry in trio.report.replaced if entry.kind == kind} == {"pyfused.attention"}
    assert not any("ttention" in entry.note for entry in trio.report.left)


@pytest.mark.parametrize("row", MODELS)
def test_values_and_gradients(row):
    """With padding on the left too, and of the padding's own states. Torch's fused backward is wrong for a query whose keys are
    all hidden by a finite number, so the plain model runs torch's plain one."""
    plain, inputs = made(row)
    fused, gradients = copy.deepcopy(plain), []
    pyfused.fuse_(fused)
    for model in (fused, plain):
        with sdpa_kernel(SDPBackend.MATH):
            out = sum(x.float().square().mean() for x in tensors(model(**inputs)).values() if x.requires_grad)
            out.backward()
        gradients.append({"loss": out, **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}})
    assert gradients[0].keys() == gradients[1].keys()
    for name, found in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], found, rtol=1e-3, atol=1e-4 * found.abs().max().item())


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(cache):
    torch.manual_seed(1)
    model, ids = livened(hf.FalconForCausalLM(hf.FalconConfig(**IDS, **FALCON))), tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "cache_implementation": cache}
    options = options if cache == "static" else {**options, "cache_implementation": None}
    expected = model.generate(ids, attention_mask=mask, **options)
    pyfused.fuse_(model)
    assert torch.equal(model.generate(ids, attention_mask=mask, **options), expected)


def test_attention_weights():
    """A call that wants them runs Falcon's own code."""
    model, inputs = made("falcon.FalconAttention, ALiBi")
    expected = model(**inputs, output_attentions=True).attentions
    pyfused.fuse_(model)
    for ours, theirs in zip(model(**inputs, output_attentions=True).attentions, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_eager_code_is_named():
    config = hf.FalconConfig(**IDS, **FALCON)
    config._attn_implementation = "eager"
    left = {entry.kind: entry.note for entry in pyfused.fuse_(hf.FalconModel(config)).left}
    assert (
        left["FalconAttention"] == 'its attention for "eager" is code that fuse_ does not know; set "sdpa", then fuse'
    )


def test_copies_unfuse_and_compile(monkeypatch):
    model, inputs = made("falcon.FalconAttention")
    plain = model(**inputs)[0]
    pyfused.fuse_(model)
    expected = model(**inputs)[0]
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(**inputs)[0], expected)
    sdpa_calls._known.clear()  # as in a new process
    clone = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    calls = counted(monkeypatch, sdpa_calls, "attend")
    assert torch.equal(clone(**inputs)[0], expected)
    assert calls["attend"] == 2
    pyfused.unfuse_(model)
    assert torch.equal(model(**inputs)[0], plain)


@pytest.mark.parametrize(
    "case", ["causal", "causal, more keys", "causal, fewer keys", "one head", "mask of keys", "packed"]
)
def test_it_is_torchs_function(case):
    """Causality from the first key, however many keys there are."""
    keys = {"causal, more keys": 7, "causal, fewer keys": 3}.get(case, 5)
    q, k, v = torch.randn(2, 4, 5, 8), *torch.randn(2, 2, 1 if case == "one head" else 4, keys, 8)
    options = {"scale": 0.3, "is_causal": case.startswith("causal")}
    if case == "mask of keys":
        options["attn_mask"] = torch.tensor([1, 1, 0, 1, 0]).bool().view(1, 1, 5).expand(2, 1, 1, 5)
    if case == "packed":
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    ours = sdpa_calls.attended(nn.Module(), q, k, v, **options)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v, **options))
