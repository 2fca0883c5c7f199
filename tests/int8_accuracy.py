"""How much do int8 weights change what the bundled presets predict? `python -m tests.int8_accuracy` writes the table of
docs/guides/int8.md.

Text: Genesis 1 to 4. GPT-2 predicts each next token, T5 the tokens of masked spans. ALBERT and FNet predict masked tokens.
Their presets have no head: a linear one is fitted to float32 states of half of the windows, and judged on the others.
"""

import math
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
BEGIN, END = "<!-- int8 accuracy -->", "<!-- end -->"


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


@torch.no_grad()
def compare(preset: str, *, dynamic: bool = False) -> dict[str, float]:
    """The measures before and after quantize_, and the bytes. `dynamic` runs on the reference, which has the integer product on
    every processor."""
    model = pyfused.Backbone.from_preset(preset, dtype="float32")
    measure = Probe(preset, model) if preset not in LANGUAGE_MODELS else lambda m: measures(preset, m)
    loss, right = measure(model).tolist()
    report = pyfused.quantize_(model, "int8", dynamic=dynamic)
    if dynamic:
        with pyfused.backend("reference"):
            loss8, right8 = measure(model).tolist()
    else:
        loss8, right8 = measure(model).tolist()
    found = {"loss": loss, "right": right, "int8 loss": loss8, "int8 right": right8}
    return found | {"bytes": report.bytes_before, "int8 bytes": report.bytes_after}


@torch.no_grad()
def cosine_at_width(*, dynamic: bool = False) -> float:
    """Of the logits of a GPT-2 of width 768 with three layers, random weights, and outliers such as GPT-2's: six channels of
    the stream are twenty times as large as the others."""
    torch.manual_seed(0)
    model = pyfused.GPT2Backbone(
        vocabulary_size=5000, num_layers=3, num_heads=12, hidden_dim=768, intermediate_dim=3072, max_sequence_length=128
    ).eval()
    outliers = torch.randperm(768)[:6]
    for name, p in model.named_parameters():
        if p.dim() == 2 and "embedding" not in name:
            p.normal_(0.0, p.shape[-1] ** -0.5)
        if name.endswith(("output.weight", "outer.weight")):
            p[outliers] *= 20.0
    ids = torch.randint(5000, (2, 64))
    before = model.logits(model(token_ids=ids, padding_mask=None))
    pyfused.quantize_(model, dynamic=dynamic)
    with pyfused.backend("reference" if dynamic else "cpu"):
        after = model.logits(model(token_ids=ids, padding_mask=None))
    return float(F.cosine_similarity(before, after, -1).mean())


def main() -> None:
    """Measures, and writes the table into the guide."""
    lines = ["| preset | measure | float32 | int8 | int8, dynamic | MB | int8 MB |", "|---|---|---|---|---|---|---|"]
    for preset in PRESETS:
        exact, rounded = compare(preset), compare(preset, dynamic=True)
        sizes = f"{exact['bytes'] / 1e6:.2f} | {exact['int8 bytes'] / 1e6:.2f} |"
        if preset in LANGUAGE_MODELS:
            values = [math.exp(v) for v in (exact["loss"], exact["int8 loss"], rounded["int8 loss"])]
            lines.append(f"| `{preset}` | perplexity | {' | '.join(f'{v:.3f}' for v in values)} | {sizes}")
        values = [exact["right"], exact["int8 right"], rounded["int8 right"]]
        what = "accuracy" if preset in LANGUAGE_MODELS else "masked accuracy"
        lines.append(f"| `{preset}` | {what} | {' | '.join(f'{v:.2%}' for v in values)} | {sizes}")
    lines += [
        "",
        "In a GPT-2 of width 768 with random weights, six channels are twenty times as large as the others. The cosine of its",
        f"logits to float32's is {cosine_at_width():.4f}, and with `dynamic` {cosine_at_width(dynamic=True):.4f}.",
    ]
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text("\n".join([before + BEGIN, *lines, END + rest.partition(END)[2]]))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
