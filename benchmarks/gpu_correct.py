"""Which calls are checked on a GPU, and how? Every operator, forward and gradients, beside plain PyTorch and float64.

The shapes are a model's, odd ones, and ones with more rows than the limit of a grid's second dimension (65,535).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import draws
import torch
from attention_cases import plain as plain_attention

import pyfused
from pyfused.decode_plan import DecodeLayer, DecodePlan, DecodeStep, Matrix, Norm
from pyfused.dispatch import BackendError
from pyfused.kernels.reference import decode as plain_decode
from pyfused.ops.decode import run as run_decode
from pyfused.testing import judge, running
from pyfused.testing.problems import (
    Call,
    Problem,
    Tensors,
    attention,
    ffn,
    fourier_mix,
    gated_ffn,
    linear,
    norm,
    outputs_of,
    relative_bias,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MANY = 70_000
DRAWS = 6  # with few numbers a single draw may break the rule by chance: see pyfused/testing/tolerance.py



# Two ways of plain PyTorch, see plain_attention
WAYS = tuple(partial(plain_attention, logarithm=logarithm) for logarithm in (False, True))
attend = partial(attention, ways=WAYS)


def packed(h: int, d: int, *lengths: int) -> Problem:
    """Packed sequences: one after the other, without padding."""
    shape = (1, h, sum(lengths), d)

    def own(t: Tensors) -> Any:
        ends = torch.tensor([0, *lengths], device=t["query"].device, dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return pyfused.attention(**t, is_causal=True, cu_seqlens=ends, max_seqlen=max(lengths))

    def plain(way: Any, t: Tensors) -> Any:
        parts = zip(*(t[name].split(lengths, 2) for name in ("query", "key", "value")))
        every = [dict(zip(("query", "key", "value"), part)) for part in parts]
        return torch.cat([way(one, {"is_causal": True, "scale": None}) for one in every], 2)

    name = f"packed {h}x{'+'.join(map(str, lengths))}x{d}"
    ways = tuple(partial(plain, way) for way in WAYS)
    return Problem(name, dict.fromkeys(("query", "key", "value"), shape), own, ways)


def decode(rows: int, keys: int, hidden: int, heads: int, inner: int, *options: str) -> Problem:
    """A step of two layers that sees `keys` tokens. options: "t5" (RMS norms, gated, relative bias, cross-attention with one
    source), "uneven" (each row has its own place), "columns" (the layers' weights are stored transposed)."""
    t5, d, layers, vocabulary = "t5" in options, 64 if hidden > 100 else 8, 2, 1003
    inside = heads * d
    shapes: dict[str, tuple[int, ...]] = {"w_tokens": (vocabulary, hidden), "final": (hidden,), "b": (hidden,)}
    shapes |= {"table": (32, heads)} if t5 else {"w_places": (keys, hidden)}
    matrices = dict.fromkeys(("query", "key", "value"), (inside, hidden)) | {"output": (hidden, inside)}
    matrices |= {"inner": (inner, hidden), "outer": (hidden, inner)}
    if t5:
        matrices |= {"gate": (inner, hidden), "cross_query": (inside, hidden), "cross_output": (hidden, inside)}
    for i in range(layers):
        shapes |= {f"w_{name}{i}": shape for name, shape in matrices.items()}
        shapes |= {f"norm{i}": (hidden,), f"keys{i}": (2, rows, heads, keys, d)}
        shapes |= {f"cross{i}": (2, 1, heads, 40, d)} if t5 else {}

    def call(t: Tensors, run: Callable[[DecodePlan, DecodeStep], Any]) -> Any:
        def norm(name: str) -> Norm:
            return Norm(t[name], None if t5 else t["b"], 1e-5)

        def layer(i: int) -> DecodeLayer:
            weights = {name: t[f"w_{name}{i}"] for name in matrices}
            own: dict[str, Any] = {n: Matrix(stored_by_columns(w) if "columns" in options else w) for n, w in weights.items()}
            norms = ("attention_norm", "feed_forward_norm", *(("cross_norm",) if t5 else ()))
            own |= dict.fromkeys(norms, norm(f"norm{i}"))
            return DecodeLayer(**own, scale=0.125, cross_scale=0.125)

        tokens = Matrix(t["w_tokens"])
        plan = DecodePlan(
            tuple(map(layer, range(layers))), tokens, tokens, norm("final"), heads, heads, d, t5, "gelu_tanh",
            position_embedding=Matrix() if t5 else Matrix(t["w_places"]), bias_table=t.get("table"),
        )  # fmt: skip
        ids = torch.arange(rows, device=t["final"].device) * 37
        at = torch.full_like(ids, keys - 1)
        if "uneven" in options:
            at //= torch.arange(1, rows + 1, device=ids.device)
        places = at if "uneven" in options else None
        caches = [part for i in range(layers) for part in t[f"keys{i}"].clone()]
        encoder = [part for i in range(layers) for part in t[f"cross{i}"]] if t5 else []
        step = DecodeStep(ids, places, None, None, keys - 1, keys, caches, encoder, None, False)
        logits = run(plan, step)[0]
        return (logits, *(cache[torch.arange(rows, device=ids.device), :, at] for cache in caches))

    def plain(plan: DecodePlan, step: DecodeStep) -> Any:
        return plain_decode.forward(plan.dtype_and_device, plan, step)

    name = " ".join([f"{rows} rows, {keys} keys, {hidden}x{inner}", *options])
    return Problem(name, shapes, lambda t: call(t, run_decode), (lambda t: call(t, plain),), gradients=False)


def stored_by_columns(weight: torch.Tensor) -> torch.Tensor:
    """The same matrix; memory holds it transposed, as Hugging Face's Conv1D does."""
    return weight.t().contiguous().t()


def by_columns(case: Problem) -> Problem:
    """The case with its weights stored transposed."""

    def own(t: Tensors) -> Any:
        return case.own({name: stored_by_columns(v) if name.startswith("w") else v for name, v in t.items()})

    return replace(case, name=f"{case.name} by columns", own=own)


NORMS = ((2048, 768), (MANY, 24), (129, 1000), (7, 4097), (3, 16400), (200, 5))
WIDE = ((1, 768, 2048), (3, 1000, 137), (16, 768, 3072), (17, 131, 96), (2048, 768, 3072), (MANY, 24, 40))


def cases(operator: str, tiny: bool) -> list[Problem]:
    """The cases of an operator. tiny: few and small ones, for Triton's interpreter."""
    if operator in ("layer_norm", "rms_norm"):
        shapes = ((40, 37),) if tiny else NORMS
        return [norm(operator, *shape, residual) for shape in shapes for residual in (True, False)[: 2 - tiny]]
    if operator in ("linear", "ffn", "gated_ffn"):
        make = {"linear": linear, "ffn": ffn, "gated_ffn": gated_ffn}[operator]
        found = [make(*shape) for shape in (((20, 33, 24),) if tiny else WIDE)]
        few = ((3, 32, 24),) if tiny else ((1, 3072, 768), (3, 1000, 137), (8, 768, 3072))
        return found if operator == "gated_ffn" else [*found, *(by_columns(make(*shape)) for shape in few)]
    if operator == "fourier_mix":
        shapes = ((2, 6, 20),) if tiny else ((2, 512, 768), (1, 1024, 1024), (1, 137, 64), (3, 31, 20), (MANY, 2, 3))
        return [fourier_mix(*shape) for shape in shapes]
    if operator == "relative_bias":
        shapes = ((1, 5, 6),) if tiny else ((2, 1025, 2048), (12, 129, 137), (4, 1, 1025))
        return [relative_bias(*shape, both) for shape in shapes for both in (True, False)[: 2 - tiny]]
    if operator == "decode":
        wide = ((1, 300, 768, 12, 3072), (3, 70, 1032, 6, 517), (8, 1000, 768, 12, 2048))
        shapes = ((2, 20, 24, 2, 40),) if tiny else wide
        kinds = ((), ("columns",), ("t5", "uneven"))[: 3 - tiny]
        return [decode(*shape, *options) for shape in shapes for options in kinds]
    if operator == "attention":
        return [attend(1, 2, 1, 17, 20, 64, "causal", "table")] if tiny else list(_attention())
    raise ValueError(f"operator={operator!r} is unknown; there are {', '.join(pyfused.ops.NAMES)}")


def _attention() -> Iterator[Problem]:
    for options in ((), ("causal",), ("table",), ("padding",)):
        yield attend(1, 2, 2, 2048, 2048, 64, *options)
    yield attend(1, 2, 2, 1025, 1025, 128, "causal")
    yield attend(2, 4, 2, 200, 136, 64)
    yield attend(2, 4, 2, 137, 129, 64, "causal", "padding")
    yield attend(1, 2, 2, 129, 129, 80, "bias")
    yield attend(2, 2, 2, 127, 137, 40, "table", "padding")
    yield packed(2, 64, 70, 1, 129, 40)
    # one token against a cache (no gradients needed), and grids of many programs
    yield attend(2, 8, 2, 1, 1025, 64, gradients=False)
    yield attend(1, 12, 12, 1, 300, 64, "table", "padding", gradients=False)
    yield attend(MANY, 1, 1, 3, 5, 16, gradients=False)
    yield attend(1, 1, 1, MANY, 40, 64, gradients=False)


def every(operators: str, tiny: bool) -> list[tuple[str, torch.dtype, Problem]]:
    """(operator, dtype, case) of comma-separated operators, in a fixed order."""
    named = ((name, case) for name in operators.split(",") for case in cases(name, tiny))
    return [(name, dtype, case) for (name, case), dtype in product(named, DTYPES)]


def check(case: Problem, backend: str, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Checks a case by the tolerance rule.

    Returns {"ok", "ratio" (the largest error over the allowed one), "worst" (the result that has it), "draws", "seconds"}, or
    {"ok": None, "left"} if the backend leaves the case to another.
    """
    began, drawn = time.perf_counter(), {}
    for draw in range(DRAWS):
        torch.manual_seed(1234 + draw)
        try:
            results = _draw(case, backend, dtype, device)
        except BackendError as error:
            return {"ok": None, "ratio": None, "left": str(error), "seconds": 0.0}
        for what, tensors in results.items():
            drawn.setdefault(what, []).append(tensors)
        ratios = {what: judge(*draws.together(several)).ratio for what, several in drawn.items()}
        worst = max(ratios, key=lambda what: ratios[what])
        ok = ratios[worst] <= 1
        if ok:
            break
    ratio = ratios[worst] if math.isfinite(ratios[worst]) else 1e9
    return {"ok": ok, "ratio": ratio, "worst": worst, "draws": draw + 1, "seconds": time.perf_counter() - began}


def _draw(case: Problem, backend: str, dtype: torch.dtype, device: str) -> dict[str, tuple[Any, Any, Any]]:
    """Runs the case on new random numbers. Returns {result: (actual, plain, truth)}."""
    inputs = case.inputs(dtype, device)
    cotangents: list[torch.Tensor] = []

    def results(call: Call, wide: torch.dtype) -> Tensors:
        leaves = {name: t.to(wide).requires_grad_(case.gradients) for name, t in inputs.items()}
        outputs = outputs_of(call(leaves))
        named = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
        if case.gradients:
            cotangents.extend(torch.randn_like(out) for out in outputs[len(cotangents) :])
            grads = torch.autograd.grad(outputs, list(leaves.values()), [c.to(wide) for c in cotangents])
            named |= {f"gradient of {name}": grad for name, grad in zip(leaves, grads)}
        return named

    with running(backend), _poisoned():
        actual = results(case.own, dtype)
    truth, plain = results(case.plain[0], torch.float64), results(case.plain[0], dtype)
    if len(case.plain) > 1 and case.gradients:
        plain |= {what: t for what, t in results(case.plain[1], dtype).items() if what.startswith("gradient")}
    assert all(t.dtype == dtype for t in actual.values())
    return {what: (actual[what], plain[what], truth[what]) for what in actual}


class _poisoned:
    """Inside the block torch.empty gives NaN: an element that a kernel forgets to write is then wrong."""

    def __enter__(self) -> None:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True

    def __exit__(self, *error: object) -> None:
        torch.use_deterministic_algorithms(False)
