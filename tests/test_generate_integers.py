"""Does generation with integer weights give their tokens, leave the model alone, and run as one operator?"""

import copy

import pytest
import torch
from backbone_cases import hf_gpt2, hf_t5, like_hf

import pyfused
from pyfused import Generator, cli, dispatch
from pyfused.generation.decoder import Decoder
from pyfused.weight_format import FORMATS, format_of

NEW = 8
T5 = {"spread": 0.5, "d_model": 32, "d_kv": 16, "d_ff": 64}  # multiples of 32, as int4 wants
GPT2 = {"kind": "GPT2LMHeadModel", "spread": 0.5, "vocab_size": 97, "n_positions": 64, "n_embd": 32, "n_inner": 64}
MODELS = {
    "gpt2, tied": lambda: like_hf(hf_gpt2(**GPT2)),
    "gpt2, untied": lambda: like_hf(hf_gpt2(**GPT2, tie_word_embeddings=False)),
    "t5, tied": lambda: like_hf(hf_t5(**T5, feed_forward_proj="relu", seed=2)),
    "t5, untied": lambda: like_hf(hf_t5(**T5, tie_word_embeddings=False, seed=1)),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MODELS[request.param]()


@pytest.fixture(scope="module", params=FORMATS)
def weights(request):
    return request.param


@pytest.fixture(scope="module")
def prompts(model):
    generator = torch.Generator().manual_seed(3)
    vocabulary = model.get_config()["vocabulary_size"]
    return [torch.randint(0, vocabulary, (n,), generator=generator).tolist() for n in (3, 8, 5, 1, 9, 2)]


@pytest.fixture(scope="module")
def plain(model, weights):
    """A Generator of the dequantised weights."""
    other = copy.deepcopy(model)
    pyfused.quantize_(other, weights)
    pyfused.unquantize_(other)
    return Generator(other)


@pytest.fixture(scope="module")
def expected(plain, prompts):
    return plain.generate(prompts, NEW)


def test_tokens_are_those_of_the_dequantised_weights(model, weights, prompts, plain, expected):
    """One by one, in a batch and in a beam."""
    before = {name: t.clone() for name, t in model.state_dict().items()}
    generator = Generator(model, weights=weights)
    assert generator.generate(prompts, NEW) == expected
    assert generator.generate_batch(prompts, NEW, 4) == expected
    assert generator.generate(prompts, 6, num_beams=2) == plain.generate(prompts, 6, num_beams=2)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    other = copy.deepcopy(model)
    pyfused.quantize_(other, weights)
    assert Generator(other).generate(prompts, NEW) == expected


def test_a_step_is_one_operator(model, weights, prompts, monkeypatch):
    """Token tables and heads are int8 beside int4 layers."""
    if not dispatch.missing("cpu"):
        plans, call = [], Decoder.__call__

        def counting(self, tokens, choose):
            found = call(self, tokens, choose)
            plans.append((self._plan, found is not None))
            return found

        monkeypatch.setattr(Decoder, "__call__", counting)
        Generator(model, weights=weights).generate(prompts[:2], 4)
        assert plans
        for plan, ran in plans:
            assert ran
            assert format_of(plan.layers[0].inner.scale).name == weights
            assert {m.scale is None or format_of(m.scale).name for m in plan.matrices()} == {"int8", weights}


def test_the_copy_is_its_own(model, weights, prompts, expected):
    other = copy.deepcopy(model)
    generator = Generator(other, weights=weights)
    made = generator.model
    assert not {p.data_ptr() for p in made.parameters()} & {p.data_ptr() for p in other.parameters()}
    other.to(torch.bfloat16)
    assert generator.generate(prompts, NEW) == expected
    read = sum(t.numel() * t.element_size() for t in made.buffers())
    assert read < 0.5 * sum(
        p.numel() * p.element_size() for p in model.parameters()
    )  # scales count in so small a model


def test_unknown_weights_are_refused(model):
    with pytest.raises(ValueError, match="weights is 'int3'; it takes 'int8', 'int4' or None"):
        Generator(model, weights="int3")
    with pytest.raises(ValueError, match=r"weights is \['int4'\]; it takes"):
        Generator(model, weights=["int4"])


@pytest.mark.parametrize("has, asked", [("int8", "int4"), ("int4", "int8")])
def test_integers_of_the_other_format_are_refused(has, asked, tmp_path, capsys):
    """They would stay as they are, and nobody would hear of it."""
    model = pyfused.GPT2Backbone.from_preset("gpt2_tiny_en")
    pyfused.quantize_(model, has)
    Generator(model, weights=has)
    message = f"is {asked!r}, and the model has {has} weights already"
    with pytest.raises(ValueError, match=f"weights {message}"):
        Generator(model, weights=asked)
    model.save_to_preset(tmp_path)
    command = ["encode", str(tmp_path), "--text", "In", "--json", "--quiet", "--weights"]
    assert cli.main([*command, asked]) == 2
    assert f"--weights {message}" in capsys.readouterr().err
    assert cli.main([*command, has]) == 0


@pytest.mark.parametrize(
    "command", [["generate", "--prompt", "In", "--max-new-tokens", "9"], ["encode", "--text", "In"]]
)
def test_on_the_command_line(command, capsys):
    options = [command[0], "gpt2_tiny_en", *command[1:], "--json"]
    assert cli.main(options) == 0
    plain = capsys.readouterr().out
    for weights in ("int8", "int4"):
        assert cli.main([*options, "--weights", weights]) == 0
        assert capsys.readouterr().out != plain
