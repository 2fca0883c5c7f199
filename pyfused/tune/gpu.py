"""How fast is each backend on this GPU, and with which tiles is Triton fastest? The evidence by which dispatch chooses.

For each call in cases.py, the tolerance rule first checks the outputs. Then the search tries tiles around Triton's present
ones, unless an earlier call has tuned that row. Then Triton, the CUDA kernels, cuDNN, backend `reference` and plain PyTorch are
timed in turn. A tile that does not compile, does not fit or gives a wrong output is skipped and counted. Without a GPU, and
with TRITON_INTERPRET=1, everything runs on CPU tensors with tiny sizes, as a dry run.
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
from torch.utils._python_dispatch import TorchDispatchMode

from .. import dispatch, evidence, ops, tiles, timing
from ..ops.registration import operator_of
from ..testing import judge
from ..testing.problems import Problem, Tensors, outputs_of
from .cases import Case, cases

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BACKENDS = ("triton", "cuda", "cudnn", "gluon", "reference")
_WORTH = 0.98  # a tile replaces another if it takes less than this share of its time
_JUDGED = 1 << 18  # elements of an output to check: the tolerance rule runs on the CPU

Run = Callable[[], tuple[Any, ...]]


def own_file() -> Path:
    """The file that `pyfused tune` writes on this machine."""
    return evidence.own_file("cuda" if torch.cuda.is_available() else "interpreter")


class _Stop(Exception):
    """The time is up, or the device does not answer."""


def tune(
    *,
    quick: bool = False,
    limit: float = float("inf"),
    operators: Sequence[str] = (),
    work: Iterable[Case] | None = None,
    dtypes: Sequence[torch.dtype] = (),
    say: Callable[[str], None] = lambda text: None,
    save: Callable[[dict[str, Any]], Any] = lambda result: None,
    compile_ahead: Callable[[Run, str, Sequence[dict[str, int]]], Any] = lambda run, kernel, candidates: None,
    clock: Callable[[Callable[[], Any]], float] | None = None,
    now: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Measures this machine's GPU kernels beside plain PyTorch, and searches for Triton's fastest tiles.

    Args:
        quick: fewer sizes, only bfloat16, and only each tile's nearest neighbours.
        limit: begin nothing more after so many seconds, and return the results so far.
        operators: the operators to measure; by default all.
        work: the calls to measure in place of cases().
        dtypes: by default bfloat16, float16 and float32, in this order.
        say: gets a line before each measured call.
        save: gets the results so far after each call.
        compile_ahead: called as compile_ahead(call, name of a Triton kernel in it, tiles) before these tiles are tried. It may
            compile them in parallel.
        clock: clock(call) returns the call's seconds; by default measured with a GPU's events.
        now: returns seconds, for the limit.

    Returns:
        The evidence in the form that evidence.write() takes, and
        `refused`: the calls whose outputs broke the tolerance rule; `skipped`: the number of tiles left out;
        `stopped`: why the rest was not measured, or "".

    Raises:
        ValueError: there is no GPU, or an operator is unknown.
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
                save(search.result())
    except _Stop as reason:
        search.stopped = str(reason)
    finally:
        dispatch.forget()
    save(search.result())
    return search.result()


class _Search:
    """The results so far, and the methods that add to them."""

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

    def result(self) -> dict[str, Any]:
        names = "operator", "function", "dtype", "shapes"
        lines = [{**dict(zip(names, key)), **self.about, "speed": speed} for key, speed in sorted(self.lines.items())]
        measured = {"lines": lines, "tiles": [row.as_json() for row in self.rows.values()], "refused": self.refused}
        return {"kind": own_file().stem, **measured, "skipped": self.skipped, "stopped": self.stopped}

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

        given = case.problem.inputs(dtype, self.device, generator)
        args, runs, plain, exact = _calls(case, given, generator)
        expected = [_sample(t) for t in plain()], [_sample(t) for t in exact()]
        del exact  # frees the tensors that its backward keeps

        def right(run: Run) -> bool:
            """Whether the outputs of a call pass. New memory is NaN, so that an element that no kernel writes fails."""
            with _poisoned():
                outputs = [t for t in run() if t is not None][: len(expected[0])]
            return all(judge(_sample(o), p, e).ok for o, p, e in zip(outputs, *expected, strict=True))

        shapes, size = evidence.shapes_of(case.operator, case.function, args)
        key = case.operator, case.function, evidence.name_of(dtype), shapes
        speed: dict[str, float] = {}
        with contextlib.ExitStack() as tuned, torch.no_grad():
            for name, run in list(runs.items()):
                dispatch.forget()
                with tiles.recorded() as lookups:
                    passed = self._attempt(run, right)
                if not passed:
                    self.refused.append(f"{evidence.name_of(dtype)}, {case.name}: {name}")
                    speed[name] = 0.0
                    del runs[name]
                elif name == "triton":
                    for lookup in {each.kernel: each for each in lookups}.values():
                        tuned.enter_context(tiles.trying(lookup.kernel, self._fastest_tile(lookup, run, right)))
            samples: dict[str, list[float]] = {name: [] for name in (*runs, "plain")}
            for _ in range(self.rounds):
                for name, run in (*runs.items(), ("plain", plain)):
                    samples[name].append(self.clock(run))
        times = {name: statistics.median(values) for name, values in samples.items()}
        speed |= {name: round(times["plain"] / times[name], 3) for name in runs}
        line = self.lines.setdefault(key, {})
        for name, value in speed.items():
            line.setdefault(name, {})[size] = value

    def _fastest_tile(self, lookup: tiles.Asked, run: Run, right: Callable[[Run], bool]) -> dict[str, int]:
        """The fastest tile of one kernel in a call; the call's other kernels keep theirs. Adds it to self.rows."""
        row = lookup.tile.row
        dtype = "any" if lookup.dtype is None else evidence.name_of(lookup.dtype)
        place = row.kernel, dtype, lookup.cases[0], row.up_to
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
            complete = best != row.tile  # keep a better tile, even if the search did not end
            raise
        finally:
            if complete:
                self.rows[place] = tiles.Row(*place, best, self.about["date"], "")
        return best

    def _seconds(self, run: Run) -> float:
        return statistics.median(self.clock(run) for _ in range(min(self.rounds, 5)))

    def _attempt(self, run: Run, right: Callable[[Run], bool]) -> bool:
        """right(run), or False if it raises. It catches any Exception: errors of compiler and driver share no other class."""
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
    """Tiles around a row's: each number doubled or halved (stages: one more or less), and a side together with the warps."""
    tile, result = row.tile, []
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
        # A matrix instruction needs at least 16. A row without one has less already.
        small = any(name in _OF_A_PRODUCT and new[name] < min(16, tile[name]) for name in new)
        try:
            tiles.check(row.kernel, new)
        except ValueError:
            continue
        fits = tiles.least_shared(row._replace(tile=new)) <= tiles.shared_memory(device)
        if fits and not small and new not in result:
            result.append(new)
    return result


