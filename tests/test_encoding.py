"""Are encoded texts the model's hidden states, text by text, whatever else is in the batch?"""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import pyfused
from pyfused.checkpoints import load_tokenizer
from pyfused.cli import main

PRESETS = ["gpt2_tiny_en", "t5_tiny_en", "albert_tiny_en", "fnet_tiny_en"]
LINES = ["And God said, Let there be light: and there was light.", "Jesus wept.", "The LORD is my shepherd;", "Amen."]


def prepared(preset):
    tokenizer = load_tokenizer(preset)
    return pyfused.Backbone.from_preset(preset), [tokenizer.encode(line) for line in LINES]


def alone(model, text):
    """(S, D): the text as the only one, by the model's own call."""
    ids = torch.tensor([text])
    with torch.no_grad():
        if isinstance(model, pyfused.T5Backbone):
            return model.encode(encoder_token_ids=ids, encoder_padding_mask=None)[0]
        if isinstance(model, pyfused.GPT2Backbone):
            return model(token_ids=ids, padding_mask=None)[0]
        return model(token_ids=ids, segment_ids=None, padding_mask=None)["sequence_output"][0]


@pytest.mark.parametrize("batch_size", [1, 3, 32])
@pytest.mark.parametrize("preset", PRESETS)
def test_each_text_is_as_if_alone(preset, batch_size):
    model, texts = prepared(preset)
    model.train()
    found = pyfused.encode(model, texts, batch_size=batch_size)
    assert (model.training, model.skip_padding) == (True, False)
    model.eval()
    assert len({len(text) for text in texts}) > 1
    for states, text in zip(found, texts, strict=True):
        torch.testing.assert_close(states, alone(model, text), rtol=1e-4, atol=1e-4)
        assert not states.requires_grad
        assert states._base is None


@pytest.mark.parametrize("preset", PRESETS)
def test_pooled(preset):
    model, texts = prepared(preset)
    found = pyfused.encode(model, texts, pool="mean")
    expected = torch.stack([alone(model, text).mean(0) for text in texts])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    if model.begins_with_cls:
        expected = torch.stack([alone(model, text)[0] for text in texts])
        torch.testing.assert_close(pyfused.encode(model, texts, pool="cls"), expected, rtol=1e-4, atol=1e-4)
    else:
        with pytest.raises(ValueError, match=r"pool is 'cls', and a \w+ has no token"):
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
        (["gpt2_tiny_en", "--text", "a", "--pool", "cls"], "pool is 'cls', and a GPT2Backbone has no token"),
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
