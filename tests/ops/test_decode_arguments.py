"""Does decode read tensors that lie anywhere in memory, and refuse what kernels could only read wrongly?"""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from test_decode import by_modules, filled_cache, gpt2, sharpened, t5, without_head

import pyfused
from pyfused import Generator, plan_of
from pyfused.decode_plan import Matrix
from pyfused.nn import LayerNorm

TOKENS = torch.tensor([3, 99, 7])


def strided(tensor):
    """The same values with other strides."""
    return torch.stack((tensor, tensor), -1).flatten(-2)[..., ::2]


def transposed(tensor):
    return tensor.t().contiguous().t()


@pytest.fixture(params=["gpt2", "t5"])
def model(request):
    return sharpened(gpt2() if request.param == "gpt2" else t5())


def cache_of(model, length=5):
    return filled_cache(model, 3, length, torch.float32, 0 if isinstance(model, pyfused.GPT2Backbone) else 3)


def step(model, cache, **options):
    return pyfused.decode(plan_of(model), TOKENS, copy.deepcopy(cache), **options)


@pytest.mark.parametrize("change", [strided, transposed])
def test_masks_and_ids_with_other_strides(model, change):
    cache, mask = cache_of(model), torch.rand(3, 6) > 0.4
    mask[:, -1] = True
    expected = step(model, cache, padding_mask=mask)
    assert torch.equal(step(model, cache, padding_mask=change(mask)), expected)
    assert torch.equal(step(model, cache, padding_mask=change(mask.float())), expected)
    if isinstance(model, pyfused.GPT2Backbone):
        ids = torch.tensor([3, 3, 3])
        expected = step(model, cache, position_ids=ids)
        assert torch.equal(step(model, cache, position_ids=torch.tensor([3]).expand(3)), expected)
        assert torch.equal(step(model, cache, position_ids=strided(ids)), expected)


def test_positions_with_other_strides(model):
    cache, places = cache_of(model), torch.tensor([5, 0, 3])
    cache.at_positions(places, 6)
    expected = step(model, cache)
    cache.at_positions(strided(places), 6)
    assert torch.equal(step(model, cache), expected)


def test_an_encoder_mask_of_any_kind():
    model = sharpened(t5())
    cache, mask = cache_of(model), torch.rand(3, 9) > 0.4
    cache.encoder_mask = mask
    expected = step(model, cache)
    for other in (strided(mask), transposed(mask), mask.long(), mask.float()):
        cache.encoder_mask = other
        assert torch.equal(step(model, cache), expected)


@pytest.mark.parametrize("change", [strided, transposed])
def test_tables_with_other_strides(model, change):
    """By another backend or the model's modules, but right."""
    cache = cache_of(model)
    expected = by_modules(model, TOKENS, copy.deepcopy(cache))
    for table in (model.token_embedding, getattr(model, "position_embedding", model.token_embedding)):
        table.weight.data = change(table.weight.data)
        torch.testing.assert_close(step(model, cache), expected)


def test_vectors_with_other_strides_run_through_the_modules(model):
    prompts = [[1, 2, 3], [4]]
    expected = Generator(model).generate(prompts, 5)
    norm = (model if isinstance(model, pyfused.GPT2Backbone) else model.decoder).final_norm
    norm.weight.data = strided(norm.weight.data)
    assert plan_of(model) is None
    assert Generator(model).generate(prompts, 5) == expected


def test_layers_that_are_not_alike_run_through_the_modules():
    model = sharpened(gpt2(num_layers=3))
    model.layers[2].feed_forward.activation = "relu"
    assert plan_of(model) is None
    model = sharpened(gpt2(num_layers=3))
    model.layers = torch.nn.ModuleList(list(model.layers)[::-1])
    assert plan_of(model) is None
    model = sharpened(gpt2(num_layers=2))
    model.layers[1].to(torch.bfloat16)
    assert plan_of(model) is None
    model = sharpened(gpt2(num_layers=2))
    model.logits = lambda hidden: hidden
    assert plan_of(model) is None


