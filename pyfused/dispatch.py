"""Which backend runs an operator? One order of preference, and the reasons that overrule it.

A backend is a folder of kernels/: `reference` (plain PyTorch), `cpu` (csrc/cpu), `triton`, `cuda` (csrc/cuda). Each holds
a module per operator with `forward`, `backward` (or one of them: it is then no candidate for the other, and the next backend
runs that, under strict=True too). On a GPU the fastest in the evidence of evidence.py is asked first; where nothing was
measured it is Triton. A backend is passed over for one of three reasons:
    unsupported_<function>(*args) of its module: it cannot do this case;
    declined_<function>(*args) of its module: on any machine the next one does it better, being closer to float64, say;
    evidence.py: it is a hand-written CUDA kernel, and on this kind of machine nothing shows that it is right.
A forced backend ignores all but the first, and gives way to that visibly in explain(). Launchers of CPU kernels have the
library's way beside their own, for calls where that was measured to be faster: left_to_library_<function>(*args) says why.

A call in which some tensor has no element runs on the reference, forced or not, strict or not: there is nothing to compute
that a kernel could be faster at, and no kernel need divide by a size of 0 or launch an empty grid.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import torch

from . import evidence, extensions

BACKENDS = ("reference", "cpu", "triton", "cuda")

# Preferences by device where nothing was measured, best first; `reference` ends every list and can do everything.
PREFERENCES: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "reference"),
    # A CUDA kernel that no GPU has run yields to the Triton one until evidence shows it right and faster.
    "cuda": ("triton", "cuda", "reference"),
}

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_forced: ContextVar[tuple[str, bool] | None] = ContextVar("pyfused_backend", default=None)


class BackendError(RuntimeError):
    """A backend forced with strict=True cannot run the case at hand."""


@contextmanager
def backend(name: str, *, strict: bool = False) -> Iterator[None]:
    """Runs every operator inside the block on one backend, where it has the case.

    Args:
        name: "reference", "cpu", "triton" or "cuda".
        strict: raise BackendError where the backend lacks the case; otherwise the next one runs, as explain() shows. An
            operator of which the backend has the forward alone gets its gradients from the next one all the same, and a
            call with an empty tensor runs on the reference.

    Raises:
        ValueError: `name` is no backend, or cannot run on this machine at all.
    """
    _check_backend(name, "name")
    token = _forced.set((name, strict))
    try:
        with evidence.one_way(library=False):
            yield
    finally:
        _forced.reset(token)


def _check_backend(name: str, argument: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{argument}={name!r} is no backend; there are {', '.join(BACKENDS)}")
    reason = missing(name)
    if reason:
        raise ValueError(f"{argument}={name!r}: {reason}")


@functools.cache
def _forced_by_environment() -> tuple[str, bool] | None:
    name = os.environ.get("PYFUSED_BACKEND")
    if not name:
        return None
    _check_backend(name, "PYFUSED_BACKEND")
    return name, False


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@functools.cache
def missing(name: str) -> str:
    """Why no operator can run on this backend on this machine; empty when some can."""
    if name == "cpu":
        return extensions.missing("_cpu")
    if name == "cuda":
        if extensions.emulating_cuda():
            return ""
        reason = extensions.missing("_cuda") or ("" if torch.cuda.is_available() else "no CUDA device")
        cards = () if reason else range(torch.cuda.device_count())
        lacking = (extensions.cuda_lacks(torch.cuda.get_device_capability(card)) for card in cards)
        return reason or next(filter(None, lacking), "")
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if not (torch.cuda.is_available() or interpreting()):
            return "no CUDA device (and TRITON_INTERPRET=1 is not set)"
    return ""


def _cannot_run(name: str, device: str, dtype: torch.dtype) -> str:
    """Why this backend cannot touch such tensors, whatever the operator."""
    reason = missing(name)
    if reason or name == "reference":
        return reason
    emulated = {"cpu": True, "cuda": extensions.emulating_cuda(), "triton": interpreting()}[name]
    takes = "cpu" if emulated else "cuda"
    if device != takes:
        return f"runs on {takes} tensors, not on {device}"
    if dtype not in KERNEL_DTYPES:
        return f"takes float32, float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    return ""


@functools.cache
def kernel(name: str, operator: str) -> ModuleType | None:
    """The module kernels/<backend>/<operator>.py, or None if this backend has no such operator."""
    module = f"pyfused.kernels.{name}.{operator}"
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        return None


@functools.cache
def _lacks(name: str, operator: str, function: str) -> bool:
    """Whether a backend has the operator, but not this function of it."""
    module = kernel(name, operator)
    return module is not None and not hasattr(module, function)


class _Candidate(NamedTuple):
    """A backend for a function of an operator. `reason`: why it never runs such tensors; "" if it may. `against`: functions of
    a call's arguments that say why it does not run that call, or None."""

    backend: str
    call: Callable[..., tuple[Any, ...]] | None
    reason: str
    against: tuple[Callable[..., str | None], ...]


