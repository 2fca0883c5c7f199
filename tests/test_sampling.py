"""Does the sampler follow the probabilities at every temperature, and raise if the logits allow no token?"""

import numpy as np
import pytest
import torch
from backbone_cases import hf_gpt2, hf_t5, like_hf
from replayed import Replayed

from pyfused import Generator
from pyfused.generation.beam_search import BeamSearch
from pyfused.generation.beam_steps import EagerBeams
from pyfused.generation.sampling import NO_TOKEN, Sampler, likeliest_token

DRAWS = 20_000


def frequencies(sampler, logits, seed=0):
    """(V,): how often each token is drawn from one row of logits, by DRAWS stratified numbers in [0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    uniform = (torch.arange(DRAWS) + torch.rand(DRAWS, dtype=torch.float64, generator=generator)) / DRAWS
    tokens = sampler(logits.expand(DRAWS, -1), uniform)
    return torch.bincount(tokens, minlength=logits.shape[-1]).double() / DRAWS


def distribution(logits, temperature, top_k=None, top_p=None):
    """float64 softmax, cut as the docstring says."""
    p = torch.softmax(logits.double() / temperature, -1)
    order = p.argsort(descending=True, stable=True)
    kept = order[:top_k]
    q = p[kept] / p[kept].sum()
    if top_p is not None:
        kept = kept[(q.cumsum(0) - q) < top_p]
    out = torch.zeros_like(p)
    out[kept] = p[kept] / p[kept].sum()
    return out


@pytest.mark.parametrize("temperature", [1e-3, 0.3, 1.0, 30])
@pytest.mark.parametrize("top_k", [None, 1, 3, 20, 48, 500])
@pytest.mark.parametrize("top_p", [None, 0.01, 0.5, 0.9, 0.99, 1.0])
def test_draws_are_the_softmax_of_float64(temperature, top_k, top_p):
    logits = 2.0 * torch.randn(50, generator=torch.Generator().manual_seed(1))
    logits[[3, 11, 49]] = -torch.inf  # never drawn: probability 0
    found, expected = frequencies(Sampler(temperature, top_k, top_p), logits), distribution(logits, temperature, top_k, top_p)
    assert (found - expected).abs().max() <= 2.0 / DRAWS
    assert found[expected == 0].sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [0, 0.0, 5e-324, 1e-46, 1e-45, 1e-40, 1e-39, 1.1754943e-38, 1e-30, 1e-20])
def test_temperatures_too_small_for_float32_are_greedy(dtype, temperature):
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(2)).to(dtype)
    logits[:, 7] += 9.0  # no ties
    for cut in ({}, {"top_k": 3}, {"top_p": 0.9}, {"top_k": 5, "top_p": 0.5}):
        for u in (0.0, 0.5, 1 - 2.0**-53):
            uniform = torch.full((6,), u, dtype=torch.float64)
            assert torch.equal(Sampler(temperature, **cut)(logits, uniform), logits.argmax(-1)), (cut, u)


@pytest.mark.parametrize(
    "temperature", [1e30, 1e38, 3.5e38, 1e300, 10**30, 10**400], ids=lambda t: f"1e{len(str(int(t))) - 1}"
)
def test_temperatures_beyond_float32_are_uniform(temperature):
    logits = torch.randn(8, generator=torch.Generator().manual_seed(3))
    logits[2] = -torch.inf
    found = frequencies(Sampler(temperature), logits)
    assert found[2] == 0
    assert (found[[0, 1, 3, 4, 5, 6, 7]] - 1 / 7).abs().max() <= 2.0 / DRAWS


def test_any_top_k_fits_into_the_kernels_64_bits():
    logits, uniform = torch.randn(3, 7), torch.rand(3, dtype=torch.float64)
    huge = Sampler(1.0, top_k=2**64 + 1)
    assert huge.cuts[1] < 2**31
    assert torch.equal(huge(logits, uniform), Sampler(1.0)(logits, uniform))


@pytest.mark.parametrize("u", [0.0, 0.25, 1 - 2.0**-53])
def test_what_has_no_probability_is_never_drawn(u):
    uniform = torch.tensor([u], dtype=torch.float64)
    for live in (0, 3, 9):
        logits = torch.full((1, 10), -torch.inf)
        logits[0, live] = -5.0
        for cut in ({}, {"top_k": 4}, {"top_p": 1e-320}, {"top_p": 1 - 2.0**-53}, {"top_k": 9, "top_p": 0.5}):
            assert Sampler(0.9, **cut)(logits, uniform).item() == live


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -1e-46, -1])
def test_refused_temperatures_are_named(value):
    with pytest.raises(ValueError, match=r"^temperature is .*; it takes a finite number, at least 0"):
        Sampler(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sampler", [Sampler(), Sampler(1e-46), Sampler(0.8), Sampler(0.8, 3), Sampler(0.8, None, 0.9)])
def test_logits_that_choose_none(dtype, sampler):
    logits = torch.zeros(6, 9, dtype=dtype)
    logits[0, 4] = torch.nan
    logits[1, 8] = torch.inf
    logits[2] = -torch.inf
    logits[3, 1:] = -torch.inf  # chooses token 0
    logits[4, 0], logits[4, 1] = torch.inf, torch.nan
    found = sampler(logits, torch.full((6,), 0.5, dtype=torch.float64)).tolist()
    assert [found[i] for i in (0, 1, 2, 4)] == [NO_TOKEN] * 4
    assert found[3] == 0
    assert found[5] in range(9)


def made(kind):
    return like_hf(hf_gpt2() if kind == "gpt2" else hf_t5())


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7, "seed": 1}, {"num_beams": 3}, {"steps": "fixed"}], ids=str
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_generation_raises_where_logits_are_not_finite(kind, options, bad, monkeypatch):
    """The bad logits come in the third step, in the second prompt only."""
    model = made(kind)
    if options.get("steps"):
        options = {}
        steps = lambda self, arrays, n, sampler: Replayed(self.model, self._decoding.shape(arrays, n), sampler)  # noqa: E731
        monkeypatch.setattr(Generator, "_steps", steps)
    decoding = Generator(model)._decoding
    step, fixed = decoding.step, decoding.fixed_step
    calls = []

    def broken(function):
        def run(self, tokens, choose=False):
            logits = function(self, tokens).clone()
            calls.append(1)
            if len(calls) == 3:
                logits[len(logits) // 2 :, 5] = bad
            return likeliest_token(logits) if choose else logits

        return run

    monkeypatch.setattr(decoding, "step", broken(step))
    monkeypatch.setattr(decoding, "fixed_step", broken(fixed))
    prompts = [[1, 2, 3], [4, 5, 6]]
    at = 2 if kind == "t5" else 3  # T5's first token also takes a step
    said = rf"^the logits of new token {at} of prompts\[1\] choose none: they hold NaN or inf; the model's weights"
    with pytest.raises(FloatingPointError, match=said):
        Generator(model).generate(prompts, 8, **options)


def test_the_hint_is_about_float16(monkeypatch):
    model = made("t5").half()
    with torch.no_grad():
        model.decoder.final_norm.weight.fill_(60000.0)
        model.token_embedding.weight *= 100
    for options in ({}, {"num_beams": 2}):
        with pytest.raises(FloatingPointError, match=r"prompts\[0\] .*float16 ends at 65504; dtype='bfloat16'"):
            Generator(model).generate([[1, 2]], 3, **options)


@pytest.mark.parametrize("penalty", [-16.0, -6.0, 6.0, 16.0])
def test_extreme_length_penalties_rank_as_float64_does(penalty):
    """Texts may end from the 21st token on, and each length has its own score. The best in float64 comes first."""
    stop = 0

    def odds_of(t):
        return torch.tensor([0.02 + 0.01 * t if t >= 20 else 0.0, 1.0], dtype=torch.float64).log().log_softmax(0)

    class Decoding:
        def start(self, prompts):
            self.t = 0
            return self.logits()

        def logits(self):
            out = torch.full((1, 4), -torch.inf)
            out[0, :2] = odds_of(self.t)
            return out

        def step(self, tokens):
            self.t += 1
            return self.logits().expand(len(tokens), -1)

        branch = select = lambda self, *a: None
        reorder = lambda self, *a: None  # noqa: E731

    search = BeamSearch(2, penalty, "never", 1)
    search.check_penalty(40)
    steps = EagerBeams(Decoding(), 2, search.candidates(1))
    (found,) = search.run(steps, [np.array([1])], 40, frozenset([stop]))
    total, scores = 0.0, {}
    for t in range(40):
        odds = odds_of(t)
        scores[t + 1] = (total + odds[0].item()) / (t + 1.0) ** penalty
        total += odds[1].item()
    scores[40] = max(scores[40], total / 40.0**penalty)
    assert len(found) == max(scores, key=scores.get)


@pytest.mark.parametrize("penalty", [1e6, -1e6, 17.0, -17.0, 10**400], ids=lambda p: f"{p:.0e}" if p < 1e9 else "huge")
def test_length_penalties_beyond_float32_are_refused(penalty):
    with pytest.raises(ValueError, match=r"^length_penalty is .*; where max_new_tokens is 64 it takes -16.6 to 16.6"):
        Generator(made("t5")).generate([[1]], 64, num_beams=2, length_penalty=penalty)
