"""How fast is each backend on this GPU, and with which tiles is Triton fastest? Measures what dispatch decides by.

Of each call in cases.py the outputs are judged by the tolerance rule. Then tiles around Triton's present ones are tried,
where no earlier call tuned that row. Then Triton, the CUDA kernels, backend `reference` and plain PyTorch are timed in turn. A
tile that does not compile, does not fit or gives a wrong output is left out and counted. Where there is no GPU and
TRITON_INTERPRET=1, all of it runs on CPU tensors with tiny sizes, to see that it runs.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import dispatch, evidence, ops, tiles, timing
from ..arguments import AttentionForward
from ..testing import judge
from .cases import Case, Problem, cases, saving

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BACKENDS = ("triton", "cuda", "reference")
_SAVE = {
    "attention": AttentionForward._fields.index("save"),
    "layer_norm": 5,
    "rms_norm": 4,
    "ffn": 7,
    "gated_ffn": 6,
}  # where `save` is among the arguments
_WORTH = 0.98  # a tile replaces another if it takes this share of its time
_JUDGED = 1 << 18  # elements of an output: the rule runs on the host

Run = Callable[[], tuple[Any, ...]]


def own_file() -> Path:
    """Where `pyfused tune` writes what tune() found on this machine."""
    return evidence.own_file("cuda" if torch.cuda.is_available() else "interpreter")


class _Stop(Exception):
    """The time is up, or the device is lost."""


def tune(
    *,
    quick: bool = False,
    limit: float = float("inf"),
    operators: Sequence[str] = (),
    work: Iterable[Case] | None = None,
    dtypes: Sequence[torch.dtype] = (),
    say: Callable[[str], None] = lambda text: None,
    save: Callable[[dict[str, Any]], Any] = lambda found: None,
    compile_ahead: Callable[[Run, str, Sequence[dict[str, int]]], Any] = lambda run, kernel, candidates: None,
    clock: Callable[[Callable[[], Any]], float] | None = None,
    now: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Measures this machine's GPU kernels beside plain PyTorch, and searches Triton's tiles.

    Args:
        quick: fewer sizes, bfloat16 alone, and each tile's nearest neighbours alone.
        limit: seconds after which no more is begun; what is known by then is returned.
        operators: which to measure; by default all.
        work, dtypes: what to measure in place of cases(), and of bfloat16, float16 and float32 in this order.
        say: gets a line before each call that is measured.
        save: gets what is known so far after each.
        compile_ahead: gets a call, a Triton kernel in it and the tiles that will be tried there, before they are, and may
            compile them in parallel.
        clock: seconds that a call takes; by default events on a GPU.
        now: seconds, for the limit.

    Returns:
        What evidence.write() takes; `refused`: the calls whose outputs broke the tolerance rule; `skipped`: how many tiles were
        left out; `stopped`: whether something was not measured, and why.

    Raises:
        ValueError: there is no GPU, or an unknown operator.
    """
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not dispatch.interpreting():
        raise ValueError("there is nothing to measure: no CUDA device (and TRITON_INTERPRET=1 is not set)")
    for name in operators:
        if name not in ops.NAMES:
            raise ValueError(f"operators names {name!r}; there are {', '.join(ops.NAMES)}")
    listed = list(cases(quick, tiny=not on_gpu) if work is None else work)
    search = _Search(on_gpu, quick, now() + limit, clock, now, compile_ahead)
    try:
        for dtype in dtypes or (DTYPES[:1] if quick else DTYPES):
            for case in listed:
                if operators and case.operator not in operators:
                    continue
                say(f"{evidence.name_of(dtype)}, {case.name}")
                search.measure(case, dtype)
                save(search.found())
    except _Stop as reason:
        search.stopped = str(reason)
    finally:
        dispatch.forget()
    save(search.found())
    return search.found()


