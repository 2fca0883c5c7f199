"""Does generate_batch answer each prompt as generate does alone, while it keeps its rows busy?"""

import pytest
import torch
from backbone_cases import hf_gpt2, hf_t5, like_hf

from pyfused import Generator
from pyfused.generation.decoder import Decoder
from pyfused.generation.gpt2 import GPT2Decoding
from pyfused.generation.t5 import T5Decoding
from pyfused.testing import running

NEW = 9


@pytest.fixture(scope="module", params=["gpt2", "t5"])
def model(request):
    """Weights so large that logits are far apart; rounding changes no token."""
    torch.manual_seed(5)
    if request.param == "gpt2":
        return like_hf(hf_gpt2(spread=0.5, vocab_size=97, n_positions=64))
    return like_hf(hf_t5(spread=0.5))


@pytest.fixture(scope="module")
def prompts(model):
    generator = torch.Generator().manual_seed(3)
    vocabulary = model.get_config()["vocabulary_size"]
    lengths = [1, 7, 2, 12, 5, 1, 9, 3, 3, 11, 4, 8, 6]
    return [torch.randint(0, vocabulary, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture(scope="module")
def alone(model, prompts):
    return [Generator(model).generate([prompt], NEW)[0] for prompt in prompts]


@pytest.mark.parametrize("rows", [1, 2, 4, 13, 50])
def test_tokens_are_those_of_each_prompt_alone(model, prompts, alone, rows):
    assert Generator(model).generate_batch(prompts, NEW, rows) == alone


def test_rows_that_stop_take_the_next_prompt(model, prompts, alone, monkeypatch):
    """Counts the rows of each step: all stay busy while prompts wait."""
    stops = {alone[i][i % 5 + 2] for i in range(5)}
    generator = Generator(model)
    expected = [generator.generate([prompt], NEW, stop_token_ids=stops)[0] for prompt in prompts]
    assert len({len(answer) for answer in expected}) > 2
    kind = GPT2Decoding if type(model).__name__ == "GPT2Backbone" else T5Decoding
    rows, step = [], kind.step

    def counting(self, tokens, choose=False):
        rows.append(len(tokens))
        return step(self, tokens, choose)

    monkeypatch.setattr(kind, "step", counting)
    heard = []
    found = generator.generate_batch(prompts, NEW, 4, stop_token_ids=stops, on_token=lambda *at: heard.append(at))
    assert found == expected
    assert sum(rows) == sum(map(len, expected))
    assert rows == sorted(rows, reverse=True)
    assert sorted(heard) == sorted((row, token) for row, answer in enumerate(expected) for token in answer)


def test_sampled_tokens_depend_on_seed_and_prompt_alone(model, prompts):
    generator, options = Generator(model), {"temperature": 2.0, "top_k": 20, "seed": 4}
    assert generator.generate_batch(prompts, NEW, 3, **options) == generator.generate(prompts, NEW, **options)
    assert generator.generate_batch(prompts, NEW, 3, **options | {"seed": 5}) != generator.generate(
        prompts, NEW, **options
    )


@pytest.mark.parametrize("how", ["modules", "reference"])
def test_without_a_kernel(model, prompts, alone, how, monkeypatch):
    monkeypatch.setattr(Decoder, "of", lambda *_: None)
    if how == "modules":
        assert Generator(model).generate_batch(prompts, NEW, 5) == alone
    else:
        with running("reference"):
            assert Generator(model).generate_batch(prompts, NEW, 5) == alone


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"rows": 0}, ValueError, "rows is 0; it takes at least 1"),
        ({"rows": True}, TypeError, "rows is True; it takes an int"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens is 0"),
        ({"on_token": 3}, TypeError, "on_token is an int"),
        ({"prompts": [[1], []]}, ValueError, r"prompts\[1\] is empty"),
    ],
)
def test_bad_input_is_refused_by_name(model, options, error, message):
    with pytest.raises(error, match=message):
        Generator(model).generate_batch(**{"prompts": [[1, 2]], "max_new_tokens": 3} | options)


def test_no_prompts(model):
    assert Generator(model).generate_batch([], 3) == []
