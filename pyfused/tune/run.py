"""How fast are the CPU kernels on this machine? The evidence by which dispatch chooses them (evidence.py).

A point is one call of an operator. The CPU kernel and plain PyTorch run it in turn on the same inputs, after the tolerance rule
has checked the outputs. The evidence is the ratio of their times, the median of three turns that lie apart: other work on the
machine may spoil all measurements of one moment. Where the processor has instructions for dot products
(extensions.DOT_PRODUCTS), the products that use them are measured in the same way, beside the usual kernels.
"""

from __future__ import annotations

import contextlib
import datetime
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .. import dispatch, evidence, extensions, ops
from ..kernels.shared import int8, product
from ..testing import judge
from ..weight_format import FORMATS, dequantized

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WIDTHS = (128, 768)  # a small and a large weight
_TURNS, _SECONDS = 3, 0.03  # of measurements, unless they are to be quick; for each point in a turn
_ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 64, 128, 192, 256, 512, 1024)
_ROWS_BY_COLUMNS = (1, 2, 4, 8, 12, 16, 32, 64, 128, 256, 512)
_NETWORK_ROWS = (1, 8, 32, 128, 512, 1024)
_GRADIENT_ROWS = (1, 8, 16, 32, 64, 128, 512)
_NETWORKS = ("ffn", "gated_ffn")
_PRODUCTS = ("linear", *_NETWORKS)
# (B, S, N): from few, long signals, which leave most lanes of a vector empty, to many
_SPECTRA = (
    (1, 1, 4096),
    (1, 4, 4096),
    (1, 16, 2048),
    (1, 2, 128),
    (1, 64, 64),
    (1, 128, 512),
    (2, 512, 768),
    (1, 512, 1024),
)


class Point(NamedTuple):
    """One call: an operator's name, the arguments of its public function, and the same in plain PyTorch. scale: that of an
    integer weight. dynamic: as linear's. activation: ffn's."""

    operator: str
    plain: Callable[..., torch.Tensor]
    tensors: tuple[torch.Tensor, ...]
    residual: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    dynamic: bool = False
    activation: str | None = None

    def to(self, dtype: torch.dtype) -> Point:
        tensors = tuple(t.to(dtype) if t.is_floating_point() else t for t in self.tensors)
        return self._replace(tensors=tensors, residual=None if self.residual is None else self.residual.to(dtype))

    def options(self) -> dict[str, Any]:
        given = {"residual": self.residual, "scale": self.scale, "dynamic": self.dynamic or None, "activation": self.activation}
        return {name: value for name, value in given.items() if value is not None}

    def has(self, instructions: str | None, dtype: torch.dtype) -> bool:
        """Whether the kernels of an instruction set for dot products have this call; None for the usual kernels."""
        if instructions is None:
            return not self.dynamic
        if self.operator not in _PRODUCTS or self.tensors[1].stride()[1] != 1:
            return False
        name = f"{self.operator}_dynamic_forward" if self.dynamic else f"{self.operator}_forward"
        fits = self.dynamic or (dtype == torch.bfloat16 and self.scale is None)
        return fits and hasattr(extensions.cpu(instructions), name)

    def in_plain_torch(self) -> torch.Tensor:
        """The result without pyfused."""
        x, *rest = self.tensors
        return self.plain(x if self.residual is None else x + self.residual, *rest)


def _integers(rows: int, width: int, scheme: str, dynamic: bool = False) -> Point:
    """A product with an integer weight. Plain PyTorch multiplies by what the integers stand for, in x's dtype. dynamic: x is a
    multiple of its own step, so that rounding its rows changes nothing."""
    weight, scale = FORMATS[scheme].quantized(torch.randn(width, width) / width**0.5)
    x = torch.randint(-127, 128, (rows, width)) / 64.0 if dynamic else torch.randn(rows, width)
    x[:, 0] = 127.0 / 64.0 if dynamic else x[:, 0]

    def plain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.linear(x, dequantized(weight, scale, x.dtype))

    return Point("linear", plain, (x, weight), scale=scale, dynamic=dynamic)


def _networks(rows: int, width: int) -> Iterator[Point]:
    """Feed-forward networks with ReLU, which takes the least time beside the products."""
    x, w_in, w_up, w_out = torch.randn(rows, width), *(torch.randn(width, width) / width**0.5 for _ in range(3))

    def plain(x, w_in, b_in, w_out, b_out):
        return F.linear(F.linear(x, w_in, b_in).relu(), w_out, b_out)

    def gated(x, w_gate, w_up, w_out):
        return F.linear(F.linear(x, w_gate).relu() * F.linear(x, w_up), w_out)

    yield Point("ffn", plain, (x, w_in, torch.randn(width), w_out, torch.randn(width)), activation="relu")
    yield Point("gated_ffn", gated, (x, w_in, w_up, w_out), activation="relu")