def test_a_copy_of_a_plan_has_its_own_memory(model):
    plan, cache = plan_of(model), cache_of(model)
    expected = pyfused.decode(plan, TOKENS, copy.deepcopy(cache))
    copies = copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    del plan, model
    for other in copies:
        assert torch.equal(pyfused.decode(other, TOKENS, copy.deepcopy(cache)), expected)


DRAWS = torch.tensor([0.25, 0.5], dtype=torch.float64)


def bad(**change):
    model = gpt2(num_layers=1)
    given = {"plan": plan_of(model), "tokens": torch.tensor([1, 2]), "cache": model.new_cache(2, 4)}
    return given | {key: value(given) if callable(value) else value for key, value in change.items()}


def full(given):
    given["cache"].length = 4
    return given["cache"]


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"plan": 3}, TypeError, "plan is an int"),
        ({"tokens": [1, 2]}, TypeError, "tokens is a list"),
        ({"tokens": torch.tensor([1.0, 2.0])}, TypeError, "tokens is float32; it takes int64"),
        ({"tokens": torch.tensor([1])}, ValueError, r"tokens has shape \(1,\); it takes \(B,\) = \(2,\)"),
        ({"tokens": torch.tensor([1, 131])}, IndexError, "tokens holds 131; it takes 0 to 130"),
        ({"tokens": torch.tensor([-1, 1])}, IndexError, "tokens holds -1"),
        ({"cache": None}, TypeError, "cache is a NoneType"),
        ({"cache": full}, ValueError, "cache holds 4 tokens and has no room"),
        ({"cache": lambda _: gpt2(num_heads=1, num_layers=1).new_cache(2, 4)}, ValueError, "cache is for"),
        (
            {"padding_mask": torch.ones(2, 2)},
            ValueError,
            r"padding_mask has shape \(2, 2\); it takes \(B, Sk\) = \(2, 1\)",
        ),
        ({"padding_mask": [1]}, TypeError, "padding_mask is a list"),
        ({"position_ids": torch.tensor([0, 50])}, IndexError, "position_ids holds 50; it takes 0 to 49"),
        ({"choose": 1}, TypeError, "choose is 1"),
        ({"temperature": 0.7}, ValueError, "temperature, top_k or top_p is given without uniform"),
        ({"uniform": [0.5]}, TypeError, "uniform is a list"),
        ({"uniform": DRAWS}, ValueError, "uniform is given and choose is False"),
        ({"choose": True, "uniform": DRAWS.float()}, ValueError, r"uniform is float32 \(2,\) on cpu; it takes float64"),
        ({"choose": True, "uniform": DRAWS + 0.5}, ValueError, r"uniform holds a number outside of \[0, 1\)"),
        ({"choose": True, "uniform": DRAWS, "temperature": 0}, ValueError, "temperature is 0; it takes"),
        ({"choose": True, "uniform": DRAWS, "temperature": None}, TypeError, "temperature is None; it takes a number$"),
        ({"choose": True, "uniform": DRAWS, "top_k": 0}, ValueError, "top_k is 0"),
        ({"choose": True, "uniform": DRAWS, "top_k": 2.5}, TypeError, "top_k is 2.5; it takes an int or None"),
        ({"choose": True, "uniform": DRAWS, "top_p": 1.5}, ValueError, "top_p is 1.5"),
        (
            {"choose": True, "plan": lambda given: without_head(given["plan"])},
            ValueError,
            "choose is True; a plan without",
        ),
    ],
)
def test_bad_input_is_refused_by_name(change, error, message):
    with pytest.raises(error, match=message):
        pyfused.decode(**bad(**change))


def test_any_top_k_fits_into_the_operator():
    """The operator that is registered takes 64 bits."""
    from torch.utils.flop_counter import FlopCounterMode

    model = gpt2()
    plan, cache, draws = plan_of(model), cache_of(model), torch.rand(3, dtype=torch.float64)
    expected = step(model, cache, choose=True, uniform=draws)
    with FlopCounterMode(display=False):
        found = pyfused.decode(plan, TOKENS, cache, choose=True, uniform=draws, top_k=2**64 + 1)
    assert torch.equal(found, expected)


