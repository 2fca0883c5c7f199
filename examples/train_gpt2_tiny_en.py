"""How was the bundled preset gpt2_tiny_en made? Trains it from scratch on public-domain English, on a CPU.

    apt-get install bible-kjv && bible "Gen1:1-Rev22:21" > kjv.txt      # the text (the 1611 translation: public domain)
    python examples/train_gpt2_tiny_en.py --text kjv.txt --provider pyfused --save pyfused/presets/gpt2_tiny_en
    python examples/train_gpt2_tiny_en.py --text kjv.txt --provider torch
    python examples/train_gpt2_tiny_en.py --plot

The provider `pyfused` trains pyfused.GPT2Backbone on pyfused's kernels, forward and backward; `torch` trains transformers'
GPT2LMHeadModel (plain PyTorch) from the same initial weights on the same batches. Each writes its loss curve to
examples/gpt2_tiny_en/<provider>.csv, and --plot draws both. No dropout, so that the two runs are comparable step by step.
"""

import argparse
import csv
import json
import math
import re
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import pyfused

HERE = Path(__file__).parent / "gpt2_tiny_en"
END = "<|endoftext|>"
CONFIG = {
    "vocabulary_size": 2048,
    "num_layers": 4,
    "num_heads": 4,
    "hidden_dim": 160,
    "intermediate_dim": 640,
    "max_sequence_length": 256,
    "dropout": 0.0,
}
BATCH, LENGTH, PEAK_RATE, WARMUP = 8, 256, 2e-3, 100


def chapters(path: Path) -> list[str]:
    """The text as one document a chapter: its title, then its verses, unwrapped and without their numbers."""
    documents: list[list[str]] = []
    for line in path.read_text().splitlines():
        if re.fullmatch(r"[1-3A-Z].* \d+", line) and not line.startswith(" "):
            documents.append([line.strip()])
        elif re.match(r"\s+\d+ ", line):
            documents[-1].append(re.sub(r"^\s+\d+ ", "", line).strip())
        elif line.strip():
            documents[-1][-1] += " " + line.strip()
    return ["\n".join(d) for d in documents]


def train_tokenizer(documents: list[str], vocabulary_size: int):
    """Byte-level BPE as GPT-2's, of our own size, trained on the documents."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def encode(tokenizer, documents: list[str]) -> torch.Tensor:
    """All documents in one row of token ids, each ended by the end-of-text token."""
    end = tokenizer.token_to_id(END)
    return torch.tensor([t for e in tokenizer.encode_batch(documents) for t in [*e.ids, end]])


def batch(tokens: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(inputs, targets), each (BATCH, LENGTH): random windows, targets one token ahead."""
    starts = torch.randint(len(tokens) - LENGTH - 1, (BATCH,), generator=generator)
    windows = tokens[starts[:, None] + torch.arange(LENGTH + 1)]
    return windows[:, :-1], windows[:, 1:]