class _Candidates(NamedTuple):
    """Every backend, best first where nothing was measured; `ranked`: whether evidence may say otherwise of a call."""

    rows: tuple[_Candidate, ...]
    ranked: bool


@functools.cache
def _candidates(
    operator: str, function: str, device: str, dtype: torch.dtype, forced: tuple[str, bool] | None
) -> _Candidates:
    """Every backend, with all that depends on no argument; first the forced one."""
    listed = PREFERENCES.get(device, ("reference",))
    order = (*((forced[0],) if forced else ()), *listed, *BACKENDS)
    strictly = forced[0] if forced and forced[1] and not _lacks(forced[0], operator, function) else None
    rows = []
    for name in dict.fromkeys(order):
        reason = _cannot_run(name, device, dtype)
        module = None if reason else kernel(name, operator)
        against: tuple[Any, ...] = ()
        if module is None:
            reason = reason or "has no such operator"
        elif not hasattr(module, function):
            reason = f"has no {function} of this operator"
        else:
            is_forced = forced is not None and name == forced[0]
            against = (getattr(module, f"unsupported_{function}", None),)
            if not is_forced:
                against += (
                    getattr(module, f"declined_{function}", None),
                    evidence.unproven(name, operator, function, device),
                )
                if name not in listed:
                    reason = f"not used for {device} tensors unless forced"
                elif strictly:
                    reason = f"{strictly!r} is asked for strictly"
        call = None if module is None else getattr(module, function, None)
        rows.append(_Candidate(name, call, reason, tuple(filter(None, against))))
    return _Candidates(tuple(rows), forced is None and evidence.ranks(operator, function, device))


def _by_evidence(
    rows: tuple[_Candidate, ...], operator: str, function: str, device: str, args: tuple[Any, ...]
) -> list[_Candidate]:
    """The candidates by what was measured of such a call, the fastest first; where nothing was, as they are."""
    shapes, size = evidence.shapes_of(operator, function, args)
    rank = evidence.rank(device, operator, function, args[0].dtype, shapes, size)
    return sorted(rows, key=lambda candidate: rank.get(candidate.backend, 0.0), reverse=True)


_NOTHING = "a tensor has no element: plain PyTorch does what little there is"


def _is_empty(args: tuple[Any, ...]) -> bool:
    """Whether some tensor of a call has no element. Asked at first calls of a signature, and where there are none."""
    for a in args:  # noqa: SIM110 - any() takes half a microsecond more
        if isinstance(a, torch.Tensor) and not a.numel():
            return True
    return False


def forced() -> tuple[str, bool] | None:
    """The backend that backend() or the environment asks for, and whether strictly."""
    return _forced.get() or _forced_by_environment()


