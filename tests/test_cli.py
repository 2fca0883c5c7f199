"""Does the command line do what it says, and fail in one line?"""

import importlib
import json
import subprocess
import sys

import pytest

from pyfused import dispatch, environment
from pyfused import verify as verifying
from pyfused.cli import _parser, main
from pyfused.extensions import cpu_supported

PRESET = "gpt2_tiny_en"


def call(capsys, *arguments):
    status = main(list(arguments))
    out = capsys.readouterr()
    return status, out.out, out.err


def test_env_says_what_is_missing_and_what_it_costs(capsys):
    status, out, _ = call(capsys, "env")
    assert status == 0
    for word in ("pyfused", "torch", "cpu kernels", *cpu_supported(), "backend reference", "backend cuda"):
        assert word in out
    status, out, _ = call(capsys, "env", "--json")
    facts = json.loads(out)
    assert facts["backends"]["reference"] == "available"
    assert facts["cpu"]["in_use"] in facts["cpu"]["supported"]
    assert all(cost for cost in facts["missing"].values())


def test_env_asks_for_a_compiler_only_where_an_extension_is_not_built(monkeypatch):
    reasons = {"cpu": "the extension pyfused._cpu was built from other sources", "cuda": "no CUDA device"}
    monkeypatch.setattr(dispatch, "missing", lambda name: reasons.get(name, ""))
    missing = environment.describe()["missing"]
    assert "compiler" not in missing["backend cpu"]
    assert "nvcc" not in missing["backend cuda"]
    assert "built from other sources" in environment.render({**environment.describe(), "missing": {}})
    reasons["cpu"], reasons["cuda"] = (f"the extension pyfused._{name} is not built" for name in reasons)
    missing = environment.describe()["missing"]
    assert "install with a C++ compiler" in missing["backend cpu"]
    assert "install with nvcc" in missing["backend cuda"]


@pytest.mark.parametrize("command", ["generate", "encode", "verify", "warm", "info", "convert", "download"])
def test_help_says_what_a_preset_is_and_what_each_option_does(capsys, command):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "a directory, hf://owner/repo[@revision], or kaggle://" in text
    parsers = next(a for a in _parser()._actions if isinstance(a.choices, dict))
    assert [action.dest for action in parsers.choices[command]._actions if not action.help] == []


def test_generate_streams_text_that_the_model_learned(capsys):
    status, out, err = call(capsys, "generate", PRESET, "--prompt", "And God said", "--max-new-tokens", "24")
    assert status == 0
    assert out.startswith("And God said")
    words = out.split()
    assert len(words) > 10
    assert "tokens/s" in err


def test_generate_json_and_seed(capsys):
    arguments = ["generate", PRESET, "--prompt", "The king", "--max-new-tokens", "12", "--temperature", "0.8", "--json"]
    runs = [json.loads(call(capsys, *arguments, "--seed", seed)[1]) for seed in ("1", "1", "2")]
    assert runs[0]["tokens"] == runs[1]["tokens"] != runs[2]["tokens"]
    assert len(runs[0]["tokens"]) <= 12
    assert runs[0]["tokens_per_second"] > 0


def test_generate_matches_transformers(capsys):
    import torch
    from transformers import GPT2LMHeadModel

    from pyfused import Tokenizer
    from pyfused.checkpoints import resolve_preset

    ids = Tokenizer.from_preset(PRESET).encode("In the beginning")
    model = GPT2LMHeadModel.from_pretrained(resolve_preset(PRESET)).double().eval()
    whole = model.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False)
    expected = whole[0, len(ids) :].tolist()
    best, second = model(whole).logits[0, len(ids) - 1 : -1].topk(2).values.unbind(-1)
    assert (best - second).min() > 1e-3  # a hundred times float32's noise: no rounding decides between two tokens
    _, out, _ = call(capsys, "generate", PRESET, "--prompt", "In the beginning", "--max-new-tokens", "40", "--json")
    assert json.loads(out)["tokens"] == expected


@pytest.fixture
def no_interpreter(monkeypatch):
    """Limits verify to a user's backends: in the tests Triton's interpreter and the host shim count too, and are slow."""
    module = importlib.import_module("pyfused.verify")
    native = [name for name in module.available() if name.partition(":")[0] not in ("triton", "cuda")]
    monkeypatch.setattr(module, "available", lambda device: native)


@pytest.mark.parametrize("preset", [PRESET, "t5_tiny_en", "albert_tiny_en", "fnet_tiny_en"])
def test_verify_passes_on_the_bundled_presets(capsys, no_interpreter, preset):
    status, out, _ = call(capsys, "verify", preset)
    assert status == 0
    lines = out.splitlines()
    assert lines[0].endswith("; 3 seeds")
    assert "RMS error" in lines[1]
    assert lines[2].split() == ["backend", "RMS", "error", "allowed", "ratio", "worst", "allowed", "ratio"]
    assert {line.split()[0] for line in lines[3:-1]} >= {"reference", "cpu:baseline"}
    for line in lines[3:-1]:
        _, *figures, word = line.split()
        rms, rms_allowed, rms_ratio, worst, worst_allowed, worst_ratio = map(float, figures)
        assert rms <= rms_allowed
        assert worst <= worst_allowed
        assert rms_ratio == pytest.approx(rms / rms_allowed, abs=0.01)
        assert worst_ratio == pytest.approx(worst / worst_allowed, abs=0.01)
        assert word == "PASS"
    assert lines[-1] == "PASS"


