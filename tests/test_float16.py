"""Is float16 right if a model's values exceed 65,504? T5 with Flan-T5's residual stream, FNet with large sums."""

import copy

import pytest
import torch
from float16_cases import STREAM, flan_like, fnet_with_large_sums, inputs_of, off

import pyfused
from pyfused import Backbone, Generator, backend, testing
from pyfused.generation.t5 import T5Decoding

# Four times the largest error from rounding the result itself. A fault here changes much more than that. Other tests judge
# the kernels' exactness beside the reference operators.
BOUND = 4 * 2.0**-11
KINDS = {"gated, untied": (True, False), "gated, tied": (True, True), "plain, tied": (False, True)}


@pytest.fixture(scope="module", params=KINDS)
def pair(request):
    """The same weights in float32 and in float16."""
    wide = flan_like(*KINDS[request.param])
    return wide, copy.deepcopy(wide).half()


def outputs(model, **more):
    found = model(**inputs_of(), **more)
    return {**found, "logits": model.logits(found["decoder_sequence_output"])}


def judge_beside_reference(half, found, run):
    """Applies the tolerance rule: plain is the reference operators in float16, the truth the same in float64."""
    with backend("reference"):
        plain, truth = run(half), run(copy.deepcopy(half).double())
    for name in truth:
        testing.assert_close(found[name], plain[name], truth[name], name)


def assert_close(found, expected):
    for name in ("encoder_sequence_output", "decoder_sequence_output", "logits"):
        assert found[name].dtype == torch.float16
        assert off(found[name], expected[name]) < BOUND, name


@torch.no_grad()
@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_t5_equals_its_float32_self(pair, name):
    wide, half = pair
    expected = outputs(wide, return_hidden_states=True)
    with backend(name):
        found = outputs(half, return_hidden_states=True)
    assert_close(found, expected)
    judge_beside_reference(half, found, outputs)
    for side in ("encoder", "decoder"):
        states = f"{side}_hidden_states"
        assert max(x.max() for x in expected[states]) > STREAM * 0.99
        for mine, other in zip(found[states], expected[states], strict=True):
            assert off(mine, other) < BOUND


@torch.no_grad()
@pytest.mark.parametrize("pair", ["gated, untied"], indirect=True)
def test_t5_compiled(pair):
    """The program calls the same operators for every kind of T5."""
    wide, half = pair
    torch._dynamo.reset()
    compiled = torch.compile(half, backend="aot_eager", fullgraph=True)
    assert_close({**compiled(**inputs_of()), "logits": outputs(half)["logits"]}, outputs(wide))


@torch.no_grad()
def test_t5_packed_and_from_embeddings(pair):
    wide, half = pair
    expected, call = outputs(wide), inputs_of()
    real = call["encoder_padding_mask"]
    packed = copy.copy(half)
    packed.skip_padding = True
    assert off(packed(call)["decoder_sequence_output"], expected["decoder_sequence_output"]) < BOUND
    texts = [ids[mask].tolist() for ids, mask in zip(call["encoder_token_ids"], real)]
    for mine, other in zip(pyfused.encode(half, texts), pyfused.encode(wide, texts), strict=True):
        assert off(mine, other) < BOUND
    embeds = half.token_embedding(call.pop("encoder_token_ids"))
    assert off(half(encoder_inputs_embeds=embeds, **call)["encoder_sequence_output"],
               expected["encoder_sequence_output"]) < BOUND  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("planned", [True, False])
def test_t5_steps_through_the_cache(pair, planned):
    """Compares the logits of each step, both through the operator decode and through the modules."""
    wide, half = pair
    prompts = [ids.numpy() for ids in inputs_of()["encoder_token_ids"]]
    prompts[1] = prompts[1][:9]
    shape = T5Decoding.shape(prompts, 6)
    expected, found = T5Decoding(wide, shape), T5Decoding(half, shape)
    assert found._decoder is not None
    found._decoder = found._decoder if planned else None
    a, b = expected.start(prompts), found.start(prompts)
    for _ in range(5):
        assert b.dtype == torch.float16
        assert off(b, a) < BOUND
        tokens = a.argmax(-1)
        a, b = expected.step(tokens), found.step(tokens)


@torch.no_grad()
def test_t5_answers_as_likely_as_float32(pair):
    wide, half = pair
    prompts = inputs_of()["encoder_token_ids"].tolist()

    def likelihood(prompt, answer):
        start = wide.get_config()["decoder_start_token_id"]
        out = wide(
            encoder_token_ids=torch.tensor([prompt]), encoder_padding_mask=None,
            decoder_token_ids=torch.tensor([[start, *answer[:-1]]]), decoder_padding_mask=None,
        )  # fmt: skip
        scores = wide.logits(out["decoder_sequence_output"])[0].log_softmax(-1)
        return scores.gather(1, torch.tensor(answer)[:, None]).sum().item()

    for beams in (1, 3):
        mine, other = (Generator(m).generate(prompts, 8, num_beams=beams) for m in (half, wide))
        for prompt, a, b in zip(prompts, mine, other, strict=True):
            assert likelihood(prompt, a) == pytest.approx(likelihood(prompt, b), abs=0.05)


def test_t5_trains(pair):
    """Gradients behind a norm that divides by 14,000 are too small for float16; the others match float32's."""
    wide, half = copy.deepcopy(pair[0]), copy.deepcopy(pair[1])
    for model in (wide, half):
        out = model(**inputs_of())
        logits = model.logits(out["decoder_sequence_output"]).float()
        (256.0 * torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.arange(27))).backward()
    compared = 0
    for (name, a), b in zip(half.named_parameters(), wide.parameters(), strict=True):
        assert a.grad.dtype == torch.float16
        assert a.grad.isfinite().all(), name
        if b.grad.abs().max() > 1e-3:
            assert off(a.grad, b.grad) < 0.1, name
            compared += 1
    assert compared > 8
    half.train()(**inputs_of())["decoder_sequence_output"].float().sum().backward()  # with dropout
    assert all(p.grad.isfinite().all() for p in half.parameters())


@torch.no_grad()
def test_t5_from_a_checkpoint(pair, tmp_path):
    wide, half = pair
    expected = outputs(wide)
    wide.save_to_preset(tmp_path / "wide")
    loaded = Backbone.from_preset(tmp_path / "wide", dtype="float16")
    assert {t.dtype for t in loaded.state_dict().values()} == {torch.float16}
    assert_close(outputs(loaded), expected)
    loaded.save_to_preset(tmp_path / "half")
    assert_close(outputs(Backbone.from_preset(tmp_path / "half")), expected)
    half.load_state_dict(loaded.state_dict())
    assert_close(outputs(copy.deepcopy(wide).to(torch.float16)), expected)


@torch.no_grad()
def test_fnet_equals_its_float32_self():
    wide = fnet_with_large_sums()
    half = copy.deepcopy(wide).half()
    call = {"token_ids": torch.arange(512)[None] % 97, "segment_ids": None}
    sums = pyfused.fourier_mix(wide.embedding_norm(wide.token_embedding(call["token_ids"])) @ wide.projection.weight.T
                               + wide.projection.bias)  # fmt: skip
    assert sums.abs().max() > 65504
    found, expected = half(call), wide(call)
    for name in expected:
        assert off(found[name], expected[name]) < 2 * BOUND, name
    judge_beside_reference(half, found, lambda model: model(call))