def _fourier_mix(x: torch.Tensor) -> torch.Tensor:
    """torch.fft has no half precision on a CPU."""
    wide = x if x.dtype == torch.float64 else x.float()
    return torch.fft.fft2(wide).real.to(x.dtype)


def points(quick: bool = False) -> Iterator[Point]:
    """The calls to measure, in float32."""
    for width in _WIDTHS:
        weight = torch.randn(width, width) / width**0.5
        for rows in _ROWS[::3] if quick else _ROWS:
            yield Point("linear", F.linear, (torch.randn(rows, width), weight))
        for rows in (1, 8, 128) if quick else _ROWS_BY_COLUMNS:
            yield Point("linear", F.linear, (torch.randn(rows, width), weight.t()))
        for scheme in FORMATS:
            for rows in (1, 128) if quick else (1, 16, 64, 512):
                yield _integers(rows, width, scheme)
        for rows in (128,) if quick else (32, 128, 512):
            yield _integers(rows, width, "int8", dynamic=True)
        for rows in _NETWORK_ROWS[2::2] if quick else _NETWORK_ROWS:
            yield from _networks(rows, width)
    for rows in (1, 128) if quick else (1, 16, 128, 1024):
        x, residual, weight, bias = (torch.randn(*shape) for shape in ((rows, 768), (rows, 768), (768,), (768,)))
        for added in (None, residual):
            yield Point("layer_norm", lambda x, w, b: F.layer_norm(x, w.shape, w, b), (x, weight, bias), added)
            yield Point("rms_norm", lambda x, w: F.rms_norm(x, w.shape, w, 1e-6), (x, weight), added)
    for shape in _SPECTRA[::3] if quick else _SPECTRA:
        yield Point("fourier_mix", _fourier_mix, (torch.randn(shape),))


def _takes_long(point: Point, dtype: torch.dtype) -> bool:
    """torch's products in float16 may take a second each. Fewer rows, and the lines of linear, serve for these."""
    return dtype == torch.float16 and (point.operator in _NETWORKS or point.tensors[0].shape[0] > 512)


