"""Does generation give the right tokens? Greedy equals transformers and runs without a cache; sampling fits the formula."""

import copy

import numpy as np
import pytest
import torch
from backbone_cases import hf_gpt2, like_hf

import pyfused
from pyfused import Generator
from pyfused.bench.beside_transformers import same
from pyfused.generation import plan_of, sampling
from pyfused.generation.gpt2 import GPT2Decoding
from pyfused.generation.sampling import Draws, Sampler
from pyfused.generation.steps import GraphSteps
from pyfused.testing import running

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEW = 10
CLEAR = 0.02  # a thousand times the error of float32 logits here


@pytest.fixture(scope="module")
def hf():
    """Has weights spread so widely that the two best logits are far apart."""
    return hf_gpt2(spread=0.5, vocab_size=97, n_positions=64)


@pytest.fixture(scope="module")
def model(hf):
    return like_hf(hf).to(DEVICE)


@pytest.fixture(scope="module")
def texts(hf):
    """100 prompts with the greedy tokens of transformers' generate in float64. Prompts with a near tie are left out, because
    rounding could decide it."""
    from transformers import GPT2LMHeadModel

    lm = GPT2LMHeadModel(hf.config).double().eval()
    lm.transformer.load_state_dict(hf.state_dict())
    lm.tie_weights()
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 21, (200,), generator=generator).tolist()
    prompts = [torch.randint(97, (n,), generator=generator).tolist() for n in lengths]
    out = {}
    for length in sorted(set(lengths)):  # prompts of one length together
        rows = [i for i, n in enumerate(lengths) if n == length]
        ids = torch.tensor([prompts[i] for i in rows])
        options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        options |= {"output_logits": True, "return_dict_in_generate": True}
        result = lm.generate(ids, attention_mask=torch.ones_like(ids), **options)
        best = torch.stack(result.logits).topk(2).values
        gaps = (best[..., 0] - best[..., 1]).min(0).values
        for row, new, gap in zip(rows, result.sequences[:, length:].tolist(), gaps.tolist()):
            if gap > CLEAR:
                out[row] = new
    return [(prompts[i], out[i]) for i in sorted(out)[:100]]


@pytest.fixture(scope="module")
def prompts(texts):
    return [prompt for prompt, _ in texts]


@pytest.fixture(scope="module")
def expected(texts):
    return [new for _, new in texts]


def logits_of(model, tokens):
    ids = torch.tensor([tokens])
    return model.token_embedding(model(token_ids=ids, padding_mask=None), reverse=True)[0]


@torch.no_grad()
def test_the_best_two_logits_are_further_apart_than_noise(hf, prompts, expected, model):
    """The equalities below need this: no tie that rounding could decide."""
    wide, errors = like_hf(hf, torch.float64).to(DEVICE), []
    for prompt, new in zip(prompts, expected):
        truth, mine = (logits_of(m, prompt + new[:-1])[len(prompt) - 1 :] for m in (wide, model))
        errors.append((mine.double() - truth).abs().max().item())
    assert len(prompts) == 100
    assert 100 * max(errors) < CLEAR
    assert len({tuple(new) for new in expected}) > 90  # and the texts differ


def test_greedy_equals_transformers_alone(model, prompts, expected):
    generator = Generator(model)
    for prompt, new in zip(prompts, expected):
        assert generator.generate([prompt], NEW) == [new]


@pytest.mark.parametrize("size", [2, 7, 100])
def test_greedy_equals_transformers_in_uneven_batches(model, prompts, expected, size):
    generator = Generator(model)
    for start in range(0, 100, size):
        assert generator.generate(prompts[start : start + size], NEW) == expected[start : start + size]


