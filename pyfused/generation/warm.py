"""What can be done before a model's first call? On a GPU its Triton kernels are compiled in parallel and kept on disk. A CPU
has nothing to compile; there libraries are loaded and launches prepared.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ..compile_ahead import Compiled, compile_in_parallel, recording
from ..encoding import encode
from ..models.backbone import Backbone
from ..models.evaluation import evaluating
from .steps import decoding_of

LENGTHS = (8, 100, 1000)  # few rows, many, and enough keys for a decoding step to split them
NEW_TOKENS = 64


def warm(
    model: Backbone,
    *,
    lengths: Sequence[int] = LENGTHS,
    workers: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Prepares a model's calls: generation if it can generate, else encode().

    Args:
        model: a backbone, on the device and in the dtype that it will be used in.
        lengths: expected text lengths in tokens, cut to the model's longest. Kernels are compiled for kinds of sizes, not for
            each size: few rows or many, texts of one length or of several.
        workers: processes that compile; os.cpu_count() by default.
        say: gets messages about the progress.

    Returns:
        `device`, `seconds`, `compiled` and `cached` (how many kernels), `failed` (name and error of each).
    """
    began, device = time.perf_counter(), model.device.type
    done: list[Compiled] = []
    if device == "cuda":
        with recording() as launches:
            _run(model, lengths, True)
        done = compile_in_parallel(launches, workers, say)
    else:
        say(f"nothing to compile on {device}")
    _run(model, lengths, device == "cuda")
    if device == "cuda":
        torch.cuda.synchronize(model.device)
    failed = [{"kernel": row.launch.kernel, "error": row.error} for row in done if row.error]
    cached = sum(row.cached for row in done)
    return {
        "device": str(model.device),
        "seconds": time.perf_counter() - began,
        "compiled": len(done) - len(failed) - cached,
        "cached": cached,
        "failed": failed,
    }


def _run(model: Backbone, lengths: Sequence[int], fixed: bool) -> None:
    """Runs the expected kinds of calls: one text, and two of different lengths. fixed=True runs the step of a CUDA graph. The
    tokens are all 0: only the lengths decide which kernels run."""
    try:
        decoding = decoding_of(model)
    except (TypeError, ValueError):
        decoding = None  # an encoder
    longest = model.get_config().get("max_sequence_length") or max(lengths) + NEW_TOKENS
    new = max(2, min(NEW_TOKENS, longest // 2))  # at least 2: prefill computes the first token, a step the second
    for length in sorted({min(n, longest - new if decoding else longest) for n in lengths}):
        for texts in ([length], [length, -(-length // 2)]):
            arrays = [np.zeros(n, dtype=np.int64) for n in texts]
            if decoding is None:
                encode(model, [array.tolist() for array in arrays])
                continue
            with evaluating(model), torch.inference_mode():
                made = decoding(model, decoding.shape(arrays, new), fixed)  # type: ignore[call-arg]
                made.start(arrays)
                tokens = torch.zeros(len(arrays), dtype=torch.int64, device=model.device)
                made.fixed_step(tokens) if fixed else made.step(tokens)