def test_verify_as_json(capsys, no_interpreter):
    status, out, _ = call(capsys, "verify", PRESET, "--json", "--dtype", "bfloat16")
    report = json.loads(out)
    assert status == 0
    assert report["passed"]
    assert report["dtype"] == "bfloat16"
    assert report["seeds"] == 3
    for row in report["backends"]:
        ratios = (row[f"{kind}_error"] / row[f"{kind}_bound"] for kind in ("rms", "worst"))
        assert row["ratio"] == max(ratios) <= 1
        assert row["output"] in ("hidden states", "logits")
    assert 0 < report["plain_rms"] < report["plain_worst"] < report["scale"]


def test_verify_fails_when_a_kernel_is_wrong(capsys, monkeypatch, no_interpreter):
    module = dispatch.kernel("cpu", "layer_norm")
    original = module.forward

    def wrong(*args):
        y, *rest = original(*args)
        return y * 1.001, *rest

    monkeypatch.setattr(module, "forward", wrong)
    monkeypatch.setattr(verifying, "available", lambda device: ["reference", "cpu:baseline"])
    dispatch.forget()
    try:
        status, out, _ = call(capsys, "verify", PRESET)
    finally:
        dispatch.forget()
    assert status == 1
    assert "FAIL" in out


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["generate", "no_such_preset", "--prompt", "x"], "no_such_preset"),
        (["generate", PRESET, "--prompt", ""], "prompt"),
        (["encode", PRESET, "--text", "x", "--output", "/nowhere/x.npy"], "there is no folder '/nowhere'"),
        (["generate", PRESET, "--prompt", "x", "--temperature", "-1"], "temperature"),
        (["generate", PRESET, "--prompt", "x", "--max-new-tokens", "100000"], "max_new_tokens"),
        (["generate", PRESET, "--prompt", "x", "--device", "tpu"], "tpu"),
        (["generate", PRESET, "--prompt", "x", "--dtype", "int8"], "int8"),
        (["verify", "/nonexistent"], "/nonexistent"),
        (["generate", "fnet_tiny_en", "--prompt", "x"], "model is an FNetBackbone; it takes a GPT2Backbone"),
    ],
)
def test_errors_are_one_line(capsys, arguments, said):
    status, out, err = call(capsys, *arguments)
    assert status == 2
    assert len(err.strip().splitlines()) == 1
    assert err.startswith("pyfused: ")
    assert said in err
    assert out == ""  # nor does the error stand behind a prompt
    assert "Traceback" not in err + out


def test_usage_errors_exit_with_2():
    out = subprocess.run([sys.executable, "-m", "pyfused", "generate", PRESET], capture_output=True, text=True)
    assert out.returncode == 2
    assert "--prompt" in out.stderr
    assert "Traceback" not in out.stderr


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    """A T5 with random weights and the tokeniser of the tests, as a Hugging Face directory."""
    import shutil
    from pathlib import Path

    from pyfused import T5Backbone

    directory = tmp_path_factory.mktemp("t5")
    T5Backbone(400, 2, 3, 24, 40, activation="gelu_new", tie_embedding_weights=False).save_to_preset(directory)
    shutil.copy(Path(__file__).parent / "golden" / "t5_tokenizer" / "spiece.model", directory)
    return str(directory)


def test_t5_answers_and_is_verified(capsys, t5, no_interpreter):
    from pyfused import Backbone, Generator, Tokenizer

    tokenizer = Tokenizer.from_preset(t5)
    prompt = tokenizer.encode("In the beginning")
    for beams in ("1", "3"):
        options = ["--prompt", "In the beginning", "--max-new-tokens", "12", "--num-beams", beams]
        status, out, _ = call(capsys, "generate", t5, *options, "--json")
        assert status == 0
        found = json.loads(out)["tokens"]
        stops = {"stop_token_ids": [tokenizer.end_token_id], "num_beams": int(beams)}
        assert [found] == Generator(Backbone.from_preset(t5)).generate([prompt], 12, **stops)
        status, out, _ = call(capsys, "generate", t5, *options)
        assert status == 0
        assert out.strip() == tokenizer.decode([t for t in found if t != tokenizer.end_token_id]).strip()
    status, out, _ = call(capsys, "verify", t5, "--json")
    assert status == 0
    assert json.loads(out)["inputs"]["decoder_token_ids"] == [2, 96]
