"""How much do int8 and int4 weights change what the bundled presets predict? `python -m tests.integer_accuracy` writes the
tables of docs/guides/int8.md.

Text: Genesis 1 to 4. GPT-2 predicts each next token, T5 the tokens of masked spans. ALBERT and FNet predict masked tokens.
Their presets have no head: a linear one is fitted to float32 states of half of the windows, and judged on the others.
"""

import functools
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

import pyfused
from pyfused import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
TEXT = ROOT / "tests" / "data" / "genesis.txt"
LANGUAGE_MODELS = ("gpt2_tiny_en", "t5_tiny_en")
PRESETS = (*LANGUAGE_MODELS, "albert_tiny_en", "fnet_tiny_en")
WINDOW = 64
PAGE = ROOT / "docs" / "guides" / "int8.md"
BEGIN, END = "<!-- integer accuracy -->", "<!-- end -->"


def windows(preset: str, length: int = WINDOW) -> torch.Tensor:
    """(rows, length) token ids of the text."""
    text = " ".join(TEXT.read_text().split())
    ids = Tokenizer.from_preset(preset).encode(text)
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def measures(preset: str, model: pyfused.Backbone) -> torch.Tensor:
    """(2,): the mean loss of the predicted tokens in nats, and how many of them are right."""
    if preset.startswith("gpt2"):
        ids = windows(preset)
        hidden = model(token_ids=ids, padding_mask=None)
        return judged(model.logits(hidden)[:, :-1], ids[:, 1:])
    return judged(*spans(preset, model))


def judged(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits, targets = logits.flatten(0, -2), targets.flatten()
    return torch.stack([F.cross_entropy(logits, targets).double(), (logits.argmax(-1) == targets).double().mean()])


def spans(preset: str, model: pyfused.Backbone) -> tuple[torch.Tensor, torch.Tensor]:
    """T5's task: three of every sixteen tokens are replaced by a sentinel, and the decoder says the sentinels, each with its
    tokens."""
    ids = windows(preset)
    last = model.get_config()["vocabulary_size"] - 1
    blocks = ids.view(len(ids), -1, 16)
    sentinels = (last - torch.arange(blocks.shape[1])).expand(len(ids), -1)[..., None]
    end = torch.ones(len(ids), 1, dtype=torch.int64)
    source = torch.cat([torch.cat([blocks[..., :8], sentinels, blocks[..., 11:]], -1).flatten(1), end], 1)
    target = torch.cat([sentinels, blocks[..., 8:11]], -1).flatten(1)
    target = torch.cat([target, sentinels[:, -1] - 1, end], 1)
    shifted = F.pad(target[:, :-1], (1, 0))
    out = model(
        encoder_token_ids=source, encoder_padding_mask=None, decoder_token_ids=shifted, decoder_padding_mask=None
    )
    return model.logits(out["decoder_sequence_output"]), target


class Probe:
    """A linear head on an encoder's states at masked tokens: least squares with a ridge, for one-hot targets."""

    def __init__(self, preset: str, model: pyfused.Backbone):
        self.preset, self.kinds = preset, int(windows(preset).max()) + 1
        states, targets = self.states(model)
        x, y = states[0::2].flatten(0, 1).double(), F.one_hot(targets[0::2].flatten(), self.kinds).double()
        self.weight = torch.linalg.solve(x.t() @ x + 10.0 * torch.eye(x.shape[1]), x.t() @ y)

    def states(self, model: pyfused.Backbone) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows, masked, D) and (rows, masked), for eight draws of masked places."""
        generator, found = torch.Generator().manual_seed(4), []
        ids = windows(self.preset)
        for _ in range(8):
            places = torch.rand(ids.shape, generator=generator).argsort(1)[:, : WINDOW * 15 // 100]
            masked = ids.scatter(1, places, 4)  # [MASK]
            padding = {} if self.preset.startswith("fnet") else {"padding_mask": None}
            hidden = model(token_ids=masked, segment_ids=None, **padding)["sequence_output"]
            found.append((hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1])), ids.gather(1, places)))
        return tuple(torch.cat(part) for part in zip(*found))

    def __call__(self, model: pyfused.Backbone) -> torch.Tensor:
        """(2,): one minus the mean cosine to the targets' one-hot vectors, and the accuracy, on the other windows."""
        states, targets = self.states(model)
        scores = states[1::2].double() @ self.weight
        wanted = F.one_hot(targets[1::2], self.kinds).double()
        return torch.stack(
            [1 - F.cosine_similarity(scores, wanted, -1).mean(), (scores.argmax(-1) == targets[1::2]).double().mean()]
        )


