"""Does generation give the right tokens? Greedy equals transformers and runs without a cache; sampling fits the formula."""

import copy
import functools

import numpy as np
import pytest
import torch
from backbone_cases import like_hf
from generation_cases import DEVICE, MODELS, NEW, case, logits_of, margins
from replayed import Replayed
from test_sampling import distribution

import pyfused
from pyfused import Generator, T5Backbone
from pyfused.bench.beside_transformers import same
from pyfused.generation import beam_search, plan_of, sampling, t5
from pyfused.generation.gpt2 import GPT2Decoding
from pyfused.generation.sampling import Draws, Sampler
from pyfused.nn import KVCache
from pyfused.testing import running


@pytest.fixture(params=MODELS)
def each(request):
    return case(request.param)


@pytest.fixture
def gpt2():
    return case("gpt2")


@pytest.fixture
def model(gpt2):
    return gpt2.model


@pytest.fixture
def prompts(gpt2):
    return gpt2.prompts


@pytest.fixture
def expected(gpt2):
    return gpt2.expected


def test_the_best_two_logits_are_further_apart_than_noise(each):
    """The equalities below need this: no tie that rounding could decide. And a run without a cache gives the same tokens."""
    wide = like_hf(each.hf, torch.float64).to(DEVICE)
    for prompt, new in zip(each.prompts, each.expected):
        truth, mine = (logits_of(model, prompt, new[:-1]) for model in (wide, each.model))
        assert truth.argmax(-1).tolist() == mine.argmax(-1).tolist() == new
        assert (margins(truth) > 10 * (mine.double() - truth).abs().amax(-1)).all()
    assert len(each.prompts) == 100
    assert len({tuple(new) for new in each.expected}) > 70  # and the texts differ
    assert len({token for new in each.expected for token in new}) > 25


def test_greedy_equals_transformers_alone(each):
    generator = Generator(each.model)
    for prompt, new in zip(each.prompts, each.expected):
        assert generator.generate([prompt], each.new) == [new]


@pytest.mark.parametrize("size", [2, 7, 100])
def test_greedy_equals_transformers_in_uneven_batches(each, size):
    generator = Generator(each.model)
    for start in range(0, 100, size):
        batch = slice(start, start + size)
        assert generator.generate(each.prompts[batch], each.new) == each.expected[batch]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_runs(each, dtype):
    """A batch gives the same tokens as each prompt alone, except where rounding decides between two tokens."""
    model = like_hf(each.hf, torch.float32).to(DEVICE, dtype)
    wide = copy.deepcopy(model).double()

    def plain(prompt, tokens):
        with running("reference", strict=False):
            return logits_of(model, prompt, tokens)[-1]

    for prompt, new in zip(each.prompts[:3], Generator(model).generate(each.prompts[:3], 4)):
        alone = Generator(model).generate([prompt], 4)[0]
        assert same(new, alone, functools.partial(plain, prompt), lambda t, p=prompt: logits_of(wide, p, t)[-1])


def test_training_mode_is_left_as_it_was(model, prompts, expected):
    model.train()
    try:
        assert Generator(model).generate(prompts[:2], NEW) == expected[:2]
        assert model.training
    finally:
        model.eval()


def test_fills_the_model_to_its_last_place(model):
    prompt = list(range(60))
    assert len(Generator(model).generate([prompt, [1]], 4)[0]) == 4


def test_no_prompts_no_tokens(model):
    assert Generator(model).generate([], 3) == []


def test_stop_tokens_end_a_row_and_are_returned(each):
    prompts, expected = each.prompts[:12], each.expected[:12]
    stops, cut, heard = {expected[0][2], expected[1][1]}, [], []
    for new in expected:
        ends = [i for i, token in enumerate(new) if token in stops]
        cut.append(new[: ends[0] + 1] if ends else new)
    assert len({len(c) for c in cut}) > 2
    generator = Generator(each.model)
    assert generator.generate(prompts, each.new, stop_token_ids=stops, on_token=lambda *at: heard.append(at)) == cut
    assert sorted(heard) == sorted((row, token) for row, new in enumerate(cut) for token in new)
    first = [new[0] for new in expected[:4]]
    assert generator.generate(prompts[:4], each.new, stop_token_ids=first) == [[t] for t in first]