@torch.no_grad()
def test_greedy_equals_a_run_without_cache(model, prompts, expected):
    for prompt, new in list(zip(prompts, expected))[:10]:
        tokens = list(prompt)
        for _ in range(NEW):
            tokens.append(int(logits_of(model, tokens)[-1].argmax()))
        assert tokens[len(prompt) :] == new


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_runs(hf, prompts, dtype):
    """A batch gives the same tokens as each prompt alone, except where rounding decides between two tokens."""
    model = like_hf(hf, torch.float32).to(DEVICE, dtype)
    wide = copy.deepcopy(model).double()

    def plain(tokens):
        with running("reference", strict=False):
            return logits_of(model, tokens)[-1]

    for prompt, new in zip(prompts[:3], Generator(model).generate(prompts[:3], 4)):
        alone = Generator(model).generate([prompt], 4)[0]
        assert same(new, alone, lambda t, p=prompt: plain(p + t), lambda t, p=prompt: logits_of(wide, p + t)[-1])


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


def test_stop_tokens_end_a_row_and_are_returned(model, prompts, expected):
    stops = {expected[0][2], expected[1][1]}
    cut = []
    for new in expected[:12]:
        ends = [i for i, token in enumerate(new) if token in stops]
        cut.append(new[: ends[0] + 1] if ends else new)
    lengths = [len(c) for c in cut]
    assert min(lengths) <= 3
    assert max(lengths) == NEW
    assert Generator(model).generate(prompts[:12], NEW, stop_token_ids=stops) == cut
    first = [new[0] for new in expected[:4]]
    assert Generator(model).generate(prompts[:4], NEW, stop_token_ids=first) == [[t] for t in first]


def test_rows_of_one_length_that_remain_need_no_mask(model, prompts, expected):
    """The longest row stops first; the two remaining rows are equally long."""
    equal = [i for i, p in enumerate(prompts) if len(p) == 5][:2]
    longest = max(range(100), key=lambda i: len(prompts[i]))
    rows = [equal[0], longest, equal[1]]
    stop = expected[longest][0]
    assert all(stop not in expected[i] for i in equal)
    out = Generator(model).generate([prompts[i] for i in rows], NEW, stop_token_ids=[stop])
    assert out == [expected[equal[0]], [stop], expected[equal[1]]]


def test_on_token_hears_every_token_in_order(model, prompts, expected):
    heard, stop = [], expected[1][3]
    out = Generator(model).generate(prompts[:3], NEW, stop_token_ids=[stop], on_token=lambda *at: heard.append(at))
    steps = range(max(len(row) for row in out))
    assert heard == [(row, out[row][t]) for t in steps for row in range(3) if t < len(out[row])]
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


def filtered(logits, temperature, top_k, top_p):
    """The distribution that the docstring promises for one row, in plain numpy."""
    scores = np.asarray(logits, np.float64) / temperature
    p = np.exp(scores - scores.max())
    p /= p.sum()
    order = np.argsort(-p)
    kept = order[:top_k] if top_k else order
    if top_p:
        q = p[kept] / p[kept].sum()
        kept = kept[: int(np.searchsorted(np.cumsum(q), top_p)) + 1]
    out = np.zeros_like(p)
    out[kept] = p[kept] / p[kept].sum()
    return out