@functools.cache
@torch.no_grad()
def in_float32(preset: str) -> tuple[Callable[[pyfused.Backbone], torch.Tensor], float, float]:
    """A function that measures a model of this preset, and the measures of the float32 model."""
    model = pyfused.Backbone.from_preset(preset, dtype="float32")
    measure = Probe(preset, model) if preset not in LANGUAGE_MODELS else lambda m: measures(preset, m)
    loss, right = measure(model).tolist()
    return measure, loss, right


@torch.no_grad()
def compare(preset: str, scheme: str = "int8", *, dynamic: bool = False) -> dict[str, float]:
    """The measures before and after quantize_, and the bytes. `dynamic` runs on the reference, which has the integer product on
    every processor."""
    measure, loss, right = in_float32(preset)
    model = pyfused.Backbone.from_preset(preset, dtype="float32")
    report = pyfused.quantize_(model, scheme, dynamic=dynamic)
    if dynamic:
        with pyfused.backend("reference"):
            rounded_loss, rounded_right = measure(model).tolist()
    else:
        rounded_loss, rounded_right = measure(model).tolist()
    found = {"loss": loss, "right": right, "rounded loss": rounded_loss, "rounded right": rounded_right}
    return found | {"bytes": report.bytes_before, "rounded bytes": report.bytes_after}


@torch.no_grad()
def cosine_at_width(scheme: str = "int8", *, dynamic: bool = False, outliers: float = 20.0) -> float:
    """Of the logits of a GPT-2 of width 768 with three layers, random weights, and outliers such as GPT-2's: six channels of
    the stream are `outliers` times as large as the others."""
    torch.manual_seed(0)
    model = pyfused.GPT2Backbone(
        vocabulary_size=5000, num_layers=3, num_heads=12, hidden_dim=768, intermediate_dim=3072, max_sequence_length=128
    ).eval()
    large = torch.randperm(768)[:6]
    for name, p in model.named_parameters():
        if p.dim() == 2 and "embedding" not in name:
            p.normal_(0.0, p.shape[-1] ** -0.5)
        if name.endswith(("output.weight", "outer.weight")):
            p[large] *= outliers
    ids = torch.randint(5000, (2, 64))
    before = model.logits(model(token_ids=ids, padding_mask=None))
    pyfused.quantize_(model, scheme, dynamic=dynamic)
    with pyfused.backend("reference" if dynamic else "cpu"):
        after = model.logits(model(token_ids=ids, padding_mask=None))
    return float(F.cosine_similarity(before, after, -1).mean())


# The columns of the table: its heading, and the arguments of compare().
SCHEMES = {"int8": {}, "int8, dynamic": {"dynamic": True}, "int4": {"scheme": "int4"}}


def rows() -> list[str]:
    """The table. Its last columns say what int4 costs: how much the perplexity grows, or how accuracy changes."""
    lines = [
        "| preset | measure | float32 | int8 | int8, dynamic | int4 | int4 costs | MB | int8 MB | int4 MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for preset in PRESETS:
        found = {name: compare(preset, **options) for name, options in SCHEMES.items()}
        sizes = [found["int8"]["bytes"], found["int8"]["rounded bytes"], found["int4"]["rounded bytes"]]
        in_mb = " | ".join(f"{size / 1e6:.2f}" for size in sizes)
        if preset in LANGUAGE_MODELS:
            values = [math.exp(found["int8"]["loss"]), *(math.exp(f["rounded loss"]) for f in found.values())]
            cost = f"{values[-1] / values[0] - 1:+.1%}"
            shown = " | ".join(f"{value:.3f}" for value in values)
            lines.append(f"| `{preset}` | perplexity | {shown} | {cost} | {in_mb} |")
        values = [found["int8"]["right"], *(f["rounded right"] for f in found.values())]
        what = "accuracy" if preset in LANGUAGE_MODELS else "masked accuracy"
        shown = " | ".join(f"{value:.2%}" for value in values)
        lines.append(f"| `{preset}` | {what} | {shown} | {100 * (values[-1] - values[0]):+.2f} points | {in_mb} |")
    return lines


def at_width() -> list[str]:
    """The table of cosines."""
    lines = ["| logits of a GPT-2 of width 768 | int8 | int8, dynamic | int4 |", "|---|---|---|---|"]
    for name, outliers in (("random weights", 1.0), ("and six channels twenty times as large as the others", 20.0)):
        cosines = (cosine_at_width(outliers=outliers, **options) for options in SCHEMES.values())
        lines.append(f"| {name} | {' | '.join(f'{cosine:.5f}' for cosine in cosines)} |")
    return lines


def main() -> None:
    """Measures, and writes the tables into the guide."""
    cosines = "The cosine of logits to float32's, at the width of GPT-2 124M:"
    lines = [*rows(), "", cosines, "", *at_width()]
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text("\n".join([before + BEGIN, *lines, END + rest.partition(END)[2]]))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