def test_rows_of_one_length_that_remain_need_no_mask(model, prompts, expected):
    """The longest row stops first; the two remaining rows are equally long."""
    longest = max(range(100), key=lambda i: len(prompts[i]))
    stop = expected[longest][0]
    equal = [i for i, p in enumerate(prompts) if len(p) == 5 and stop not in expected[i]]
    rows = [equal[0], longest, equal[1]]
    out = Generator(model).generate([prompts[i] for i in rows], NEW, stop_token_ids=[stop])
    assert out == [expected[equal[0]], [stop], expected[equal[1]]]


def test_on_token_hears_every_token_in_order(model, prompts, expected):
    """Of three rows the middle one stops."""
    heard, stop = [], expected[1][3]
    first, last = [i for i in range(100) if stop not in expected[i]][:2]
    rows = [prompts[i] for i in (first, 1, last)]
    out = Generator(model).generate(rows, NEW, stop_token_ids=[stop], on_token=lambda *at: heard.append(at))
    assert heard == [(row, out[row][t]) for t in range(NEW) for row in range(3) if t < len(out[row])]
    assert out[1][-1] == stop
    assert len(out[1]) <= 4 < len(out[0])


def test_on_token_hears_a_token_before_the_next_is_made(model, prompts):
    class Enough(Exception):
        pass

    heard = []

    def stop_at_two(row, token):
        heard.append(token)
        if len(heard) == 2:
            raise Enough

    with pytest.raises(Enough):
        Generator(model).generate(prompts[:1], NEW, on_token=stop_at_two)
    assert heard == Generator(model).generate(prompts[:1], 2)[0]


def test_top_k_of_one_is_greedy(model, prompts, expected):
    generator = Generator(model)
    assert generator.generate(prompts[:5], NEW, temperature=2.0, top_k=1, seed=1) == expected[:5]
    assert generator.generate(prompts[:5], NEW, temperature=2.0, top_p=1e-6, seed=1) == expected[:5]
    assert generator.generate(prompts[:5], NEW, temperature=1e-4, seed=1) == expected[:5]


def test_a_seed_repeats(model, prompts):
    generator = Generator(model)
    once = generator.generate(prompts[:4], NEW, temperature=3.0, seed=5)
    assert generator.generate(prompts[:4], NEW, temperature=3.0, seed=5) == once
    assert generator.generate(prompts[:4], NEW, temperature=3.0, seed=6) != once
    torch.manual_seed(0)
    first = generator.generate(prompts[:4], NEW, temperature=3.0)
    second = generator.generate(prompts[:4], NEW, temperature=3.0)
    torch.manual_seed(0)
    assert generator.generate(prompts[:4], NEW, temperature=3.0) == first != second


def test_a_rows_draws_do_not_depend_on_the_other_rows(each):
    options, prompts, new = {"temperature": 3.0, "seed": 5}, each.prompts[:4], each.new
    generator = Generator(each.model)
    together = generator.generate(prompts, new, **options)
    assert generator.generate(prompts[:1], new, **options) == together[:1]
    assert generator.generate(prompts, 6, **options) == [row[:6] for row in together]
    stop = together[0][1]
    stopped = generator.generate(prompts, new, **options, stop_token_ids=[stop])
    for row, whole in zip(stopped, together):
        assert row == (whole[: whole.index(stop) + 1] if stop in whole else whole)


def test_draws(monkeypatch):
    """They are the same however many are made at a time, and for rows that run alone."""

    def numbers(seed, rows, count, temperature=1.0):
        draws = Draws(seed, rows, Sampler(temperature), torch.device("cpu"))
        return torch.stack([draws.next() for _ in range(count)], 1)

    expected = numbers(5, 3, 8)
    assert len(set(expected.flatten().tolist())) == 24
    assert not torch.equal(numbers(5, 2, 4)[1], numbers(6, 2, 4)[0])
    assert not numbers(5, 3, 8, temperature=0.0).any()
    monkeypatch.setattr(sampling, "_BLOCK", 3)
    assert torch.equal(numbers(5, 3, 8), expected)
    draws = Draws(5, 3, Sampler(1.0), torch.device("cpu"))
    draws.next()
    draws.keep([2, 0])
    assert torch.equal(draws.next(), expected[[2, 0], 1])
    alone = Draws(5, 3, Sampler(1.0), torch.device("cpu"))
    assert torch.equal(torch.stack([alone.next_of([1]) for _ in range(8)], 1), expected[1:2])


