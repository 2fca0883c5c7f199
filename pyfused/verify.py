"""Does a preset give the right numbers on this machine? The comparison behind `pyfused verify`.

The same weights and random inputs run through the reference operators in float64 (the truth), the reference operators in the
model's dtype (plain PyTorch), and every backend that runs here. The tolerance rule judges each output of each backend.
"""

from __future__ import annotations

from typing import Any

import torch

from .dispatch import backend
from .evidence import name_of
from .models import Backbone
from .testing import available, judge, running

SEEDS = 3


def verify(preset: str, *, device: str = "cpu", dtype: str | torch.dtype | None = None) -> dict[str, Any]:
    """Compares every backend with float64 on one preset.

    Args:
        preset: a bundled name or a directory.
        device: "cpu" or "cuda[:N]".
        dtype: the dtype to verify; None for the checkpoint's.

    Returns:
        A dict with `preset`, `dtype`, `device`, `seeds`, `inputs` (their shapes), `scale` (the truth's largest magnitude),
        `plain_rms` and `plain_worst` (plain PyTorch's RMS error and largest error, each for its worst output), `backends` and
        `passed`. `backends` has a row per backend, about the output nearest to its bounds: `backend`, `output`, `rms_error`,
        `rms_bound`, `worst_error` and `worst_bound` (of the element nearest to its bound), `ratio` (the larger error / bound)
        and `passed`.
    """
    model = Backbone.from_preset(preset, device=device, dtype=dtype).eval()
    exact = Backbone.from_preset(preset, device=device, dtype=torch.float64).eval()
    _copy_weights(model, exact, model.dtype)
    calls = [_inputs(model, device, seed) for seed in range(SEEDS)]
    with torch.no_grad():
        with backend("reference"):
            truth, plain = _outputs(exact, calls), _outputs(model, calls)
        judged = {}
        for name in available(torch.device(device).type):
            with running(name, strict=False):
                outputs = _outputs(model, calls)
            judged[name] = {what: judge(outputs[what], plain[what], truth[what]) for what in truth}
    rows = []
    for name, judgements in judged.items():
        what = max(judgements, key=lambda output: judgements[output].ratio)
        found = judgements[what]
        row = {"backend": name, "output": what, "rms_error": found.rms_error, "rms_bound": found.rms_bound}
        row |= {"worst_error": found.worst_error, "worst_bound": found.worst_bound}
        rows.append({**row, "ratio": found.ratio, "passed": found.ok})
    of_plain = next(iter(judged.values())).values()  # plain PyTorch's errors are the same for every backend
    return {
        "preset": preset,
        "dtype": name_of(model.dtype),
        "device": device,
        "seeds": SEEDS,
        "inputs": {name: list(tensor.shape) for name, tensor in calls[0].items()},
        "scale": max(tensor.abs().max().item() for tensor in truth.values()),
        "plain_rms": max(found.rms_plain for found in of_plain),
        "plain_worst": max(found.worst_plain for found in of_plain),
        "backends": rows,
        "passed": all(row["passed"] for row in rows),
    }


def _copy_weights(source: torch.nn.Module, target: torch.nn.Module, dtype: torch.dtype) -> None:
    """Copies the weights as rounded to the model's dtype: the truth judges arithmetic, not the rounding of a checkpoint."""
    with torch.no_grad():
        for a, b in zip(source.parameters(), target.parameters(), strict=True):
            b.copy_(a.to(dtype))


def _inputs(model: Backbone, device: str, seed: int) -> dict[str, torch.Tensor]:
    """Two rows of random tokens for each text of the model. A third of the second row is padding. A row has 96 tokens, or fewer
    if the model takes fewer."""
    config = model.get_config()
    length = min(96, config.get("max_sequence_length") or 96)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(2, length, dtype=torch.bool, device=device)
    mask[1, length - length // 3 :] = False
    inputs = {}
    for tokens, padding in model.texts:
        inputs[tokens] = torch.randint(config["vocabulary_size"], (2, length), generator=generator, device="cpu").to(device)
        if padding is not None:
            inputs[padding] = mask
    if segments := config.get("num_segments"):
        inputs["segment_ids"] = torch.randint(segments, (2, length), generator=generator, device="cpu").to(device)
    return inputs


def _outputs(model: Backbone, calls: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Hidden states, and logits if the model has them. Each is one tensor for all calls."""
    outputs = []
    for inputs in calls:
        found = model(inputs)
        states = dict(found) if isinstance(found, dict) else {"hidden states": found}
        if model.predicts_tokens:
            states["logits"] = model.logits(states.get("sequence_output", list(states.values())[-1]))
        outputs.append(states)
    return {what: torch.stack([states[what] for states in outputs]) for what in outputs[0]}


def render(report: dict[str, Any]) -> str:
    """The table that `pyfused verify` prints."""
    shapes = ", ".join(f"{name} {tuple(shape)}" for name, shape in report["inputs"].items())
    lines = [
        f"{report['preset']} in {report['dtype']} on {report['device']}; {shapes}; {report['seeds']} seeds",
        f"largest magnitude {report['scale']:.4g}; plain PyTorch against float64: RMS error {report['plain_rms']:.3e}, largest "
        f"error {report['plain_worst']:.3e}",
        f"{'backend':<15} {'RMS error':>10} {'allowed':>10} {'ratio':>6}   {'worst':>10} {'allowed':>10} {'ratio':>6}",
    ]
    for row in report["backends"]:
        figures = "   ".join(
            f"{row[kind + '_error']:>10.3e} {row[kind + '_bound']:>10.3e} {row[kind + '_error'] / row[kind + '_bound']:>6.2f}"
            for kind in ("rms", "worst")
        )
        lines.append(f"{row['backend']:<15} {figures}  {'PASS' if row['passed'] else 'FAIL'}")
    lines.append("PASS" if report["passed"] else "FAIL")
    return "\n".join(lines)
