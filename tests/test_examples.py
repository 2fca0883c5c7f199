"""Do the training examples train, on both providers alike, and save presets that load and write?"""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

import pyfused
from pyfused.checkpoints import load_tokenizer
from pyfused.models import Backbone

ROOT = Path(__file__).resolve().parents[1]
TEXT = ROOT / "tests" / "data" / "genesis.txt"  # Genesis 1 to 4, King James Bible, as Debian's `bible` prints it
PROMPTS = {"gpt2_tiny_en": "And God", "t5_tiny_en": "And God <extra_id_0> the light"}


def losses(path):
    with path.open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@pytest.fixture(scope="module", params=PROMPTS)
def runs(request, tmp_path_factory):
    """The name of a preset, and a folder with four steps of both providers."""
    folder = tmp_path_factory.mktemp("training")
    script = ROOT / "examples" / f"train_{request.param}.py"
    for provider in ("pyfused", "torch"):
        command = [sys.executable, script, "--text", TEXT, "--provider", provider, "--steps", "4"]
        command += ["--curve", folder / f"{provider}.csv"]
        own = provider == "pyfused"
        command += ["--save", folder / "preset"] if own else ["--tokenizer", folder / "preset" / "tokenizer.json"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        assert done.returncode == 0, done.stderr
    return request.param, folder


def test_both_providers_have_the_same_curve(runs):
    _, folder = runs
    mine, theirs = losses(folder / "pyfused.csv"), losses(folder / "torch.csv")
    assert len(set(mine)) == 4  # four steps of a warm-up need not fall; the recorded curves do
    assert mine == pytest.approx(theirs, abs=1e-3)


def test_saved_preset_loads_and_writes(runs):
    name, folder = runs
    preset = str(folder / "preset")
    model = Backbone.from_preset(preset)
    assert next(model.parameters()).dtype.is_floating_point
    tokenizer = load_tokenizer(preset)
    (tokens,) = pyfused.Generator(model).generate([tokenizer.encode(PROMPTS[name])], 5)
    assert len(tokens) == 5
    assert isinstance(tokenizer.decode(tokens), str)


@pytest.mark.parametrize("name", PROMPTS)
def test_recorded_curves_fall(name):
    mine = losses(ROOT / "examples" / name / "pyfused.csv")
    assert len(mine) >= 1000
    assert sum(mine[-20:]) < 0.5 * 20 * mine[0]


def test_recorded_curves_lie_on_each_other():
    """The two runs that the repository shows: close at every step, and held-out losses that agree."""
    folder = ROOT / "examples" / "gpt2_tiny_en"
    mine, theirs = losses(folder / "pyfused.csv"), losses(folder / "torch.csv")
    assert len(mine) == len(theirs) >= 1000
    assert max(abs(a - b) for a, b in zip(mine, theirs)) < 1e-3
    assert mine[-1] < 0.5 * mine[0]
    assert (folder / "loss.png").stat().st_size > 10_000