def test_matrices_that_do_not_fit_together_are_refused():
    model = gpt2()
    plan, other = plan_of(model), plan_of(gpt2(intermediate_dim=50))
    mixed = replace(plan, layers=(plan.layers[0], other.layers[1]))
    with pytest.raises(ValueError, match=r"plan: inner of layer 1 has shape \(50, 51\); it takes \(77, 51\)"):
        pyfused.decode(mixed, torch.tensor([1]), model.new_cache(1, 4))


def test_a_decoder_without_its_encoder_s_keys_is_refused():
    model = t5()
    with pytest.raises(ValueError, match="cache has no keys of an encoder"):
        pyfused.decode(plan_of(model), torch.tensor([1]), model.new_cache(1, 4))
    with pytest.raises(ValueError, match="position_ids is given"):
        pyfused.decode(plan_of(model), torch.tensor([1]), model.new_cache(1, 4), position_ids=torch.tensor([1]))


def test_a_plan_of_other_dtypes_or_shapes_is_refused():
    model = gpt2()
    plan, cache = plan_of(model), cache_of(model)
    norm = LayerNorm(51)
    for change, message in (
        ({"final_norm": plan.final_norm._replace(weight=torch.ones(102)[::2])}, "final_norm has shape"),
        (
            {"final_norm": plan.final_norm._replace(bias=norm.bias.detach().bfloat16())},
            "bias of final_norm is torch.bfloat16",
        ),
        ({"head": Matrix(plan.head.weight.bfloat16())}, "head is torch.bfloat16"),
        ({"head": Matrix(torch.ones(131, 50))}, r"head has shape \(131, 50\)"),
        ({"position_embedding": Matrix(torch.ones(50, 1))}, "position_embedding has shape"),
        ({"bias_table": torch.ones(8, 4)}, "bias_table has shape"),
    ):
        with pytest.raises(ValueError, match=f"plan: .*{message}"):
            pyfused.decode(replace(plan, **change), TOKENS, copy.deepcopy(cache))


def cross(change):
    def run(cache):
        cache.cross = [tuple(map(change, pair)) for pair in cache.cross]

    return run


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: setattr(c, "length", -1), "length -1"),
        (lambda c: c.at_positions(torch.tensor([3, 4, 19]), 6), "position 19; it takes 0 to 5"),
        (lambda c: c.at_positions(torch.tensor([3, -1, 4]), 6), "position -1"),
        (lambda c: c.at_positions(torch.tensor([3, 4]), 6), "positions torch.int64"),
        (lambda c: c.at_positions(torch.tensor([3, 4, 5], dtype=torch.int32), 6), "positions torch.int32"),
        (cross(lambda t: t[:2]), "2 sources for 3 rows"),
        (cross(lambda t: torch.cat((t, t[:1]))), "4 sources for 3 rows"),
        (cross(lambda t: t.bfloat16()), "torch.bfloat16"),
        (cross(lambda t: t[:, :2]), "the encoder's keys as"),
        (lambda c: setattr(c, "encoder_mask", torch.ones(1, 9)), "encoder_mask of shape"),
    ],
)
def test_a_cache_that_does_not_fit_is_refused(change, message):
    model = t5()
    cache = cache_of(model)
    change(cache)
    with pytest.raises((ValueError, IndexError), match=message):
        pyfused.decode(plan_of(model), TOKENS, cache)


def test_compiled(model):
    plan, cache = plan_of(model), cache_of(model)
    expected = pyfused.decode(plan, TOKENS, copy.deepcopy(cache))
    compiled = torch.compile(lambda tokens, cache: pyfused.decode(plan, tokens, cache), fullgraph=True, backend="eager")
    assert torch.equal(compiled(TOKENS, copy.deepcopy(cache)), expected)