@pytest.mark.parametrize("top_k", [None, 1, 3, 20, 500])
@pytest.mark.parametrize("top_p", [None, 0.01, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_the_distribution_is_the_one_promised(temperature, top_k, top_p):
    """Inverting the cumulative sum on a grid of n draws gives each token p * n times, to within its two ends."""
    logits, n = 2 * torch.randn(40), 20000
    grid = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    tokens = Sampler(temperature, top_k, top_p)(logits.expand(n, -1), grid)
    counts = torch.bincount(tokens, minlength=40).numpy()
    expected = filtered(logits, temperature, top_k, top_p)
    assert np.abs(counts - expected * n).max() <= 2
    assert counts[expected == 0].sum() == 0


def test_extreme_draws_and_temperatures():
    logits = torch.tensor([[0.0, 5.0, -torch.inf, 5.0, 1.0]])
    edges = torch.tensor([0.0, np.nextafter(1.0, 0.0)], dtype=torch.float64)
    for sampler in (
        Sampler(1.0),
        Sampler(1.0, top_p=0.5),
        Sampler(1.0, top_k=2),
        Sampler(1e-30),
        Sampler(1e-30, 3, 0.9),
    ):
        low, high = sampler(logits.expand(2, -1), edges).tolist()
        assert {low, high} <= {0, 1, 3, 4}
    assert set(Sampler(1e-30)(logits.expand(2, -1), edges).tolist()) == {1, 3}


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


def test_a_rows_draws_do_not_depend_on_the_other_rows(model, prompts):
    generator = Generator(model)
    together = generator.generate(prompts[:4], NEW, temperature=3.0, seed=5)
    assert generator.generate(prompts[:1], NEW, temperature=3.0, seed=5) == together[:1]
    assert generator.generate(prompts[:4], 6, temperature=3.0, seed=5) == [row[:6] for row in together]
    stop = together[0][1]
    stopped = generator.generate(prompts[:4], NEW, temperature=3.0, seed=5, stop_token_ids=[stop])
    for row, new in zip(stopped, together):
        assert row == (new[: new.index(stop) + 1] if stop in new else new)


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


@torch.no_grad()
def test_samples_follow_the_models_distribution(model, prompts):
    rows, prompt = 1000, prompts[4]
    tokens = [new[0] for new in Generator(model).generate([prompt] * rows, 1, temperature=3.0, top_k=6, seed=11)]
    expected = filtered(logits_of(model, prompt)[-1].cpu(), 3.0, 6, None)
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


def test_a_hooked_or_replaced_module_is_heard(hf, model, prompts, expected):
    """The fast step calls no module. It gives way if it would skip a hook or a replacement, with the same tokens."""
    heard: list[int] = []
    other = like_hf(hf).to(DEVICE)
    assert plan_of(other) is not None
    handle = other.layers[1].feed_forward.register_forward_hook(lambda *_: heard.append(1))
    assert plan_of(other) is None
    assert Generator(other).generate(prompts[:3], NEW) == expected[:3]
    if DEVICE == "cpu":  # a replayed CUDA graph calls no Python
        assert len(heard) == NEW
    handle.remove()
    assert plan_of(other) is not None
    other.layers[0].feed_forward.inner = torch.nn.Linear(24, 56)
    assert plan_of(other) is None


class Replayed(GraphSteps):
    """The graph's step with its fixed shapes, run operator by operator if no GPU can capture it."""

    def _capture(self):
        self.replay = self._step
        return self


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 3.0, "top_k": 9, "top_p": 0.8, "seed": 2}], ids=["greedy", "drawn"]
)
def test_the_step_of_fixed_shapes_gives_the_same_tokens(model, prompts, monkeypatch, sampling):
    """Positions lie on the device, a mask hides unused capacity, stopped rows run on; then a second call."""
    stop = Generator(model).generate(prompts[:1], 3, **sampling)[0][2]
    calls = [(prompts[:6], NEW, []), (prompts[:6], NEW, [stop]), (prompts[6:12], NEW - 3, [])]
    want = [Generator(model).generate(p, n, **sampling, stop_token_ids=s) for p, n, s in calls]
    kept: list[Replayed] = []

    def steps(self, arrays, max_new_tokens, sampler):
        if not kept:
            kept.append(Replayed(self.model, (6, 40), sampler))
        return kept[0]

    monkeypatch.setattr(Generator, "_steps", steps)
    generator = Generator(model)
    for (p, n, s), tokens in zip(calls, want):
        assert generator.generate(p, n, **sampling, stop_token_ids=s) == tokens


@pytest.mark.gpu
def test_a_captured_graph_gives_the_same_tokens(model, prompts, expected):
    generator = Generator(model)
    for _ in range(2):  # captures, then replays from the start
        assert generator.generate(prompts[:7], NEW) == expected[:7]
        assert generator.generate(prompts[:7], NEW, on_token=lambda row, token: None) == expected[:7]
    assert len(generator._graphs) == 1
    for rows in range(1, 7):
        assert generator.generate(prompts[:rows], NEW) == expected[:rows]
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