_OF_A_PRODUCT = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "INNER")  # sides of a tile that a matrix instruction reads


def _calls(
    case: Case, given: Tensors, generator: torch.Generator
) -> tuple[tuple[Any, ...], dict[str, Run], Run, Run]:
    """The kernels' arguments; the call of each backend that has the case; plain PyTorch's call; and that in float64."""
    problem = case.problem
    exact = {name: t.double() for name, t in given.items()}
    plain: Run = functools.partial(_plainly, problem, given)
    truth: Run = functools.partial(_plainly, problem, exact)
    name = case.operator if case.function == "forward" else f"{case.operator}_backward"
    with dispatch.backend("reference"), _Arguments(name) as noted:
        if case.function == "forward":
            with torch.no_grad():
                problem.own(given)
        else:
            leaves = {name: t.detach().requires_grad_() for name, t in given.items()}
            outputs = outputs_of(problem.own(leaves))
            grads = [torch.randn(t.shape, generator=generator, device=t.device).to(t.dtype) for t in outputs]
            torch.autograd.grad(outputs, list(leaves.values()), grads)
            plain, truth = _gradients(problem, given, grads), _gradients(problem, exact, [g.double() for g in grads])
    runs: dict[str, Run] = {}
    for name in BACKENDS:
        module = None if dispatch.missing(name) else dispatch.kernel(name, case.operator)
        function = getattr(module, case.function, None)
        unsupported = getattr(module, f"unsupported_{case.function}", lambda *args: None)
        if function is not None and not unsupported(*noted.args):
            runs[name] = _launched(function, noted.args)
    return noted.args, runs, plain, truth


def _launched(function: Callable[..., Any], args: tuple[Any, ...]) -> Run:
    """function(*args) as an operator calls it: its launch is prepared once, here for each tile. Preparing takes the host longer
    than a small call takes the device."""
    prepare = getattr(function, "prepare", lambda *args: None)
    kept: dict[str, Run] = {}

    def run() -> tuple[Any, ...]:
        tile = repr(tiles._trial)
        if tile not in kept:
            launch = prepare(*args)
            if launch is None:  # nothing is prepared while launches are recorded
                return function(*args)
            kept.clear()
            kept[tile] = launch
        return kept[tile](*args)

    return run


def _plainly(problem: Problem, tensors: Tensors) -> tuple[torch.Tensor, ...]:
    return outputs_of(problem.plain[0](tensors))


class _Arguments(TorchDispatchMode):
    """Notes the arguments that an operator's kernels get."""

    args: tuple[Any, ...]

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator_of(func) == self.name:
            self.args = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
        return func(*args, **(kwargs or {}))


def _gradients(problem: Problem, tensors: Tensors, grads: Sequence[torch.Tensor]) -> Run:
    """A call that runs only plain PyTorch's backward, for the gradients that a kernel returns: a residual's is x's. The graph
    is made once, here."""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    with torch.enable_grad():
        outputs = _plainly(problem, leaves)
    wanted = [leaf for name, leaf in leaves.items() if name != "residual"]
    return lambda: torch.autograd.grad(outputs, wanted, list(grads), retain_graph=True)


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """At most _JUDGED elements, evenly spread. The step is odd, so that every column of a tile is among them."""
    step = -(-tensor.numel() // _JUDGED) | 1
    return tensor.detach().reshape(-1)[::step].clone()


@contextlib.contextmanager
def _poisoned() -> Iterator[None]:
    """Inside the block new memory is NaN: an output that a kernel forgets to write is then wrong."""
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