def test_a_large_limit_costs_no_memory(each, monkeypatch):
    """What holds an answer grows with it, and nothing else changes."""
    generator, sample = Generator(each.model), {"temperature": 3.0, "seed": 5}
    rows, is_t5 = each.prompts[:5], isinstance(each.model, T5Backbone)

    def answers():
        yield generator.generate(rows, each.new, **sample)
        yield generator.generate(rows, each.new, num_beams=3, num_return_sequences=2)
        yield generator.generate_batch(rows, each.new, rows=2, **sample)
        yield generator.generate_batch(rows, each.new, rows=2)

    expected, capacities = list(answers()), []
    if DEVICE == "cpu":  # a captured step has a cache of fixed size
        monkeypatch.setattr(t5, "_FIRST", 3)
    monkeypatch.setattr(sampling, "_BLOCK", 4)
    monkeypatch.setattr(beam_search, "_FIRST", 5)
    assert list(answers()) == expected
    monkeypatch.undo()
    if not is_t5:
        return  # GPT-2's table of positions is the limit
    made = KVCache.__init__

    def noted(self, layers, batch_size, heads, capacity, size, **options):
        capacities.append(capacity)
        made(self, layers, batch_size, heads, capacity, size, **options)

    monkeypatch.setattr(KVCache, "__init__", noted)
    every = range(97)
    assert generator.generate(rows, 10**6, stop_token_ids=every) == generator.generate(rows, 1)
    generator.generate(rows, 10**6, stop_token_ids=every, **sample)
    generator.generate_batch(rows, 10**6, rows=2, stop_token_ids=every, **sample)
    generator.generate(rows, 10**6, num_beams=2, stop_token_ids=range(90))
    assert max(capacities) <= 256


def test_samples_follow_the_models_distribution(model, prompts):
    rows, prompt = 1000, prompts[4]
    tokens = [new[0] for new in Generator(model).generate([prompt] * rows, 1, temperature=3.0, top_k=6, seed=11)]
    expected = distribution(logits_of(model, prompt, [])[0].cpu(), 3.0, top_k=6).numpy()
    counts = np.bincount(tokens, minlength=97)
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    chi_square = ((counts - rows * expected)[kept] ** 2 / (rows * expected[kept])).sum()
    assert chi_square < 20.5  # five degrees of freedom: 0.1% of right samplers fail, and the seed is fixed


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"prompts": [[1], []]}, ValueError, r"prompts\[1\] is empty"),
        ({"prompts": [1, 2]}, TypeError, r"prompts\[0\] is an int"),
        ({"prompts": "text"}, TypeError, "prompts is a str"),
        ({"prompts": ["text"]}, TypeError, r"prompts\[0\] is a str"),
        ({"prompts": [[1.5]]}, TypeError, r"prompts\[0\] is 1-D of float64"),
        ({"prompts": [[1, [2]]]}, TypeError, r"prompts\[0\] is not one list of integers"),
        ({"prompts": [[[1]]]}, TypeError, r"prompts\[0\] is 2-D"),
        ({"prompts": [[1, 97]]}, IndexError, r"prompts\[0\] holds 97; it takes token ids 0 to 96"),
        ({"prompts": [[-1]]}, IndexError, r"prompts\[0\] holds -1"),
        ({"prompts": [[1], [1] * 60]}, ValueError, r"prompts\[1\] has 60 tokens and max_new_tokens is 5"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens is 0"),
        ({"max_new_tokens": 1.0}, TypeError, "max_new_tokens is 1.0"),
        ({"temperature": -0.1}, ValueError, "temperature is -0.1"),
        ({"temperature": float("nan")}, ValueError, "temperature is nan"),
        ({"temperature": "hot"}, TypeError, "temperature is 'hot'"),
        ({"top_k": 0}, ValueError, "top_k is 0"),
        ({"top_k": 1.0}, TypeError, "top_k is 1.0"),
        ({"top_p": 0.0}, ValueError, "top_p is 0.0"),
        ({"top_p": 1.01}, ValueError, "top_p is 1.01"),
        ({"seed": -1}, ValueError, "seed is -1"),
        ({"seed": 0.5}, TypeError, "seed is 0.5"),
        ({"stop_token_ids": 5}, TypeError, "stop_token_ids is 5"),
        ({"stop_token_ids": [97]}, IndexError, "stop_token_ids holds 97"),
        ({"stop_token_ids": ["a"]}, TypeError, "stop_token_ids holds 'a'"),
        ({"on_token": 1}, TypeError, "on_token is an int"),
    ],
)
def test_bad_input_is_refused_by_name(model, change, error, message):
    with pytest.raises(error, match=message):
        Generator(model).generate(**{"prompts": [[1, 2]], "max_new_tokens": 5, **change})