def make_model(provider: str):
    """(module, function from token ids to logits); both providers start from the same weights."""
    torch.manual_seed(0)
    backbone = pyfused.GPT2Backbone(**CONFIG)
    if provider == "pyfused":
        mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)

        def logits(ids):
            hidden = backbone(token_ids=ids, padding_mask=mask[: len(ids)])
            return backbone.token_embedding(hidden, reverse=True)

        return backbone, logits
    from transformers import GPT2LMHeadModel

    from pyfused.checkpoints import save_hf

    with tempfile.TemporaryDirectory() as directory:
        save_hf(backbone, directory)
        model = GPT2LMHeadModel.from_pretrained(directory)
    return model, lambda ids: model(ids, use_cache=False).logits


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to a tenth of the peak."""
    if step < WARMUP:
        return PEAK_RATE * (step + 1) / WARMUP
    progress = (step - WARMUP) / max(1, steps - WARMUP)
    return PEAK_RATE * (0.55 + 0.45 * math.cos(math.pi * progress))


def train(
    provider: str, train_tokens: torch.Tensor, held_out: torch.Tensor, steps: int
) -> tuple[torch.nn.Module, list]:
    """Trains and returns the model and its curve: (step, training loss, held-out loss or None)."""
    model, logits = make_model(provider)
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(1)

    def loss_of(ids, targets):
        return F.cross_entropy(logits(ids).flatten(0, 1), targets.flatten())

    def held_out_loss():
        fixed = torch.Generator().manual_seed(2)
        with torch.no_grad():
            return sum(loss_of(*batch(held_out, fixed)).item() for _ in range(8)) / 8

    curve, began = [], time.perf_counter()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = loss_of(*batch(train_tokens, generator))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        last = step == steps - 1
        held = held_out_loss() if step % 100 == 0 or last else None
        curve.append((step, loss.item(), held))
        if held is not None:
            seconds = time.perf_counter() - began
            print(f"{provider} step {step}: loss {loss.item():.4f}, held out {held:.4f}, {seconds:.0f} s", flush=True)
    return model, curve


def write_curve(path: Path, curve: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "loss", "held_out_loss"])
        writer.writerows([step, f"{loss:.6f}", "" if held is None else f"{held:.6f}"] for step, loss, held in curve)


def plot() -> None:
    """Both curves, and their difference, in examples/gpt2_tiny_en/loss.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves = {}
    for provider in ("torch", "pyfused"):
        with (HERE / f"{provider}.csv").open() as file:
            rows = list(csv.DictReader(file))
        curves[provider] = (
            [float(r["loss"]) for r in rows],
            [(int(r["step"]), float(r["held_out_loss"])) for r in rows if r["held_out_loss"]],
        )
    figure, (top, bottom) = plt.subplots(2, sharex=True, figsize=(8, 6), height_ratios=[3, 1])
    for provider, style in (("torch", {"lw": 3, "alpha": 0.4}), ("pyfused", {"lw": 0.8})):
        losses, held = curves[provider]
        (line,) = top.plot(losses, label=f"{provider}: training", **style)
        top.plot(*zip(*held), "o", ms=4, color=line.get_color(), label=f"{provider}: held out")
    top.set_ylabel("cross-entropy (nats per token)")
    top.legend()
    bottom.plot([a - b for a, b in zip(curves["pyfused"][0], curves["torch"][0])], lw=0.8, color="black")
    bottom.set_ylabel("pyfused - torch")
    bottom.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(HERE / "loss.png", dpi=110)


def save(model: pyfused.GPT2Backbone, tokenizer, directory: Path) -> None:
    """The preset in Hugging Face's format. Stored in float16 (half the size) and computed in float32, as config.json says."""
    from pyfused.checkpoints import save_hf

    save_hf(model.half(), directory)
    path = directory / "config.json"
    end = tokenizer.token_to_id(END)
    config = json.loads(path.read_text()) | {"dtype": "float32", "bos_token_id": end, "eos_token_id": end}
    path.write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save(str(directory / "tokenizer.json"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, help="what `bible` printed")
    parser.add_argument("--provider", choices=["pyfused", "torch"], default="pyfused")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", type=Path, help="directory for the trained preset (provider pyfused)")
    parser.add_argument("--curve", type=Path, help="where to write the loss curve")
    parser.add_argument("--plot", action="store_true", help="draw the curves that are there, and stop")
    arguments = parser.parse_args()
    if arguments.plot:
        plot()
        return
    if arguments.text is None:
        parser.error("--text is needed")
    torch.set_num_threads(arguments.threads)
    documents = chapters(arguments.text)
    held_out = documents[::25]
    training = [d for i, d in enumerate(documents) if i % 25]
    tokenizer = train_tokenizer(training, CONFIG["vocabulary_size"])
    train_tokens, held_tokens = encode(tokenizer, training), encode(tokenizer, held_out)
    print(f"{len(documents)} chapters, {len(train_tokens)} training tokens, {len(held_tokens)} held out", flush=True)
    model, curve = train(arguments.provider, train_tokens, held_tokens, arguments.steps)
    write_curve(arguments.curve or HERE / f"{arguments.provider}.csv", curve)
    if arguments.save:
        save(model, tokenizer, arguments.save)


if __name__ == "__main__":
    main()
