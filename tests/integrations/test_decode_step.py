"""Do a fused model's steps of one token run on `decode`, with the same results and caches, and only where they may?"""

import copy

import pytest
import shim
import torch
import transformers as hf
from decode_step_cases import MAKE, pair, parts, prompt, tensors
from hf_cases import GPT2, livened, padding, tokens
from transformers.cache_utils import StaticCache

import pyfused
from pyfused import extensions
from pyfused.testing import running
from pyfused.testing.tolerance import assert_close

NEW = 9
STEPS = NEW - 1  # the prompt gives the first token

GENERATIONS = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 10},
    "beams": {"num_beams": 3},
    "beams, several results": {"num_beams": 4, "num_return_sequences": 2},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "static cache": {"cache_implementation": "static"},
    "left padding": {"side": "left"},
    "left padding, static cache": {"side": "left", "cache_implementation": "static"},
    "left padding, beams": {"side": "left", "num_beams": 2},
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(3)


def generate(model, ids, side=None, seed=1, **options):
    torch.manual_seed(seed)
    mask = padding(*ids.shape, side)
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, return_dict_in_generate=True, output_logits=True,
        **{"do_sample": False, **options},
    )  # fmt: skip


@pytest.mark.parametrize("options", GENERATIONS)
@pytest.mark.parametrize("name", MAKE)
def test_generate(steps, name, options):
    plain, fused = pair(name)
    ids, options = tokens(2, 7), GENERATIONS[options]
    expected = generate(plain, ids, **options)
    assert not steps
    found = generate(fused, ids, **options)
    assert len(steps) == STEPS
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=2e-4)
    for a, b in zip(tensors(found.past_key_values), tensors(expected.past_key_values)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert a.is_contiguous() == b.is_contiguous()
        assert a.stride() == b.stride()
    lengths = [int(part.get_seq_length()) for part in parts(found.past_key_values)]
    assert lengths == [int(part.get_seq_length()) for part in parts(expected.past_key_values)]


@pytest.mark.skipif(not extensions.emulating_cuda(), reason="a machine with a GPU has no CUDA kernels for CPU tensors")
@pytest.mark.parametrize("name", MAKE)
def test_the_cuda_kernel_generates_the_same_tokens(steps, monkeypatch, name):
    """It reads Conv1D's weights as they are stored."""
    launches, launch = [], shim.load().decode_forward
    monkeypatch.setattr(shim.load(), "decode_forward", lambda *args: launches.append(args) or launch(*args))
    plain, fused = pair(name)
    ids = tokens(2, 7)
    with running("cuda", strict=False):
        found = generate(fused, ids, side="left")
    assert len(launches) == len(steps) == STEPS
    assert torch.equal(found.sequences, generate(plain, ids, side="left").sequences)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MAKE)
def test_the_tolerance_rule(steps, name, dtype):
    plain, fused = pair(name)
    exact, plain, fused = copy.deepcopy(plain).double(), plain.to(dtype), fused.to(dtype)
    ids, is_t5 = tokens(2, 9), name.startswith("t5")
    mask = padding(2, 6, "right")

    def logits(model):
        source = {"input_ids": ids[:, :6], "attention_mask": mask} if is_t5 else {}
        name = "decoder_input_ids" if is_t5 else "input_ids"

        def call(ids, cache):
            return model(**source, **{name: ids}, past_key_values=cache, use_cache=True)

        out = call(ids[:, :4], None)
        return torch.cat([call(ids[:, i : i + 1], out.past_key_values).logits for i in range(4, 9)], 1)

    with torch.no_grad():
        truth, yardstick = logits(exact), logits(plain)
        assert not steps
        found = logits(fused)
    assert len(steps) == 5
    assert_close(found, yardstick, truth, "logits")


def test_mixed_dtypes_run_the_modules(steps):
    _, fused = pair("t5")
    fused.to(torch.float16)
    for block in fused.decoder.block:
        block.layer[2].DenseReluDense.wo.float()
    generate(fused, tokens(1, 5))
    assert not steps


# ---- the cache belongs to the user --------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "t5 gated"])
def test_what_users_do_with_caches(steps, name):
    """Kept references, copies, crops, reordered rows, a continued conversation."""
    plain, fused = pair(name)
    ids = tokens(2, 12)
    caches = [prompt(m, ids[:, :5]).past_key_values for m in (plain, fused)]
    before = tensors(caches[1])
    values = [t.clone() for t in before]

    def step(at, change=lambda cache: None):
        for cache in caches:
            change(cache)
        expected, found = (prompt(m, ids[:, at : at + 1], c) for m, c in zip((plain, fused), caches))
        assert found.past_key_values is caches[1]
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=2e-4)
        for a, b in zip(tensors(caches[1]), tensors(caches[0])):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)

    step(5)
    assert all(torch.equal(a, b) for a, b in zip(before, values))
    grown = {t.data_ptr() for part in parts(caches[1])[:1] for layer in part.layers for t in (layer.keys, layer.values)}
    assert len(grown) == 4
    assert not grown & {t.data_ptr() for t in before}
    step(6, lambda cache: parts(cache)[0].crop(-2))
    step(7, lambda cache: cache.reorder_cache(torch.tensor([1, 1])))
    caches[:] = [copy.deepcopy(c) for c in caches]
    step(8)
    assert len(steps) == 4
    for m, c in zip((plain, fused), caches):
        prompt(m, ids[:, 9:11], c)  # two tokens at once
    step(11)
    assert len(steps) == 5


def test_a_conversation_goes_on(steps):
    plain, fused = pair()
    ids = tokens(1, 6)
    first = [generate(m, ids) for m in (plain, fused)]
    longer = torch.cat((first[0].sequences, tokens(1, 3)), 1)
    second = [generate(m, longer, past_key_values=f.past_key_values) for m, f in zip((plain, fused), first)]
    assert torch.equal(second[0].sequences, second[1].sequences)
    assert len(steps) == 2 * STEPS


def test_assisted_generation(steps):
    plain, fused = pair()
    draft = livened(hf.GPT2LMHeadModel(hf.GPT2Config(**{**GPT2, "n_layer": 1})))
    ids = tokens(1, 6)
    expected = generate(plain, ids, assistant_model=draft)
    pyfused.fuse_(draft)
    assert torch.equal(generate(fused, ids, assistant_model=draft).sequences, expected.sequences)
    assert steps  # the draft's, one token after the other


def test_a_static_cache_is_filled_to_its_end(steps):
    plain, fused = pair()
    ids = tokens(2, 8)
    with torch.no_grad():
        results = []
        for model in (plain, fused):
            cache = StaticCache(config=model.config, max_cache_len=8)
            prompt(model, ids[:, :5], cache)
            addresses = [t.data_ptr() for t in tensors(cache)]
            results.append([prompt(model, ids[:, i : i + 1], cache).logits for i in (5, 6, 7)])
            assert [t.data_ptr() for t in tensors(cache)] == addresses
            assert int(cache.get_seq_length()) == 8
        with pytest.raises((IndexError, RuntimeError)):
            prompt(fused, ids[:, :1], cache)
    assert len(steps) == 3
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=2e-4)
