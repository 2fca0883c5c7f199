"""Which backend runs an operator? One order of preference, and the reasons that overrule it.

A backend is a folder of kernels/: `reference` (plain PyTorch), `cpu` (csrc/cpu), `triton`, `cuda` (csrc/cuda), `cudnn`
(NVIDIA's, attention alone), `gluon` (Triton's language for one chip: attention for Hopper, by hand).
It has a module for each operator, with `forward`, `backward` or both. If it lacks one, the next backend runs that, even with
strict=True.

On a GPU the fastest backend in the evidence files (evidence/) is tried first, or Triton if nothing was measured. A backend is
skipped for one of three reasons:
    unsupported_<function>(*args) of its module: it cannot run this case;
    declined_<function>(*args) of its module: the next backend is better on every machine, for example closer to float64;
    evidence: it is a hand-written CUDA kernel or cuDNN's, and nothing shows that it is right on this kind of machine.
A forced backend is skipped only for the first reason, and explain() shows that. CPU kernels can also call the library, where
that was measured to be faster; left_to_library_<function>(*args) says why.

A call with an empty tensor always runs on the reference, even if another backend is forced. A kernel would gain nothing there,
and need not handle division by a size of 0 or an empty grid.
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
from .setting import set_to

BACKENDS = ("reference", "cpu", "triton", "cuda", "cudnn", "gluon")

# The order on each device where nothing was measured. `reference` is last and can run everything.
PREFERENCES: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "reference"),
    # The CUDA kernels, cuDNN's and those for Hopper have not run on every GPU: Triton comes first until evidence shows them
    # right and faster.
    "cuda": ("triton", "cuda", "cudnn", "gluon", "reference"),
}

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_forced: ContextVar[tuple[str, bool] | None] = ContextVar("pyfused_backend", default=None)


class BackendError(RuntimeError):
    """A backend was forced with strict=True and cannot run this call."""


@contextmanager
def backend(name: str, *, strict: bool = False) -> Iterator[None]:
    """Runs every operator inside the block on one backend, if that supports the call. So does the backward of such an operator
    wherever it is called, except inside another such block. On a GPU, where the backward runs in a thread of its own, a block
    around the backward alone is not seen. Compiled programs look when they run: their backward on a GPU sees no block.

    Args:
        name: "reference", "cpu", "triton", "cuda", "cudnn" or "gluon".
        strict: raise BackendError for a call that the backend does not support; by default the next backend runs it, as
            explain() shows. Two things run elsewhere even so: the backward of an operator, if the backend has only the
            forward, and calls with an empty tensor.

    Raises:
        ValueError: `name` is not a backend, or cannot run on this machine at all.
    """
    _check_backend(name, "name")
    with as_forced((name, strict)):
        yield


@contextmanager
def as_forced(forced: tuple[str, bool]) -> Iterator[None]:
    """Inside the block the backend of that name is forced, strictly or not."""
    with set_to(_forced, forced), evidence.one_way(library=False):
        yield


def _check_backend(name: str, argument: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{argument}={name!r} is not a backend; it takes one of {', '.join(BACKENDS)}")
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
    """Why this backend can run nothing on this machine; "" if it can run something."""
    if name == "cpu":
        return extensions.missing("_cpu")
    if name == "cuda":
        if extensions.emulating_cuda():
            return ""
        reason = extensions.missing("_cuda") or ("" if torch.cuda.is_available() else "no CUDA device")
        cards = () if reason else range(torch.cuda.device_count())
        lacking = (extensions.cuda_lacks(torch.cuda.get_device_capability(card)) for card in cards)
        return reason or next(filter(None, lacking), "")
    if name in ("triton", "gluon") and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if name == "triton" and not (torch.cuda.is_available() or interpreting()):
        return "no CUDA device (and TRITON_INTERPRET=1 is not set)"
    if name == "cudnn":
        return extensions.cudnn_missing()
    if name == "gluon":
        return extensions.gluon_missing()
    return ""


def _cannot_run(name: str, device: str, dtype: torch.dtype) -> str:
    """Why this backend takes no tensors of this device and dtype, for any operator; "" if it does."""
    reason = missing(name)
    if reason or name == "reference":
        return reason
    emulated = {
        "cpu": True,
        "cuda": extensions.emulating_cuda(),
        "triton": interpreting(),
        "cudnn": extensions.emulating_cudnn(),
        "gluon": extensions.emulating_gluon(),
    }[name]
    takes = "cpu" if emulated else "cuda"
    if device != takes:
        return f"runs on {takes} tensors, not on {device}"
    if dtype not in KERNEL_DTYPES:
        return f"takes float32, float16 and bfloat16, not {evidence.name_of(dtype)}"
    return ""


@functools.cache
def kernel(name: str, operator: str) -> ModuleType | None:
    """The module kernels/<backend>/<operator>.py, or None if there is none."""
    module = f"pyfused.kernels.{name}.{operator}"
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        return None


@functools.cache
def _lacks_function(name: str, operator: str, function: str) -> bool:
    """Whether a backend has the operator without this function ("forward" or "backward")."""
    module = kernel(name, operator)
    return module is not None and not hasattr(module, function)


class _Candidate(NamedTuple):
    """A backend for one function of an operator, one device and one dtype."""

    backend: str
    call: Callable[..., tuple[Any, ...]] | None
    reason: str  # why it runs no call at all; "" if it may
    objections: tuple[Callable[..., str | None], ...]  # of a call's arguments: why it does not run that call, or None
    # reads the settings of the process that may change its mind, and the objection that comes of them; None if none may
    settings: tuple[Callable[[], Any], str] | None = None


class _Candidates(NamedTuple):
    """Every backend, in the order of preference."""

    rows: tuple[_Candidate, ...]
    ranked: bool  # whether evidence may change the order for a call


@functools.cache
def _candidates(
    operator: str, function: str, device: str, dtype: torch.dtype, forced: tuple[str, bool] | None
) -> _Candidates:
    """Every backend, the forced one first, with everything that can be decided without a call's arguments."""
    listed = PREFERENCES.get(device, ("reference",))
    order = (*((forced[0],) if forced else ()), *listed, *BACKENDS)
    strictly = forced[0] if forced and forced[1] and not _lacks_function(forced[0], operator, function) else None
    rows = []
    for name in dict.fromkeys(order):
        reason = _cannot_run(name, device, dtype)
        module = None if reason else kernel(name, operator)
        objections: tuple[Any, ...] = ()
        if module is None:
            reason = reason or "has no such operator"
        elif not hasattr(module, function):
            reason = f"has no {function} of this operator"
        else:
            is_forced = forced is not None and name == forced[0]
            objections = (getattr(module, f"unsupported_{function}", None),)
            if not is_forced:
                objections += (
                    getattr(module, f"declined_{function}", None),
                    evidence.unproven(name, operator, function, device),
                )
                if name not in listed:
                    reason = f"not used for {device} tensors unless forced"
                elif strictly:
                    reason = f"{strictly!r} is forced with strict=True"
        call = None if module is None else getattr(module, function, None)
        settings = None
        if module is not None and hasattr(module, "settings"):
            settings = module.settings, module.SETTINGS_FORBID
        rows.append(_Candidate(name, call, reason, tuple(filter(None, objections)), settings))
    return _Candidates(tuple(rows), forced is None and evidence.ranks(operator, function, device))


