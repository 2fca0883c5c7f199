"""Do the training examples train alike on both providers and save presets that load and generate?"""

import contextlib
import csv
import importlib
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyfused
from pyfused import Tokenizer
from pyfused.models import Backbone
from pyfused.verify import verify

ROOT = Path(__file__).resolve().parents[1]
TEXT = ROOT / "tests" / "data" / "genesis.txt"  # Genesis 1 to 4, King James Bible, as Debian's `bible` prints it
PROMPTS = {"gpt2_tiny_en": "And God", "t5_tiny_en": "And God <extra_id_0> the light"}
ENCODERS = ("albert_tiny_en", "fnet_tiny_en")


def losses(path):
    with path.open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@pytest.fixture(scope="module", params=[*PROMPTS, *ENCODERS])
def runs(request, tmp_path_factory):
    """A preset's name, and a folder with four steps of both providers. Batches are small: two rows."""
    folder, said = tmp_path_factory.mktemp("training"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.syspath_prepend(ROOT / "examples")
        script = importlib.import_module(f"train_{request.param}")
        patch.setattr(script, *(("TOKENS", 128) if request.param == "fnet_tiny_en" else ("BATCH", 2)))
        for provider in ("pyfused", "torch"):
            arguments = ["--text", TEXT, "--provider", provider, "--steps", "4", "--curve", folder / f"{provider}.csv"]
            own = provider == "pyfused"
            arguments += ["--save", folder / "preset"] if own else ["--tokenizer", folder / "preset" / "tokenizer.json"]
            patch.setattr(sys, "argv", [script.__file__, *map(str, arguments)])
            script.main()
    assert said.getvalue().count("by frequency alone: loss") == (2 if request.param in ENCODERS else 0)
    return request.param, folder


def test_a_script_runs_by_itself():
    """As a user starts it; without a text it says so."""
    command = [sys.executable, ROOT / "examples" / "train_gpt2_tiny_en.py"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.endswith("error: --text is needed\n")


def test_both_providers_have_the_same_curve(runs):
    """T5's curves agree only before the first update: Adafactor scales whole matrices, and pyfused has one for Q, K and V."""
    name, folder = runs
    mine, theirs = losses(folder / "pyfused.csv"), losses(folder / "torch.csv")
    assert len(set(mine)) == 4  # the loss need not fall in four warm-up steps; the recorded curves fall
    same = 1 if name == "t5_tiny_en" else 4
    assert mine[:same] == pytest.approx(theirs[:same], abs=1e-4)


def test_saved_preset_loads_and_writes(runs):
    name, folder = runs
    preset = str(folder / "preset")
    model = Backbone.from_preset(preset)
    assert next(model.parameters()).dtype.is_floating_point
    tokenizer = Tokenizer.from_preset(preset)
    if name in ENCODERS:
        inputs = tokenizer("And God said", pair="Let there be light")
        assert inputs["segment_ids"].max() == 1
        with torch.no_grad():
            out = model(inputs)["sequence_output"]
        assert out.shape == (*inputs["token_ids"].shape, model.get_config()["hidden_dim"])
        assert torch.isfinite(out).all()
        assert tokenizer.encode("[MASK]") == [2, 4, 3]
        return
    (tokens,) = pyfused.Generator(model).generate([tokenizer.encode(PROMPTS[name])], 5)
    assert len(tokens) == 5
    assert isinstance(tokenizer.decode(tokens), str)


@pytest.mark.parametrize("name", [*PROMPTS, *ENCODERS])
def test_recorded_curves_fall(name):
    """Masked-token losses must fall well below the loss of guessing by frequency. That is three quarters of FNet's first loss;
    ALBERT starts at it."""
    mine = losses(ROOT / "examples" / name / "pyfused.csv")
    assert len(mine) >= 1000
    assert sum(mine[-20:]) < {"albert_tiny_en": 0.7, "fnet_tiny_en": 0.6}.get(name, 0.5) * 20 * mine[0]


@pytest.mark.parametrize("name", ENCODERS)
def test_bundled_encoders_are_verified(name, monkeypatch):
    """One seed, for the interpreter and the host shim are among the backends; test_cli.py runs three on the CPU's."""
    monkeypatch.setitem(verify.__globals__, "SEEDS", 1)
    report = verify(name)
    assert report["passed"]
    assert {"token_ids", "segment_ids"} <= report["inputs"].keys()


def test_masked_batches(monkeypatch):
    """15% of each window's tokens are chosen; of these 80% are masked, 10% random, 10% unchanged; [CLS] and [SEP] stay."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    masked = importlib.import_module("masked_tokens")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 500, (5000,), generator=generator)
    tokens[::50] = masked.SEP
    whole = masked.draw(tokens, 500, 400, 64, generator)
    assert whole.ids.shape == (400, 64)
    assert whole.places.shape == whole.targets.shape == (400, 10)
    assert (whole.ids[:, 0] == masked.CLS).all()
    assert (whole.ids[:, -1] == masked.SEP).all()
    assert whole.targets.min() >= 5
    assert (whole.places[:, 1:] > whole.places[:, :-1]).all()
    now = whole.ids.gather(1, whole.places)
    kept, hidden = (now == whole.targets).double().mean().item(), (now == masked.MASK).double().mean().item()
    assert abs(hidden - 0.8) < 0.03
    assert abs(kept - 0.1) < 0.02
    restored = whole.ids.scatter(1, whole.places, whole.targets)[:, 1:-1]
    windows = tokens.unfold(0, 62, 1)
    assert all((windows == row).all(1).any() for row in restored[:20])
    states = torch.randn(400, 64, 3, generator=generator)
    assert torch.equal(whole.chosen(states)[7, 4], states[7, whole.places[7, 4]])
    # A perfect answer has loss 0; uniform logits have the logarithm of the vocabulary size.
    sure = torch.nn.functional.one_hot(whole.targets, 500) * 100.0
    assert masked.loss_of(sure, whole) < 1e-6
    said = masked.evaluate(lambda batch: torch.zeros(*batch.places.shape, 500), tokens, tokens, 500, 4, 64)
    assert said.startswith("held out: loss 6.215, accuracy")


def test_recorded_curves_lie_on_each_other():
    """The two runs in the repository are close at every step, and their held-out losses agree."""
    folder = ROOT / "examples" / "gpt2_tiny_en"
    mine, theirs = losses(folder / "pyfused.csv"), losses(folder / "torch.csv")
    assert len(mine) == len(theirs) >= 1000
    assert max(abs(a - b) for a, b in zip(mine, theirs)) < 1e-3
    assert mine[-1] < 0.5 * mine[0]
    assert (folder / "loss.png").stat().st_size > 10_000
