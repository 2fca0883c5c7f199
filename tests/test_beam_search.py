"""Does beam search return the same texts as transformers', for T5 and GPT-2?"""

import copy
from collections import Counter

import numpy as np
import pytest
import torch
from backbone_cases import hf_gpt2, hf_t5, like_hf

from pyfused import Generator
from pyfused.generation import plan_of
from pyfused.generation.beam_steps import GraphBeams
from pyfused.nn import KVCache

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEW = 12
STOPS = list(range(0, 97, 12))


@pytest.fixture(scope="module")
def pairs():
    """transformers' language models, and pyfused's with the same weights, spread so that no token takes all probability. In
    float64: among hundreds of beams some are so close that float32's rounding would choose."""
    t5 = hf_t5(spread=0.25, vocab_size=97).double()
    gpt2 = hf_gpt2(kind="GPT2LMHeadModel", spread=0.25, vocab_size=97, n_positions=64).double()
    return {"t5": (t5, like_hf(t5).to(DEVICE)), "gpt2": (gpt2, like_hf(gpt2).to(DEVICE))}


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 12, (12,), generator=generator).tolist()
    return [torch.randint(97, (n,), generator=generator).tolist() for n in lengths]


def theirs(hf, prompt, count, stops, **options):
    """The texts of transformers' generate, cut after their stop token."""
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 96, **options}
    out = hf.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=stops or None, **options)
    texts = []
    for tokens in out[:, 1 if hf.config.is_encoder_decoder else len(prompt) :].tolist():
        ends = [i for i, token in enumerate(tokens) if token in stops]
        texts.append(tokens[: ends[0] + 1] if ends else tokens[:count])
    return texts


OPTIONS = [
    {"num_beams": 2},
    {"num_beams": 4, "num_return_sequences": 4},
    {"num_beams": 3, "length_penalty": 0.0, "early_stopping": "never", "num_return_sequences": 2},
    {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True, "num_return_sequences": 3},
    {"num_beams": 4, "length_penalty": -1.0, "num_return_sequences": 2},
    {"num_beams": 5, "length_penalty": 1.5, "early_stopping": "never", "num_return_sequences": 5},
]


