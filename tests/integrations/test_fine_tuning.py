"""Does fine-tuning a fused transformers model follow the unfused model's loss curve?

30 steps of AdamW from each bundled preset on the book of Genesis. By the tolerance rule, the fused curve in float32 is at most
twice as far from the unfused float64 curve as the unfused float32 curve is. The float64 curve takes long and never changes:
tests/data/fine_tuning.json holds 200 steps of it, and running this file writes it anew.
"""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch import nn

import pyfused
from pyfused.testing.tolerance import assert_close

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
TRUTH = ROOT / "tests" / "data" / "fine_tuning.json"
STEPS, STORED, BATCH, LENGTH = 30, 200, 2, 24
CLASSES = {
    "gpt2_tiny_en": ("GPT2LMHeadModel", "GPT2LMHeadModel"),
    "t5_tiny_en": ("T5ForConditionalGeneration", "T5ForConditionalGeneration"),
    "albert_tiny_en": ("AlbertForMaskedLM", "AlbertModel"),
    "fnet_tiny_en": ("FNetForMaskedLM", "FNetModel"),
}  # the trained class, and the preset's class


def model_of(preset):
    """A model with the preset's weights; a masked language model's head is missing there, so it is random."""
    trained, held = (getattr(transformers, name) for name in CLASSES[preset])
    weights = held.from_pretrained(ROOT / "pyfused" / "presets" / preset)
    torch.manual_seed(0)
    model = trained(weights.config)
    inner = model if trained is held else model.base_model
    report = inner.load_state_dict(weights.state_dict(), strict=False)
    assert not report.missing_keys
    assert all(name.startswith("pooler.") for name in report.unexpected_keys)
    return model


def fused_of(preset):
    model = model_of(preset)
    assert pyfused.fuse_(model).replaced
    return model


def batches(preset):
    """Windows of the text in one random order, the same for every run."""
    text = (ROOT / "tests" / "data" / "genesis.txt").read_text()
    tokenizer = Tokenizer.from_file(str(ROOT / "pyfused" / "presets" / preset / "tokenizer.json"))
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(STORED):
        starts = torch.randint(0, len(ids) - LENGTH, (BATCH,), generator=generator).tolist()
        window = torch.stack([ids[start : start + LENGTH] for start in starts])
        if preset == "gpt2_tiny_en":
            made.append({"input_ids": window, "labels": window})
        elif preset == "t5_tiny_en":
            source, target = window.split(LENGTH // 2, dim=1)
            made.append({"input_ids": source, "labels": target.contiguous()})
        else:
            hidden = torch.rand(window.shape, generator=generator) < 0.15
            hidden[:, 0] = True
            made.append({"input_ids": window.masked_fill(hidden, 4), "labels": window.masked_fill(~hidden, -100)})
    return made


def curve(model, preset, steps=STEPS):
    """The loss of each step. A gradient whose true value is 0 is noise; AdamW without eps would scale it to 1."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, eps=1e-6, fused=True)
    losses = []
    for batch in batches(preset)[:steps]:
        loss = model.train()(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach().double())
    return torch.stack(losses)


@pytest.mark.parametrize("preset", CLASSES)
def test_fused_follows_unfused(preset):
    truth = torch.tensor(json.loads(TRUTH.read_text())[preset][:STEPS], dtype=torch.float64)
    start = curve(model_of(preset).double(), preset, steps=2)
    torch.testing.assert_close(start, truth[:2], msg="the stored curve is of other weights or data; run this file")
    plain, fused = curve(model_of(preset), preset), curve(fused_of(preset), preset)
    assert_close(fused, plain, truth, "loss curve")
    assert fused[-10:].mean() < 0.97 * fused[:10].mean()


if __name__ == "__main__":
    curves = {preset: curve(model_of(preset).double(), preset, STORED).tolist() for preset in CLASSES}
    TRUTH.write_text(json.dumps(curves, indent=1))