class _Search:
    """What is known so far, and how more of it is found."""

    def __init__(self, on_gpu, quick, deadline, clock, now, compile_ahead):
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        self.quick, self.deadline, self.now, self.compile_ahead = quick, deadline, now, compile_ahead
        self.clock = clock or (timing.time_cuda if on_gpu else timing.time_cpu)
        self.rounds = 1 if not on_gpu else 5 if quick else 11
        self.lines: dict[tuple[str, ...], dict[str, dict[int, float]]] = {}
        self.rows: dict[tuple[Any, ...], tiles.Row] = {}
        self.refused: list[str] = []
        self.skipped = 0
        self.stopped = ""
        self.about = {"date": datetime.date.today().isoformat(), "torch": torch.__version__}

    def found(self) -> dict[str, Any]:
        names = "operator", "function", "dtype", "shapes"
        lines = [{**dict(zip(names, key)), **self.about, "speed": speed} for key, speed in sorted(self.lines.items())]
        found = {"lines": lines, "tiles": [row.as_json() for row in self.rows.values()], "refused": self.refused}
        return {"kind": own_file().stem, **found, "skipped": self.skipped, "stopped": self.stopped}

    def measure(self, case: Case, dtype: torch.dtype) -> None:
        self._check_time()
        try:
            self._measure(case, dtype)
        except torch.OutOfMemoryError:
            self.refused.append(f"{evidence.name_of(dtype)}, {case.name}: not enough memory")
        finally:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _measure(self, case: Case, dtype: torch.dtype) -> None:
        generator = torch.Generator(self.device).manual_seed(7)

        def new(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=self.device).to(dtype)

        problem = case.make(new)
        args, runs, plain, exact = _calls(case, problem, new)
        expected = [_sample(t) for t in plain()], [_sample(t) for t in exact()]
        del exact  # and what it keeps for a backward

        def right(run: Run) -> bool:
            """Whether its outputs pass, on memory that was filled with NaN."""
            with _poisoned():
                outputs = [t for t in run() if t is not None][: len(expected[0])]
            return all(judge(_sample(o), p, e).ok for o, p, e in zip(outputs, *expected, strict=True))

        shapes, size = evidence.shapes_of(case.operator, case.function, args)
        key = case.operator, case.function, evidence.name_of(dtype), shapes
        speed: dict[str, float] = {}
        with contextlib.ExitStack() as tuned, torch.no_grad():
            for name, run in list(runs.items()):
                dispatch.forget()
                with tiles.recorded() as asked:
                    passed = self._attempt(run, right)
                if not passed:
                    self.refused.append(f"{evidence.name_of(dtype)}, {case.name}: {name}")
                    speed[name] = 0.0
                    del runs[name]
                elif name == "triton":
                    for question in {q.kernel: q for q in asked}.values():
                        tuned.enter_context(tiles.trying(question.kernel, self._best(question, run, right)))
            samples: dict[str, list[float]] = {name: [] for name in (*runs, "plain")}
            for _ in range(self.rounds):
                for name, run in (*runs.items(), ("plain", plain)):
                    samples[name].append(self.clock(run))
        times = {name: statistics.median(values) for name, values in samples.items()}
        speed |= {name: round(times["plain"] / times[name], 3) for name in runs}
        line = self.lines.setdefault(key, {})
        for name, value in speed.items():
            line.setdefault(name, {})[size] = value

    def _best(self, question: tiles.Asked, run: Run, right: Callable[[Run], bool]) -> dict[str, int]:
        """The fastest tile of a kernel within a call that runs with the others' as they are; kept with its row's class."""
        row = question.tile.row
        dtype = "any" if question.dtype is None else evidence.name_of(question.dtype)
        place = row.kernel, dtype, question.cases[0], row.up_to
        if place in self.rows:
            return self.rows[place].tile
        best, tried, least = dict(row.tile), [dict(row.tile)], self._seconds(run)
        complete = True
        try:
            for _ in range(1 if self.quick else 3):
                before = best
                fresh = [tile for tile in candidates(row._replace(tile=best), self.device) if tile not in tried]
                self.compile_ahead(run, row.kernel, fresh)
                for tile in fresh:
                    self._check_time()
                    tried.append(tile)
                    with tiles.trying(row.kernel, tile):
                        if not self._attempt(run, right):
                            self.skipped += 1
                        elif (seconds := self._seconds(run)) < _WORTH * least:
                            best, least = tile, seconds
                if best is before:
                    break
        except _Stop:
            complete = best != row.tile  # what was found so far is better than what was there
            raise
        finally:
            if complete:
                self.rows[place] = tiles.Row(*place, best, self.about["date"], "")
        return best

    def _seconds(self, run: Run) -> float:
        return statistics.median(self.clock(run) for _ in range(min(self.rounds, 5)))

    def _attempt(self, run: Run, right: Callable[[Run], bool]) -> bool:
        """right(run); False where it raises too: the compiler's errors and the driver's have no common class."""
        try:
            return right(run)
        except _Stop:
            raise
        except Exception as error:
            try:
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                    torch.ones(1, device=self.device).sum().item()
            except Exception:
                raise _Stop(f"the device does not answer any more: {error}") from error
            return False

    def _check_time(self) -> None:
        if self.now() > self.deadline:
            raise _Stop("the time is up")


