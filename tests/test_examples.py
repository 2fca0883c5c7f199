"""Does the training example train, on both providers alike, and save a preset that loads and writes?"""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

import pyfused
from pyfused.checkpoints import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "examples" / "train_gpt2_tiny_en.py"
TEXT = ROOT / "tests" / "data" / "genesis.txt"  # Genesis 1 to 4, King James Bible, as Debian's `bible` prints it


def losses(path):
    with path.open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    for provider in ("pyfused", "torch"):
        command = [sys.executable, SCRIPT, "--text", TEXT, "--provider", provider, "--steps", "4"]
        command += ["--curve", folder / f"{provider}.csv"]
        command += ["--save", folder / "preset"] if provider == "pyfused" else []
        subprocess.run(command, check=True, capture_output=True, cwd=folder)
    return folder


def test_both_providers_have_the_same_curve(runs):
    mine, theirs = losses(runs / "pyfused.csv"), losses(runs / "torch.csv")
    assert len(mine) == 4
    assert mine[-1] < mine[0]
    assert mine == pytest.approx(theirs, abs=1e-4)


def test_saved_preset_loads_and_writes(runs):
    preset = str(runs / "preset")
    model = pyfused.GPT2Backbone.from_preset(preset)
    assert next(model.parameters()).dtype.is_floating_point
    tokenizer = load_tokenizer(preset)
    (tokens,) = pyfused.Generator(model).generate([tokenizer.encode("And God")], 5)
    assert len(tokens) == 5
    assert isinstance(tokenizer.decode(tokens), str)


def test_recorded_curves_lie_on_each_other():
    """The two runs that the repository shows: close at every step, and held-out losses that agree."""
    folder = ROOT / "examples" / "gpt2_tiny_en"
    mine, theirs = losses(folder / "pyfused.csv"), losses(folder / "torch.csv")
    assert len(mine) == len(theirs) >= 1000
    assert max(abs(a - b) for a, b in zip(mine, theirs)) < 1e-3
    assert mine[-1] < 0.5 * mine[0]
    assert (folder / "loss.png").stat().st_size > 10_000
