"""Does T5 generate the right tokens? Greedy equals transformers' generate, with sources of any length."""

import copy

import pytest
import torch
from backbone_cases import hf_t5, like_hf

from pyfused import Generator, T5Backbone
from pyfused.generation import beam_search, plan_of, sampling, t5
from pyfused.generation.steps import GraphSteps
from pyfused.nn import KVCache

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEW = 45

# NEW steps reach each of the decoder's buckets (16, up to distance 30), and 15 steps lie past the last.
BUCKETS = {"relative_attention_num_buckets": 16, "relative_attention_max_distance": 30}


@pytest.fixture(scope="module", params=["gated, untied", "plain, tied"])
def hf(request):
    """Has weights spread so widely that the two best logits are far apart."""
    if request.param == "gated, untied":
        made = hf_t5(
            spread=0.5, seed=1, vocab_size=97, num_layers=3, num_decoder_layers=2, tie_word_embeddings=False, **BUCKETS
        )
        with torch.no_grad():
            made.lm_head.weight = torch.nn.Parameter(torch.randn(97, 24, generator=torch.Generator().manual_seed(1)))
        return made
    return hf_t5(spread=0.5, vocab_size=97, feed_forward_proj="relu", decoder_start_token_id=3, seed=2, **BUCKETS)


@pytest.fixture(scope="module")
def model(hf):
    return like_hf(hf).to(DEVICE)


LENGTHS = (1, 2, 3, 5, 9, 17, 28, 40)  # transformers generates for all sources of a length at once


@pytest.fixture(scope="module")
def chosen(hf):
    """100 of 130 prompts with the greedy tokens of transformers' generate in float64. Their two best logits are never close,
    so every right implementation gives these tokens on any processor."""
    generator = torch.Generator().manual_seed(3)
    lengths = [LENGTHS[i] for i in torch.randint(len(LENGTHS), (130,), generator=generator).tolist()]
    prompts = [torch.randint(97, (n,), generator=generator).tolist() for n in lengths]
    tokens, wide = greedy(copy.deepcopy(hf).double(), prompts), like_hf(hf, torch.float64)
    pairs = sorted(zip(prompts, tokens), key=lambda pair: -margins(logits_of(wide, pair[0], pair[1][:-1])).min())
    return sorted(pairs[:100], key=lambda pair: prompts.index(pair[0]))


@pytest.fixture(scope="module")
def prompts(chosen):
    return [prompt for prompt, _ in chosen]


@pytest.fixture(scope="module")
def expected(chosen):
    return [tokens for _, tokens in chosen]


def margins(logits):
    best, second = logits.topk(2).values.unbind(-1)
    return best - second


def greedy(hf, prompts):
    """Tokens of transformers' generate, sources of one length together."""
    out = {}
    for length in sorted({len(p) for p in prompts}):
        rows = [i for i, p in enumerate(prompts) if len(p) == length]
        ids = torch.tensor([prompts[i] for i in rows])
        options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        result = hf.generate(ids, attention_mask=torch.ones_like(ids), **options)
        out.update(zip(rows, result[:, 1:].tolist()))
    return [out[i] for i in range(len(prompts))]


@torch.no_grad()
def logits_of(model, prompt, tokens):
    """Logits after the start token and after each of `tokens`, without a cache."""
    start = model.get_config()["decoder_start_token_id"]
    out = model(
        encoder_token_ids=torch.tensor([prompt]), encoder_padding_mask=None,
        decoder_token_ids=torch.tensor([[start, *tokens]]), decoder_padding_mask=None,
    )  # fmt: skip
    return model.logits(out["decoder_sequence_output"])[0]


@torch.no_grad()
def test_the_best_two_logits_are_further_apart_than_noise(hf, prompts, expected, model):
    """The equalities below need this: no tie that rounding could decide."""
    wide = like_hf(hf, torch.float64).to(DEVICE)
    for prompt, new in zip(prompts, expected):
        truth, mine = (logits_of(m, prompt, new[:-1]) for m in (wide, model))
        assert truth.argmax(-1).tolist() == new  # and a run without cache agrees
        assert (margins(truth) > 10 * (mine.double() - truth).abs().amax(-1)).all()
    assert len({tuple(new) for new in expected}) > 70  # and the texts differ
    assert len({token for new in expected for token in new}) > 30


def test_greedy_equals_transformers_alone(model, prompts, expected):
    generator = Generator(model)
    for prompt, new in zip(prompts, expected):
        assert generator.generate([prompt], NEW) == [new]


@pytest.mark.parametrize("size", [2, 7, 100])
def test_greedy_equals_transformers_in_uneven_batches(model, prompts, expected, size):
    generator = Generator(model)
    for start in range(0, 100, size):
        assert generator.generate(prompts[start : start + size], NEW) == expected[start : start + size]