def candidates(row: tiles.Row, device: torch.device) -> list[dict[str, int]]:
    """Tiles around a row's: each number once larger and once smaller, and a side of the tile together with the warps."""
    tile, found = row.tile, []
    sides = [name for name in tile if name.startswith(("BLOCK", "ROWS", "COLUMNS"))]
    changes: list[dict[str, Callable[[int], int]]] = []
    for change in (lambda value: value * 2), (lambda value: value // 2):
        changes += [{name: change, "num_warps": change} for name in sides if "num_warps" in tile]
    changes += [{"num_stages": change} for change in (lambda value: value + 1, lambda value: value - 1)]
    for name in (*sorted(set(tile) - {"num_stages", "num_warps", *sides}), "num_warps", *sides):
        changes += [{name: lambda value: value * 2}, {name: lambda value: value // 2}]
    for changed in changes:
        if not set(changed) <= set(tile):
            continue
        new = {**tile, **{name: change(tile[name]) for name, change in changed.items()}}
        # A matrix instruction takes 16 at least; a row that does without has less already.
        small = any(name in _OF_A_PRODUCT and new[name] < min(16, tile[name]) for name in new)
        try:
            tiles.check(row.kernel, new)
        except ValueError:
            continue
        fits = tiles.least_shared(row._replace(tile=new)) <= tiles.shared_memory(device)
        if fits and not small and new not in found:
            found.append(new)
    return found


_OF_A_PRODUCT = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "INNER")


def _calls(case: Case, problem: Problem, new: Any) -> tuple[tuple[Any, ...], dict[str, Run], Run, Run]:
    """The kernels' arguments, each backend's call that has the case, plain PyTorch's, and that in float64."""
    given = problem.tensors
    args = problem.bind(given)
    exact = {name: t.double() for name, t in given.items()}
    if case.function == "forward":
        plain: Run = functools.partial(problem.plain, given)
        truth: Run = functools.partial(problem.plain, exact)
    else:
        assert problem.backward is not None
        if case.operator in _SAVE:
            args = saving(args, _SAVE[case.operator])
        reference: Any = dispatch.kernel("reference", case.operator)
        outputs = reference.forward(*args)
        grads = [new(*t.shape) for t in problem.plain(given)]
        args = problem.backward(args, outputs, grads)
        plain = _gradients(problem, given, grads)
        truth = _gradients(problem, exact, [g.double() for g in grads])
    runs: dict[str, Run] = {}
    for name in BACKENDS:
        module = None if dispatch.missing(name) else dispatch.kernel(name, case.operator)
        function = getattr(module, case.function, None)
        unsupported = getattr(module, f"unsupported_{case.function}", lambda *args: None)
        if function is not None and not unsupported(*args):
            runs[name] = functools.partial(function, *args)
    return args, runs, plain, truth


def _gradients(problem: Problem, tensors: dict[str, torch.Tensor], grads: Sequence[torch.Tensor]) -> Run:
    """The backward of plain PyTorch alone, through a graph that is made once."""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    with torch.enable_grad():
        outputs = problem.plain(leaves)
    wanted = [leaves[name] for name in problem.wants]
    return lambda: torch.autograd.grad(outputs, wanted, list(grads), retain_graph=True)


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """At most _JUDGED elements, from everywhere: with an odd step every column of a tile is among them."""
    step = -(-tensor.numel() // _JUDGED) | 1
    return tensor.detach().reshape(-1)[::step].clone()


@contextlib.contextmanager
def _poisoned() -> Iterator[None]:
    """Inside the block new memory is NaN, so that an output a kernel forgot to write is wrong."""
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
