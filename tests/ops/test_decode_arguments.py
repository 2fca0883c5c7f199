"""Does decode read tensors that lie anywhere in memory, and refuse what kernels could only read wrongly?"""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from test_decode import by_modules, filled_cache, gpt2, sharpened, t5

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


def test_a_plan_of_other_dtypes_or_shapes_is_refused():
    model = gpt2()
    plan, cache = plan_of(model), cache_of(model)
    norm = LayerNorm(51)
    for change, message in (
        ({"final_norm": plan.final_norm._replace(weight=torch.ones(102)[::2])}, "final_norm has shape"),
        ({"final_norm": plan.final_norm._replace(bias=norm.bias.detach().bfloat16())}, "bias of final_norm is torch.bfloat16"),
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
