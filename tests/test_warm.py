"""Are a model's kernels compiled ahead, and do its calls find them? Triton compiles for an imaginary GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyfused
from pyfused.cli import main
from pyfused.generation import generator, warm
from pyfused.models import Backbone

PRESET = "gpt2_tiny_en"


def test_a_model_loads_what_was_compiled_ahead(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).parent / "warmed_model.py"
    done = subprocess.run([sys.executable, str(script), PRESET, "4"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    facts = json.loads(done.stdout)
    assert facts["errors"] == []
    assert facts["started while recording"] == 0
    assert facts["by another thread"] == facts["after recording"] == 1
    assert facts["launches"] == facts["told"] > 5
    # The files have the names that Triton looks for: the calls compile nothing, and a second run starts no process.
    assert facts["starts"] > 0
    assert len(facts["found"]) == facts["launches"]
    assert all(hit for _, hit in facts["found"]), facts["found"]
    assert all(facts["cached again"])
    assert facts["told again"] == 0
    assert facts["processes again"] == 0 < facts["processes by tiles and failures"]
    assert facts["tiles"] == [2, 0, []]  # both compiled, neither started
    assert facts["processes"] == [0]  # one compiled both, and ended
    assert facts["after a death"]
    cached, error = facts["broken"]
    assert error
    assert not cached


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiles for the GPU")
@pytest.mark.parametrize("preset", ["gpt2_tiny_en", "t5_tiny_en", "albert_tiny_en", "fnet_tiny_en"])
def test_on_a_cpu_the_calls_run_once(capsys, preset):
    assert main(["warm", preset, "--device", "cpu", "--lengths", "3", "9", "--json"]) == 0
    found = capsys.readouterr()
    report = json.loads(found.out)
    assert report.pop("seconds") > 0
    assert report == {"preset": preset, "device": "cpu", "compiled": 0, "cached": 0, "failed": []}
    assert found.err == "warming: nothing to compile on cpu\n"


def test_a_generator_is_warmed_when_it_is_asked_to_be(monkeypatch):
    model, seen = Backbone.from_preset(PRESET), []
    monkeypatch.setattr(generator, "make_ready", seen.append)
    pyfused.Generator(model)
    assert seen == []
    pyfused.Generator(model, warm=True)
    assert seen == [model]


def test_lengths_beyond_the_models_are_its_longest():
    model = Backbone.from_preset(PRESET)
    report = warm.warm(model, lengths=[10**6])
    assert report["compiled"] == 0


def test_a_text_of_one_token_is_enough():
    assert warm.warm(Backbone.from_preset("t5_tiny_en"), lengths=[1])["compiled"] == 0


@pytest.mark.parametrize("arguments", [["--lengths", "0"], ["--workers", "0"]])
def test_numbers_below_one_are_refused(capsys, arguments):
    assert main(["warm", PRESET, *arguments]) == 2
    assert capsys.readouterr().err == f"pyfused: {arguments[0]} is [0]; it takes numbers of at least 1\n"
