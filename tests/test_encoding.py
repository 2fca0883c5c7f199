"""Does encoding give each text the model's hidden states, whatever else is in the batch?"""

import copy
import json

import draws
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import pyfused
from pyfused import Tokenizer
from pyfused.cli import main
from pyfused.testing import running

PRESETS = ["gpt2_tiny_en", "t5_tiny_en", "albert_tiny_en", "fnet_tiny_en"]
LINES = ["And God said, Let there be light: and there was light.", "Jesus wept.", "The LORD is my shepherd;", "Amen."]


def prepared(preset):
    tokenizer = Tokenizer.from_preset(preset)
    return pyfused.Backbone.from_preset(preset), [tokenizer.encode(line) for line in LINES]


def alone(model, text):
    """(S, D): the model's own call on this text alone."""
    ids = torch.tensor([text])
    with torch.no_grad():
        if isinstance(model, pyfused.T5Backbone):
            return model.encode(encoder_token_ids=ids, encoder_padding_mask=None)[0]
        if isinstance(model, pyfused.GPT2Backbone):
            return model(token_ids=ids, padding_mask=None)[0]
        return model(token_ids=ids, segment_ids=None, padding_mask=None)["sequence_output"][0]


def check(model, encoded, expected):
    """Judges encoded(texts) by the tolerance rule. Plain and truth are expected(states) of each text alone, on the reference
    operators in the model's dtype and in float64."""
    wide = copy.deepcopy(model).double().eval()

    def once():
        texts = [torch.randint(5, model.get_config()["vocabulary_size"], (n,)).tolist() for n in (13, 4, 6, 4, 9)]
        found = encoded(texts)
        with running("reference", strict=False):
            plain, truth = ([expected(alone(m, text)) for text in texts] for m in (model, wide))
        return {"states": [torch.cat([t.reshape(-1, t.shape[-1]) for t in each]) for each in (found, plain, truth)]}

    draws.check(once)


@pytest.mark.parametrize("batch_size", [1, 3, 32])
@pytest.mark.parametrize("preset", PRESETS)
def test_each_text_is_as_if_alone(preset, batch_size):
    model = pyfused.Backbone.from_preset(preset)

    def encoded(texts):
        model.train()
        found = pyfused.encode(model, texts, batch_size=batch_size)
        assert (model.training, model.skip_padding) == (True, False)
        model.eval()
        assert [len(states) for states in found] == [len(text) for text in texts]
        assert not any(states.requires_grad for states in found)
        assert all(states._base is None for states in found)
        return found

    check(model, encoded, lambda states: states)


@pytest.mark.parametrize("preset", PRESETS)
def test_pooled(preset):
    model, texts = prepared(preset)
    model.eval()
    check(model, lambda given: pyfused.encode(model, given, pool="mean"), lambda states: states.mean(0))
    if model.begins_with_cls:
        check(model, lambda given: pyfused.encode(model, given, pool="cls"), lambda states: states[0])
    else:
        with pytest.raises(ValueError, match=r"pool is 'cls', but the texts of a \w+ do not begin"):
            pyfused.encode(model, texts, pool="cls")


def test_no_texts():
    model, _ = prepared("gpt2_tiny_en")
    assert pyfused.encode(model, []) == []
    assert pyfused.encode(model, [], pool="mean").shape == (0, 160)


def test_bfloat16_means_are_of_float32_sums():
    model, texts = prepared("gpt2_tiny_en")
    model = model.bfloat16()
    found, states = pyfused.encode(model, texts, pool="mean"), pyfused.encode(model, texts)
    assert torch.equal(found[0], states[0].float().mean(0).bfloat16())


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"model": torch.nn.Linear(1, 1)}, TypeError, "model is a Linear; it takes a backbone"),
        ({"texts": "words"}, TypeError, "texts is a str"),
        ({"texts": [[1], []]}, ValueError, r"texts\[1\] is empty"),
        ({"texts": [[10**6]]}, IndexError, r"texts\[0\] holds 1000000"),
        ({"texts": [[1], [1] * 2000]}, ValueError, r"texts\[1\] has 2000 tokens; it takes at most max_sequence_length"),
        ({"pool": "max"}, ValueError, "pool is 'max'; it takes None, 'cls' or 'mean'"),
        ({"batch_size": 0}, ValueError, "batch_size is 0"),
        ({"batch_size": 2.0}, TypeError, "batch_size is 2.0"),
    ],
)
def test_bad_input_names_the_argument(change, error, message):
    model = pyfused.Backbone.from_preset("gpt2_tiny_en", load_weights=False)
    with pytest.raises(error, match=message):
        pyfused.encode(**({"model": model, "texts": [[1]]} | change))


def run(capsys, *arguments):
    status = main(["encode", *arguments])
    out = capsys.readouterr()
    return status, out.out, out.err


@pytest.mark.parametrize("preset", PRESETS)
def test_command_saves_and_prints(preset, capsys, tmp_path):
    model, texts = prepared(preset)
    lines = [argument for line in LINES for argument in ("--text", line)]
    file = str(tmp_path / "states.npy")
    status, out, _ = run(capsys, preset, *lines, "--output", file)
    saved, longest = np.load(file), max(map(len, texts))
    assert status == 0
    assert saved.shape == (4, longest, model.get_config()["hidden_dim"])
    assert out == f"{file}: {' x '.join(map(str, saved.shape))}\n"
    for row, states in zip(saved, pyfused.encode(model, texts)):
        np.testing.assert_array_equal(row, F.pad(states, (0, 0, 0, longest - len(states))).numpy())
    status, out, _ = run(capsys, preset, *lines, "--pool", "mean", "--json")
    report = json.loads(out)
    expected = pyfused.encode(model, texts, pool="mean")
    assert [row["text"] for row in report["texts"]] == LINES
    np.testing.assert_array_equal(np.float32([row["states"] for row in report["texts"]]), expected.numpy())
    status, out, _ = run(capsys, preset, "--text", LINES[1], "--pool", "mean")
    assert status == 0
    assert out.startswith(LINES[1])


def test_command_fails_in_one_line(capsys):
    for arguments, message in (
        (["gpt2_tiny_en", "--text", "a", "--pool", "cls"], "pool is 'cls', but the texts of a GPT2Backbone do not begin"),
        (
            ["gpt2_tiny_en", "--text", "a", "--output", "a.txt"],
            "--output is 'a.txt'; it takes a name that ends in .npy",
        ),
        (["gpt2_tiny_en", "--text", ""], "texts[0] is empty"),
    ):
        status, _, err = run(capsys, *arguments)
        assert status == 2
        assert message in err
        assert err.count("\n") == 1