def tune(
    *,
    quick: bool = False,
    operators: Sequence[str] = (),
    threads: Sequence[int] = (),
    say: Callable[[str], None] = lambda text: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Measures this machine's CPU kernels beside plain PyTorch.

    Args:
        quick: fewer sizes, and less time for each.
        operators: the operators to measure; by default all that evidence is kept for.
        threads: numbers of threads; by default one, and torch's number.
        say: gets a line before each group of measurements.
        clock: returns seconds, like time.perf_counter.

    Returns:
        The evidence in the form that evidence.py reads, and `refused`: the calls whose outputs broke the tolerance rule. They
        give no evidence.

    Raises:
        ValueError: there are no CPU kernels here, or no evidence is kept for an operator.
    """
    if dispatch.missing("cpu"):
        raise ValueError(f"there is nothing to measure: {dispatch.missing('cpu')}")
    for name in operators:
        if name not in evidence.OPERATORS:
            raise ValueError(f"operators names {name!r}; evidence is kept for {', '.join(evidence.OPERATORS)}")
    before = torch.get_num_threads()
    measured: dict[tuple[Any, ...], dict[str, dict[int, list[float]]]] = {}
    refused: dict[str, None] = {}
    try:
        with torch.inference_mode():
            for count in dict.fromkeys(threads or (1, before)):
                torch.set_num_threads(count)
                dispatch.forget()
                for dtype in DTYPES:
                    say(f"{count} thread{'s' * (count > 1)}, {evidence.name_of(dtype)}")
                    for _ in range(1 if quick else _TURNS):
                        for point in points(quick):
                            if point.operator not in (operators or evidence.OPERATORS) or _takes_long(point, dtype):
                                continue
                            for way, size, line, speed in _measured(point.to(dtype), dtype, _SECONDS, clock):
                                if speed is None:
                                    refused[", ".join((*line, f"size {size}", *(() if way == "cpu" else (way,))))] = None
                                    continue
                                key = line[0], "forward", *line[1:], count
                                measured.setdefault(key, {}).setdefault(way, {}).setdefault(size, []).append(speed)
                        if "linear" in (operators or ("linear",)):
                            for size, shapes, speed in _gradients(dtype, quick, _SECONDS, clock):
                                key = "linear", "backward", evidence.name_of(dtype), shapes, count
                                measured.setdefault(key, {}).setdefault("cpu", {}).setdefault(size, []).append(speed)
    finally:
        torch.set_num_threads(before)
        dispatch.forget()
    names = "operator", "function", "dtype", "shapes", "threads"
    about = {"date": datetime.date.today().isoformat(), "torch": torch.__version__}
    lines = []
    for key, ways in sorted(measured.items()):
        middle = {
            way: {size: round(statistics.median(found), 3) for size, found in by_size.items()}
            for way, by_size in ways.items()
        }
        lines.append({**dict(zip(names, key)), **about, "speed": middle})
    return {"kind": evidence.kind(), "lines": lines, "refused": [*refused]}


def _measured(
    point: Point, dtype: torch.dtype, seconds: float, clock: Callable[[], float]
) -> Iterator[tuple[str, int, tuple[str, str, str], float | None]]:
    """For each way to run the point on this CPU: its name in a line of evidence, the size, (operator, dtype, class of shapes),
    and _speed()."""
    dot_products = extensions.dot_products()
    for instructions in (None, dot_products) if dot_products else (None,):
        if not point.has(instructions, dtype):
            continue
        bound = ops.MODULES[point.operator].bind(*point.tensors, **point.options())
        shapes, size = evidence.shapes_of(point.operator, "forward", bound)
        isa = instructions or extensions.base_isa()
        with dispatch.use_isa(isa) if isa else contextlib.nullcontext():
            speed = _speed(point, seconds, clock)
        yield instructions or "cpu", size, (point.operator, evidence.name_of(dtype), shapes), speed


def _gradients(
    dtype: torch.dtype, quick: bool, seconds: float, clock: Callable[[], float]
) -> Iterator[tuple[int, str, float]]:
    """The size, the class of shapes, and how many times as fast as plain PyTorch a gradient's product in float32 is. Nothing
    where float32 is plain PyTorch's way, or always faster."""
    if dtype == torch.float32 or product.is_slow(dtype):
        return
    for width in _WIDTHS:
        for rows in _GRADIENT_ROWS[::3] if quick else _GRADIENT_ROWS:
            a, b = torch.randn(rows, width).to(dtype), torch.randn(width, width).to(dtype)
            shapes, size = evidence.shapes_of("linear", "backward", (a, b))

            def took(library: bool, repeats: int, a: torch.Tensor = a, b: torch.Tensor = b) -> float:
                way = product.plain_product if library else product.in_float32
                began = clock()
                for _ in range(repeats):
                    way(a, b)
                return clock() - began

            yield size, shapes, _ratio(took, seconds, clock)


def _speed(point: Point, seconds: float, clock: Callable[[], float]) -> float | None:
    """How many times as fast as PyTorch's library the CPU kernel is; None if its output is wrong. Both run through pyfused's
    operator, so both times include its overhead."""
    function = getattr(ops, point.operator)

    def run(library: bool, repeats: int) -> tuple[torch.Tensor, float]:
        by_integers = point.dynamic and (not library or int8.library_multiplies())
        options = point._replace(dynamic=by_integers).options()
        # Launches are remembered per backend() setting: the two ways do not share one.
        with dispatch.backend("cpu", strict=not library), evidence.one_way(library):
            began = clock()
            for _ in range(repeats):
                out = function(*point.tensors, **options)
            took = clock() - began
        return out[0] if isinstance(out, tuple) else out, took

    if not judge(run(False, 1)[0], point.in_plain_torch(), point.to(torch.float64).in_plain_torch()).ok:
        return None
    return _ratio(lambda library, repeats: run(library, repeats)[1], seconds, clock)


def _ratio(took: Callable[[bool, int], float], seconds: float, clock: Callable[[], float]) -> float:
    """How many times as fast the kernel is. took(library, repeats) runs one of the two and returns the time."""
    once = min(took(False, 1) for _ in range(3))
    repeats = max(1, min(50, int(1e-3 / max(once, 1e-7))))  # the clock is too coarse for one short call
    kernel: list[float] = []
    library: list[float] = []
    began = clock()
    while len(kernel) < 5 or (clock() - began < seconds and len(kernel) < 200):
        kernel.append(took(False, repeats))
        library.append(took(True, repeats))
    # Other work on the machine only adds time, so the first quartile says more than the median.
    return statistics.quantiles(library, n=4)[0] / statistics.quantiles(kernel, n=4)[0]