def _by_speed(
    rows: tuple[_Candidate, ...], operator: str, function: str, device: str, args: tuple[Any, ...]
) -> list[_Candidate]:
    """The candidates sorted by measured speed, the fastest first. Without measurements their order stays."""
    shapes, size = evidence.shapes_of(operator, function, args)
    rank = evidence.rank(device, operator, function, args[0].dtype, shapes, size)
    return sorted(rows, key=lambda candidate: rank.get(candidate.backend, 0.0), reverse=True)


_EMPTY = "a tensor is empty: calls with an empty tensor run in plain PyTorch"


def _is_empty(args: tuple[Any, ...]) -> bool:
    """Whether some tensor of a call has no element."""
    for a in args:  # noqa: SIM110 - any() takes half a microsecond more
        if isinstance(a, torch.Tensor) and not a.numel():
            return True
    return False


def forced() -> tuple[str, bool] | None:
    """The backend forced by backend() or by PYFUSED_BACKEND, and whether strictly; None if there is none."""
    return _forced.get() or _forced_by_environment()


def judged(operator: str, function: str, args: tuple[Any, ...]) -> Iterator[tuple[_Candidate, str]]:
    """Every backend in the order in which it is tried, with the reason why it does not run this call, or "". Device and dtype
    are the first argument's."""
    tensor = args[0]
    empty = _is_empty(args)
    device = "cpu" if tensor.is_cpu else tensor.device.type  # device.type takes 0.9 us
    rows, ranked = _candidates(operator, function, device, tensor.dtype, forced())
    for candidate in _by_speed(rows, operator, function, device, args) if ranked and not empty else rows:
        reason = candidate.reason
        if empty:
            reason = "" if candidate.backend == "reference" else reason or _EMPTY
        elif not reason:
            for objection in candidate.objections:
                reason = objection(*args) or ""
                if reason:
                    break
        yield candidate, reason