def test_stop_tokens_end_a_row_and_are_returned(model, prompts, expected):
    stops = {expected[0][2], expected[3][20]}
    cut = []
    for new in expected[:12]:
        ends = [i for i, token in enumerate(new) if token in stops]
        cut.append(new[: ends[0] + 1] if ends else new)
    assert len({len(c) for c in cut}) > 2
    heard = []
    out = Generator(model).generate(prompts[:12], NEW, stop_token_ids=stops, on_token=lambda *at: heard.append(at))
    assert out == cut
    assert sorted(heard) == sorted((row, token) for row, new in enumerate(cut) for token in new)


def test_a_large_limit_costs_no_memory(model, prompts, monkeypatch):
    """What holds an answer grows with it, and nothing else changes."""
    generator, sample = Generator(model), {"temperature": 3.0, "seed": 5}
    rows = prompts[:5]

    def answers(new):
        yield generator.generate(rows, new, **sample)
        yield generator.generate(rows, new, num_beams=3, num_return_sequences=2)
        yield generator.generate_batch(rows, new, rows=2, **sample)
        yield generator.generate_batch(rows, new, rows=2)

    expected, capacities = list(answers(NEW)), []
    if DEVICE == "cpu":  # a captured step has a cache of fixed size
        monkeypatch.setattr(t5, "_FIRST", 3)
    monkeypatch.setattr(sampling, "_BLOCK", 4)
    monkeypatch.setattr(beam_search, "_FIRST", 5)
    assert list(answers(NEW)) == expected
    monkeypatch.undo()
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


def test_sampling_of_a_row_does_not_depend_on_the_other_rows(model, prompts):
    generator = Generator(model)
    together = generator.generate(prompts[:4], 8, temperature=3.0, seed=5)
    assert generator.generate(prompts[:1], 8, temperature=3.0, seed=5) == together[:1]
    assert generator.generate(prompts[:4], 8, temperature=3.0, seed=6) != together


def test_a_hooked_or_replaced_module_is_heard(hf, model, prompts, expected):
    """The fast step calls no module. It gives way if it would skip a hook or a replacement, with the same tokens."""
    heard: list[int] = []
    other = like_hf(hf).to(DEVICE)
    assert plan_of(other) is not None
    handle = other.decoder.layers[1].feed_forward.register_forward_hook(lambda *_: heard.append(1))
    assert plan_of(other) is None
    assert Generator(other).generate(prompts[:3], NEW) == expected[:3]
    if DEVICE == "cpu":  # a replayed CUDA graph calls no Python
        assert len(heard) == NEW
    handle.remove()
    assert plan_of(other) is not None


class Replayed(GraphSteps):
    """The graph's step with its fixed shapes, run operator by operator if no GPU can capture it."""

    def _capture(self):
        self.replay = self._step
        return self


def test_the_step_of_fixed_shapes_gives_the_same_tokens(model, prompts, expected, monkeypatch):
    """Positions lie on the device, masks hide unused capacity, stopped rows run on; then further calls."""
    stop = expected[0][2]
    calls = [(prompts[:6], NEW, []), (prompts[:6], NEW, [stop]), (prompts[6:12], NEW - 3, [])]
    want = [Generator(model).generate(p, n, stop_token_ids=s) for p, n, s in calls]
    assert want[0] == expected[:6]
    kept: list[Replayed] = []

    def steps(self, arrays, max_new_tokens, sampler):
        if not kept:
            kept.append(Replayed(self.model, (6, NEW, 40), sampler))
        return kept[0]

    monkeypatch.setattr(Generator, "_steps", steps)
    generator = Generator(model)
    for (p, n, s), tokens in zip(calls, want):
        assert generator.generate(p, n, stop_token_ids=s) == tokens


@pytest.mark.gpu
def test_a_captured_graph_gives_the_same_tokens(model, prompts, expected):
    generator = Generator(model)
    for _ in range(2):  # captures, then replays from the start
        assert generator.generate(prompts[:7], NEW) == expected[:7]
    assert len(generator._graphs) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_runs(hf, prompts, dtype):
    model = like_hf(hf).to(DEVICE, dtype)
    assert Generator(model).generate(prompts[:3], 4) == [Generator(model).generate([p], 4)[0] for p in prompts[:3]]


def test_bad_input_is_refused_by_name():
    model = T5Backbone(61, 1, 2, 8, 16).to(DEVICE)
    with pytest.raises(IndexError, match=r"prompts\[0\] holds 61; it takes token ids 0 to 60"):
        Generator(model).generate([[61]], 3)
    with pytest.raises(ValueError, match=r"prompts\[1\] is empty"):
        Generator(model).generate([[1], []], 3)
    assert Generator(model).generate([], 3) == []
    assert len(Generator(model).generate([[1]], 200)[0]) == 200  # no limit on the length