@pytest.mark.parametrize("name", ["t5", "gpt2"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_transformers(pairs, prompts, name, options):
    """First with stop tokens that the model likes, so texts end early at different steps; then with none, so no text ends."""
    hf, model = pairs[name]
    generator = Generator(model)
    liked = Counter(token for new in generator.generate(prompts, NEW) for token in set(new[3:]))
    lengths = set()
    for stops in ([token for token, _ in liked.most_common(12)], []):
        want = [theirs(hf, prompt, NEW, stops, **options) for prompt in prompts]
        flat = [text for texts in want for text in texts]
        assert generator.generate(prompts, NEW, stop_token_ids=stops, **options) == flat
        assert generator.generate(prompts[:1], NEW, stop_token_ids=stops, **options) == want[0]
        lengths |= {len(text) for text in flat}
    assert len(lengths) > 1 or options["length_penalty"] > 1.0


def test_beams_find_likelier_texts_than_the_greedy_one(pairs, prompts):
    _, model = pairs["gpt2"]

    @torch.no_grad()
    def score(prompt, new):
        hidden = model(token_ids=torch.tensor([prompt + new]), padding_mask=None)
        scores = model.logits(hidden)[0, len(prompt) - 1 : -1].log_softmax(-1)
        return scores[torch.arange(len(new)), torch.tensor(new)].sum().item()

    generator = Generator(model)
    greedy, beams = generator.generate(prompts, NEW), generator.generate(prompts, NEW, num_beams=6)
    gains = [score(p, b) - score(p, g) for p, b, g in zip(prompts, beams, greedy)]
    assert np.mean(gains) > 0.1
    assert greedy != beams


class Replayed(GraphBeams):
    """The graph's step with its fixed shapes, run operator by operator if no GPU can capture it."""

    def _capture(self):
        self.replay = self._step
        return self


@pytest.mark.parametrize("name", ["t5", "gpt2"])
def test_the_step_of_fixed_shapes_gives_the_same_texts(pairs, prompts, name, monkeypatch):
    """Positions lie on the device, all places are reordered, ended texts run on; then further searches with the same step."""
    _, model = pairs[name]
    long = [prompt * 8 for prompt in prompts[:4]] if name == "gpt2" else prompts[:4]
    long = [prompt[:50] for prompt in long]
    options = {"num_beams": 3, "num_return_sequences": 3}
    liked = Counter(token for new in Generator(model).generate(prompts, NEW) for token in set(new[3:]))
    stops = [token for token, _ in liked.most_common(12)]
    calls = [(prompts[:4], NEW, stops), (prompts[4:8], NEW, []), (prompts[:4], NEW - 3, stops[:4]), (long, NEW, stops)]
    want = [Generator(model).generate(p, n, stop_token_ids=s, **options) for p, n, s in calls]
    kept = {}

    def beams(self, arrays, max_new_tokens, beams, width):
        shape, shared = self._decoding.shape(arrays, max_new_tokens), self._decoding.shared(arrays)
        made = Replayed(self.model, shape, shared, beams, width)
        return kept.setdefault(made.made_for, made)

    monkeypatch.setattr(Generator, "_beams", beams)
    generator = Generator(model)
    for (p, n, s), texts in zip(calls, want):
        assert generator.generate(p, n, stop_token_ids=s, **options) == texts
    assert len({len(text) for text in want[0]}) > 1


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["t5", "gpt2"])
def test_a_captured_graph_gives_the_same_texts(pairs, prompts, name):
    _, model = pairs[name]
    options = {"num_beams": 3, "num_return_sequences": 3, "stop_token_ids": STOPS}
    want = Generator(copy.deepcopy(model).cpu()).generate(prompts[:4], NEW, **options)
    generator = Generator(model)
    for _ in range(2):  # captures, then replays from the start
        assert generator.generate(prompts[:4], NEW, **options) == want
    assert len(generator._graphs) == 1


def test_modules_with_hooks_give_the_same(pairs, prompts):
    _, model = pairs["t5"]
    options = {"num_beams": 3, "num_return_sequences": 2, "stop_token_ids": STOPS}
    want = Generator(model).generate(prompts, NEW, **options)
    handle = model.decoder.layers[0].register_forward_hook(lambda *_: None)
    try:
        assert plan_of(model) is None
        assert Generator(model).generate(prompts, NEW, **options) == want
    finally:
        handle.remove()


def test_only_what_differs_is_copied(pairs, prompts, monkeypatch):
    """Reordering starts at the first token that differs, never in the prompt, and equals a full copy."""
    _, model = pairs["gpt2"]
    starts, lengths = [], []
    reorder = KVCache.reorder

    def heard(self, rows, first):
        starts.append(first)
        lengths.append(self.length)
        reorder(self, rows, first)

    options = {"num_beams": 4, "num_return_sequences": 4}
    prompt = prompts[max(range(12), key=lambda i: len(prompts[i]))]
    monkeypatch.setattr(KVCache, "reorder", heard)
    out = Generator(model).generate([prompt], NEW, **options)
    assert starts
    assert all(first >= len(prompt) for first in starts)
    assert max(first - len(prompt) for first in starts) > 0
    monkeypatch.setattr(KVCache, "reorder", lambda self, rows, first: reorder(self, rows, 0))
    assert Generator(model).generate([prompt], NEW, **options) == out


def test_reorder_lets_rows_change_places():
    cache = KVCache(2, 4, 3, 8, 5, dtype=torch.float32, device="cpu")
    for layer in range(2):
        cache.append(layer, torch.randn(4, 6, 2, 3, 5))
    cache.length = 6
    keys, values = ([f(layer).clone() for layer in range(2)] for f in (cache.keys, cache.values))
    cache.reorder([1, 0, 2, 0], 2)
    for layer in range(2):
        for now, was in ((cache.keys(layer), keys[layer]), (cache.values(layer), values[layer])):
            assert torch.equal(now[:, :, :2], was[:, :, :2])
            assert torch.equal(now[:, :, 2:], was[[1, 0, 2, 0], :, 2:])


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"num_beams": 0}, ValueError, "num_beams is 0"),
        ({"num_beams": 2.0}, TypeError, "num_beams is 2.0"),
        ({"num_return_sequences": 3}, ValueError, "num_return_sequences is 3; it takes at most num_beams = 2"),
        ({"num_return_sequences": 0}, ValueError, "num_return_sequences is 0"),
        ({"length_penalty": "long"}, TypeError, "length_penalty is 'long'"),
        ({"length_penalty": float("inf")}, ValueError, "length_penalty is inf"),
        ({"early_stopping": "always"}, ValueError, "early_stopping is 'always'"),
        ({"num_beams": 1, "length_penalty": 2.0}, ValueError, "length_penalty and early_stopping are for beams"),
        ({"num_beams": 1, "num_return_sequences": 2}, ValueError, "at most num_beams = 1"),
        ({"temperature": 1.0}, ValueError, "temperature is 1.0 and num_beams 2"),
        ({"on_token": print}, ValueError, "on_token is given and num_beams is 2"),
        ({"stop_token_ids": range(97)}, ValueError, "stop_token_ids has 97 tokens of 97"),
    ],
)
def test_bad_options_are_refused_by_name(pairs, change, error, message):
    with pytest.raises(error, match=message):
        Generator(pairs["t5"][1]).generate([[1, 2]], 3, **{"num_beams": 2, **change})


def test_no_prompts_no_texts(pairs):
    assert Generator(pairs["t5"][1]).generate([], 3, num_beams=2) == []
