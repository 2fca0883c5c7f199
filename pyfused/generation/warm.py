"""What can be done before a model's first call? On a GPU its Triton kernels are compiled, in parallel, and kept on disk. On a
CPU there is nothing to compile: libraries and prepared launches are made ready.
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
    """Makes ready what a model's calls need: generation where it generates, else encode().

    Args:
        model: a backbone, on the device and in the dtype that it will be used in.
        lengths: tokens of the texts to expect; those beyond the model's longest become that. Kernels are compiled for kinds of
            sizes, not for each: a few rows or many, texts of one length or several.
        workers: processes that compile; os.cpu_count() by default.
        say: told of the progress.

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
    """Calls of the kinds that are to be expected: one text, and two of different lengths. `fixed`: a generation's step is that
    of a CUDA graph. Only the texts decide what runs, so results may be arbitrary."""
    try:
        decoding = decoding_of(model)
    except (TypeError, ValueError):
        decoding = None  # an encoder
    longest = model.get_config().get("max_sequence_length") or max(lengths) + NEW_TOKENS
    new = max(2, min(NEW_TOKENS, longest // 2))  # the second is the first that a step computes
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
