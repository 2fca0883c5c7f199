"""What do the training examples share? The text, the optimiser's loop, the loss curves and the command line.

    apt-get install bible-kjv && bible "Gen1:1-Rev22:21" > kjv.txt      # the text (the 1611 translation: public domain)

Each example trains with the provider `pyfused` (the backbone on pyfused's kernels, forward and backward) or `torch`
(transformers' model, plain PyTorch) from the same initial weights on the same batches, and writes its loss curve to
examples/<preset>/<provider>.csv; --plot draws both.
"""

import argparse
import csv
import json
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
WARMUP = 100


def chapters(path: Path) -> list[str]:
    """One document per chapter: its title, then its verses, unwrapped and without numbers."""
    documents: list[list[str]] = []
    for line in path.read_text().splitlines():
        if re.fullmatch(r"[1-3A-Z].* \d+", line) and not line.startswith(" "):
            documents.append([line.strip()])
        elif re.match(r"\s+\d+ ", line):
            documents[-1].append(re.sub(r"^\s+\d+ ", "", line).strip())
        elif line.strip():
            documents[-1][-1] += " " + line.strip()
    return ["\n".join(d) for d in documents]


def tokenizer_of(path: Path | None, train: Callable[[], Any]) -> Any:
    """The tokenizer from a file, or a new one. (Two trainings of a unigram model differ: compare providers on one file.)"""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(path)) if path else train()


def split(documents: list[str]) -> tuple[list[str], list[str]]:
    """(training, held out): every 25th chapter is held out."""
    return [d for i, d in enumerate(documents) if i % 25], documents[::25]


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then a cosine to a tenth of the peak."""
    if step < WARMUP:
        return peak * (step + 1) / WARMUP
    progress = (step - WARMUP) / max(1, steps - WARMUP)
    return peak * (0.55 + 0.45 * math.cos(math.pi * progress))


def adamw(model: torch.nn.Module, rate: float) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices only."""
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))


def train(
    name: str,
    model: torch.nn.Module,
    loss_of: Callable[[torch.Generator], torch.Tensor],
    held_out_loss_of: Callable[[torch.Generator], torch.Tensor],
    steps: int,
    optimiser: torch.optim.Optimizer,
) -> list:
    """Trains and returns the curve: (step, training loss, held-out loss or None). Each loss function draws a batch with the
    generator and returns its loss. The optimiser's rate is the peak rate."""
    peak_rate = optimiser.param_groups[0]["lr"]
    generator = torch.Generator().manual_seed(1)

    def held_out_loss():
        fixed = torch.Generator().manual_seed(2)
        with torch.no_grad():
            return sum(held_out_loss_of(fixed).item() for _ in range(8)) / 8

    curve, began = [], time.perf_counter()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, peak_rate)
        loss = loss_of(generator)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        last = step == steps - 1
        held = held_out_loss() if step % 100 == 0 or last else None
        curve.append((step, loss.item(), held))
        if held is not None:
            seconds = time.perf_counter() - began
            print(f"{name} step {step}: loss {loss.item():.4f}, held out {held:.4f}, {seconds:.0f} s", flush=True)
    return curve


def write_curve(path: Path, curve: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "loss", "held_out_loss"])
        writer.writerows([step, f"{loss:.6f}", "" if held is None else f"{held:.6f}"] for step, loss, held in curve)


def save(model: Any, tokenizer: Any, directory: Path, **special: int) -> None:
    """The preset in Hugging Face's format. Stored in float16 (half the size) and computed in float32, as config.json says.

    special: the ids of the special tokens, by their names in config.json.
    """
    model.half().save_to_preset(directory)
    path = directory / "config.json"
    config = json.loads(path.read_text()) | {"dtype": "float32", **special}
    path.write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save(str(directory / "tokenizer.json"))


def plot(folder: Path) -> None:
    """Draws both curves and their difference into the folder's loss.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves = {}
    for provider in [p for p in ("torch", "pyfused") if (folder / f"{p}.csv").exists()]:
        with (folder / f"{provider}.csv").open() as file:
            rows = list(csv.DictReader(file))
        curves[provider] = (
            [float(r["loss"]) for r in rows],
            [(int(r["step"]), float(r["held_out_loss"])) for r in rows if r["held_out_loss"]],
        )
    figure, (top, bottom) = plt.subplots(2, sharex=True, figsize=(8, 6), height_ratios=[3, 1])
    styles = {"torch": {"lw": 3, "alpha": 0.4}, "pyfused": {"lw": 0.8}}
    for provider, (losses, held) in curves.items():
        style = styles[provider]
        (line,) = top.plot(losses, label=f"{provider}: training", **style)
        top.plot(*zip(*held), "o", ms=4, color=line.get_color(), label=f"{provider}: held out")
    top.set_ylabel("cross-entropy (nats per token)")
    top.legend()
    if len(curves) == 2:
        bottom.plot([a - b for a, b in zip(curves["pyfused"][0], curves["torch"][0])], lw=0.8, color="black")
    bottom.set_ylabel("pyfused - torch")
    bottom.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(folder / "loss.png", dpi=110)


def arguments(description: str, preset: str, steps: int) -> argparse.Namespace:
    """Parses an example's command line; --plot draws the existing curves and ends the program."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--text", type=Path, help="what `bible` printed")
    parser.add_argument("--provider", choices=["pyfused", "torch"], default="pyfused")
    parser.add_argument(
        "--tokenizer", type=Path, help="a tokenizer.json to take; without it one is trained on the text"
    )
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", type=Path, help="directory for the trained preset (provider pyfused)")
    parser.add_argument("--curve", type=Path, help="where to write the loss curve")
    parser.add_argument("--plot", action="store_true", help="draw the curves that are there, and stop")
    given = parser.parse_args()
    if given.plot:
        plot(HERE / preset)
        parser.exit()
    if given.text is None:
        parser.error("--text is needed")
    given.curve = given.curve or HERE / preset / f"{given.provider}.csv"
    torch.set_num_threads(given.threads)
    return given