def choose(operator: str, function: str, args: tuple[Any, ...]) -> Callable[..., tuple[Any, ...]]:
    """The kernel for `function` ("forward" or "backward") of an operator, from the first backend that can run these arguments.
    Takes about 1 us: everything that does not depend on the arguments is cached.

    Raises:
        BackendError: a backend was forced with strict=True and cannot run them.
    """
    return chosen(operator, function, args)[0]


def chosen(
    operator: str, function: str, args: tuple[Any, ...]
) -> tuple[Callable[..., tuple[Any, ...]], Callable[[], Any] | None]:
    """choose(), and a function that reads the settings of the process on which the choice depends; None if on none."""
    settings = None
    for candidate, reason in judged(operator, function, args):
        if candidate.settings is not None and reason in ("", candidate.settings[1]):
            settings = candidate.settings[0]
        if not reason:
            return candidate.call, settings  # type: ignore[return-value]
    name, reason = next((candidate.backend, reason) for candidate, reason in judged(operator, function, args))
    raise BackendError(f"{operator}: backend {name!r} was forced with strict=True and cannot run this call: {reason}")


def prepared(prepare: Callable[..., Any], args: tuple[Any, ...]) -> Callable[..., tuple[Any, ...]] | None:
    """prepare(*args): a launch, or None. If evidence chooses differently for different numbers of threads, a launch is prepared
    for each number, and each call uses the one nearest to torch's number at that time."""
    with evidence.threads_noticed() as counts:
        launch = prepare(*args)
    if launch is None or not counts:
        return launch
    by_threads = {}
    for count in counts:
        with evidence.with_threads(count):
            by_threads[count] = prepare(*args)
    if None in by_threads.values():
        return None

    def nearest() -> Callable[..., tuple[Any, ...]]:
        return by_threads[evidence.nearest_threads(by_threads)]

    return _thread_switch(len(args))(by_threads.get, torch.get_num_threads, nearest)


@functools.cache
def _thread_switch(count: int) -> Callable[..., Callable[..., tuple[Any, ...]]]:
    """Makes a function that takes `count` arguments, the last of which may be left out, and calls the launch for torch's number
    of threads. It is generated with named arguments, which cost 0.1 us a call; *args costs 0.3 us."""
    names = ", ".join(f"a{i}" for i in range(count))
    call = "(launch_of(threads()) or nearest())"
    code = f"lambda {names}=None: {call}({names})"
    made: Callable[..., Callable[..., tuple[Any, ...]]] = eval(f"lambda launch_of, threads, nearest: {code}")
    return made


class WholeCall(functools.partial[Any]):
    """A kernel in the place of a prepared launch: the choice of it is kept. It reads all arguments."""


class Conditional:
    """A launch that serves as long as `settings()` returns what it returns now. After a change, otherwise(*args) runs."""

    def __init__(self, settings: Callable[[], Any], launch: Callable[..., Any], otherwise: Callable[..., Any]):
        self._settings, self.launch, self._otherwise = settings, launch, otherwise
        self._now = settings()

    def __call__(self, *args: Any) -> Any:
        return (self.launch if self._settings() == self._now else self._otherwise)(*args)

    def but(self, launch: Callable[..., Any], otherwise: Callable[..., Any]) -> Conditional:
        """Another launch under the same settings."""
        found = Conditional(self._settings, launch, otherwise)
        found._now = self._now
        return found


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Inside the block CPU kernels run with another instruction set. For tests and benchmarks; not thread-safe."""
    before = extensions.set_isa(name)
    forget()  # prepared launches hold kernels of one instruction set
    try:
        yield
    finally:
        extensions.set_isa(before)
        forget()


class Launches(dict[Any, Callable[..., Any]]):
    """The prepared launches of one operator's function, by (forced backend, signature of the call). forget() drops them."""

    all: ClassVar[list[Launches]] = []
    MOST = 1024  # a decoder makes a new signature for each token

    def __init__(self) -> None:
        super().__init__()
        self.all.append(self)

    def keep(self, key: Any, launch: Callable[..., Any]) -> None:
        if len(self) >= self.MOST:
            self.clear()
        self[key] = launch


def forget() -> None:
    """Drops prepared launches and cached decisions. Call it when evidence, tiles, kernels or the instruction set change."""
    evidence.forget()  # also forgets the tiles of tiles.py
    _candidates.cache_clear()
    _lacks_function.cache_clear()
    for launches in Launches.all:
        launches.clear()
