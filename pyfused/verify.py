"""Do this preset's weights give the right numbers on this machine? The comparison behind `pyfused verify`.

The same weights and inputs run through the reference operators in float64 (the truth), the reference operators in the
model's dtype (plain PyTorch), and every backend that runs here; the tolerance rule judges each backend.
"""

from __future__ import annotations

from typing import Any

import torch

from .dispatch import backend
from .models import Backbone
from .testing import available, judge, running


def verify(preset: str, *, device: str = "cpu", dtype: str | torch.dtype | None = None) -> dict[str, Any]:
    """Compares every backend with float64 on one preset.

    Args:
        preset: a bundled name or a directory.
        device: where to run; "cpu" or "cuda[:N]".
        dtype: the dtype to verify; None is what the checkpoint says.

    Returns:
        A dict with `preset`, `dtype`, `device`, `inputs`, `plain_error` (plain PyTorch's largest absolute error), `scale`
        (the largest magnitude of the truth), `backends` (a row each: name, error, bound, ratio = error / bound, passed) and
        `passed`.
    """
    model = Backbone.from_preset(preset, device=device, dtype=dtype).eval()
    exact = Backbone.from_preset(preset, device=device, dtype=torch.float64).eval()
    _copy_weights(model, exact, model.dtype)
    inputs = _inputs(model, device)
    with torch.no_grad():
        with backend("reference"):
            truth, plain = _outputs(exact, inputs), _outputs(model, inputs)
        rows = []
        for name in available(torch.device(device).type):
            with running(name, strict=False):
                judgement = judge(_outputs(model, inputs), plain, truth)
            row = {"backend": name, "error": judgement.error, "bound": judgement.bound}
            rows.append({**row, "ratio": judgement.ratio, "passed": judgement.ok})
    return {
        "preset": preset,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device,
        "inputs": {name: list(tensor.shape) for name, tensor in inputs.items()},
        "scale": truth.abs().max().item(),
        "plain_error": (plain.double() - truth).abs().max().item(),
        "backends": rows,
        "passed": all(row["passed"] for row in rows),
    }


def _copy_weights(source: torch.nn.Module, target: torch.nn.Module, dtype: torch.dtype) -> None:
    """What is computed with, exactly: the truth is about the arithmetic, not about the rounding of a checkpoint."""
    with torch.no_grad():
        for a, b in zip(source.parameters(), target.parameters(), strict=True):
            b.copy_(a.to(dtype))


def _inputs(model: Backbone, device: str) -> dict[str, torch.Tensor]:
    """Two rows of random tokens for each text, the second with a third of it padding, as long as the model takes, 96 at
    most."""
    config = model.get_config()
    length = min(96, config.get("max_sequence_length") or 96)
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(2, length, dtype=torch.bool, device=device)
    mask[1, length - length // 3 :] = False
    inputs = {}
    for tokens, padding in model.texts:
        inputs[tokens] = torch.randint(config["vocabulary_size"], (2, length), generator=generator).to(device)
        if padding is not None:
            inputs[padding] = mask
    if segments := config.get("num_segments"):
        inputs["segment_ids"] = torch.randint(segments, (2, length), generator=generator).to(device)
    return inputs


def _outputs(model: Backbone, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Hidden states, and logits where the model has them, in one flat tensor."""
    found = model(inputs)
    states = list(found.values()) if isinstance(found, dict) else [found]
    if model.predicts_tokens:
        hidden = found["sequence_output"] if isinstance(found, dict) and "sequence_output" in found else states[-1]
        states.append(model.logits(hidden))
    return torch.cat([t.flatten() for t in states])


def render(report: dict[str, Any]) -> str:
    """The report as the table that `pyfused verify` prints."""
    shapes = ", ".join(f"{name} {tuple(shape)}" for name, shape in report["inputs"].items())
    lines = [
        f"{report['preset']} in {report['dtype']} on {report['device']}; {shapes}",
        f"largest magnitude {report['scale']:.4g}; error of plain PyTorch against float64 {report['plain_error']:.3e}",
        f"{'backend':<14} {'error':>10} {'allowed':>10} {'ratio':>6}",
    ]
    for row in report["backends"]:
        word = "PASS" if row["passed"] else "FAIL"
        lines.append(f"{row['backend']:<14} {row['error']:>10.3e} {row['bound']:>10.3e} {row['ratio']:>6.2f}  {word}")
    lines.append("PASS" if report["passed"] else "FAIL")
    return "\n".join(lines)