def test_a_generator_takes_a_backbone():
    with pytest.raises(TypeError, match="model is a Linear"):
        Generator(torch.nn.Linear(2, 2))
    assert pyfused.Generator is Generator


def test_a_hooked_or_replaced_module_is_heard(each):
    """The fast step calls no module. It gives way if it would skip a hook or a replacement, with the same tokens."""
    heard: list[int] = []
    other = like_hf(each.hf).to(DEVICE)
    layers = getattr(other, "decoder", other).layers
    assert plan_of(other) is not None
    handle = layers[1].feed_forward.register_forward_hook(lambda *_: heard.append(1))
    assert plan_of(other) is None
    assert Generator(other).generate(each.prompts[:3], each.new) == each.expected[:3]
    if DEVICE == "cpu":  # a replayed CUDA graph calls no Python
        assert len(heard) == each.new
    handle.remove()
    assert plan_of(other) is not None
    layers[0].feed_forward.outer = torch.nn.Linear(56, 24)
    assert plan_of(other) is None


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 3.0, "top_k": 9, "top_p": 0.8, "seed": 2}], ids=["greedy", "drawn"]
)
def test_the_step_of_fixed_shapes_gives_the_same_tokens(each, monkeypatch, sampling):
    """Positions lie on the device, a mask hides unused capacity, stopped rows run on; then further calls."""
    prompts, new = each.prompts, each.new
    stop = Generator(each.model).generate(prompts[:1], 3, **sampling)[0][2]
    calls = [(prompts[:6], new, []), (prompts[:6], new, [stop]), (prompts[6:12], new - 3, [])]
    want = [Generator(each.model).generate(p, n, **sampling, stop_token_ids=s) for p, n, s in calls]
    shape = (6, new, 40) if isinstance(each.model, T5Backbone) else (6, 40 + new)
    kept: list[Replayed] = []

    def steps(self, arrays, max_new_tokens, sampler):
        if not kept:
            kept.append(Replayed(self.model, shape, sampler))
        return kept[0]

    monkeypatch.setattr(Generator, "_steps", steps)
    generator = Generator(each.model)
    for (p, n, s), tokens in zip(calls, want):
        assert generator.generate(p, n, **sampling, stop_token_ids=s) == tokens


@pytest.mark.gpu
def test_a_captured_graph_gives_the_same_tokens(each):
    generator, prompts, expected = Generator(each.model), each.prompts, each.expected
    for _ in range(2):  # captures, then replays from the start
        assert generator.generate(prompts[:7], each.new) == expected[:7]
        assert generator.generate(prompts[:7], each.new, on_token=lambda row, token: None) == expected[:7]
    assert len(generator._graphs) == 1
    for rows in range(1, 7):
        assert generator.generate(prompts[:rows], each.new) == expected[:rows]
    assert len(generator._graphs) == 4


def test_tokens_out_of_a_column():
    """A step takes tokens that lie apart, as a column of a table does."""
    model = pyfused.GPT2Backbone(vocabulary_size=61, num_layers=1, num_heads=2, hidden_dim=16, intermediate_dim=24).eval()
    ids = torch.randint(61, (3, 6))
    with torch.inference_mode():
        decoding = GPT2Decoding(model, (3, 8))
        decoding.start([text[:5].numpy() for text in ids])
        expected = model.logits(model(token_ids=ids, padding_mask=None)[:, -1])
        torch.testing.assert_close(decoding.step(ids[:, 5]), expected)


def test_t5_takes_any_number_of_tokens_but_no_unknown_one():
    generator = Generator(T5Backbone(61, 1, 2, 8, 16).to(DEVICE))
    with pytest.raises(IndexError, match=r"prompts\[0\] holds 61; it takes token ids 0 to 60"):
        generator.generate([[61]], 3)
    assert len(generator.generate([[1]], 200)[0]) == 200