def judged(operator: str, function: str, args: tuple[Any, ...]) -> Iterator[tuple[_Candidate, str]]:
    """Every backend with the reason why it does not run this call, "" if it can; in the order in which they are asked. The
    first argument decides device and dtype."""
    tensor = args[0]
    empty = _is_empty(args)
    device = "cpu" if tensor.is_cpu else tensor.device.type  # the name of a device takes 0.9 us
    rows, ranked = _candidates(operator, function, device, tensor.dtype, forced())
    for candidate in _by_evidence(rows, operator, function, device, args) if ranked and not empty else rows:
        reason = candidate.reason
        if empty:
            reason = "" if candidate.backend == "reference" else reason or _NOTHING
        elif not reason:
            for against in candidate.against:
                reason = against(*args) or ""
                if reason:
                    break
        yield candidate, reason


def choose(operator: str, function: str, args: tuple[Any, ...]) -> Callable[..., tuple[Any, ...]]:
    """The callable that runs `function` ("forward" or "backward") of an operator for these arguments: of the first backend
    that can. Costs about 1 us: all but the reasons that depend on the arguments is cached.

    Raises:
        BackendError: a backend was forced with strict=True and cannot.
    """
    for candidate, reason in judged(operator, function, args):
        if not reason:
            return candidate.call  # type: ignore[return-value]
    name, reason = next((candidate.backend, reason) for candidate, reason in judged(operator, function, args))
    raise BackendError(f"{operator}: backend {name!r} was asked for strictly and cannot run this: {reason}")


def prepared(prepare: Callable[..., Any], args: tuple[Any, ...]) -> Callable[..., tuple[Any, ...]] | None:
    """prepare(*args), a launch or None; where evidence gives other answers for other numbers of threads, a launch for each of
    them, and each call takes the nearest to what torch uses then."""
    with evidence.threads_noticed() as numbers:
        launch = prepare(*args)
    if launch is None or not numbers:
        return launch
    by_threads = {}
    for number in numbers:
        with evidence.with_threads(number):
            by_threads[number] = prepare(*args)
    if None in by_threads.values():
        return None

    def nearest() -> Callable[..., tuple[Any, ...]]:
        return by_threads[evidence.nearest_threads(by_threads)]

    return _switch(len(args))(by_threads.get, torch.get_num_threads, nearest)


@functools.cache
def _switch(count: int) -> Callable[..., Callable[..., tuple[Any, ...]]]:
    """Makes a function of `count` arguments, of which the last may be left out, that calls the launch of the number of threads.
    Written out: *args costs 0.3 us a call, names 0.1."""
    names = ", ".join(f"a{i}" for i in range(count))
    call = "(launch_of(threads()) or nearest())"
    code = f"lambda {names}=None: {call}({names})"
    made: Callable[..., Callable[..., tuple[Any, ...]]] = eval(f"lambda launch_of, threads, nearest: {code}")
    return made


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Runs the CPU kernels of another instruction set inside the block; for tests and benchmarks, not thread-safe."""
    before = extensions.set_isa(name)
    forget()  # launches that are prepared for another
    try:
        yield
    finally:
        extensions.set_isa(before)
        forget()


class Launches(dict[Any, Callable[..., Any]]):
    """What is prepared for calls of an operator's function, by what backend() asks for and the call's
    signature; dropped by forget()."""

    all: ClassVar[list[Launches]] = []
    MOST = 1024  # a decoder has a new signature for each token

    def __init__(self) -> None:
        super().__init__()
        self.all.append(self)

    def keep(self, key: Any, launch: Callable[..., Any]) -> None:
        if len(self) >= self.MOST:
            self.clear()
        self[key] = launch


def forget() -> None:
    """Drops all that is remembered of the kernels: after something that it depends on has changed."""
    evidence.forget()  # and the tiles of tiles.py
    _candidates.cache_clear()
    _lacks.cache_clear()
    for launches in Launches.all:
        launches.clear()
