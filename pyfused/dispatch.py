"""Which backend runs an operator? One table of preferences, the reasons that overrule it, and explain().

A backend is a folder of kernels/: `reference` (plain PyTorch), `cpu` (csrc/cpu), `triton`, `cuda` (csrc/cuda). Each holds
a module per operator with `forward`, `backward` (or one of them: it is then no candidate for the other, and the next backend
runs that, under strict=True too) and, where they matter, two kinds of function that return a reason or None:
`unsupported_forward(*args)`: the module cannot do this case; `slower_forward(*args)`: it can, and measurements say that the
next backend is faster, or closer to float64. A forced backend ignores the second kind and gives way, visibly in explain(), to
the first.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import torch

from . import _extensions

BACKENDS = ("reference", "cpu", "triton", "cuda")

# Preferences by device, best first; `reference` ends every list and can do everything.
PREFERENCES: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "reference"),
    # A CUDA kernel that no GPU has run yields to the Triton one until a result file shows it right and faster.
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
            operator of which the backend has the forward alone gets its gradients from the next one all the same.

    Raises:
        ValueError: `name` is no backend, or cannot run on this machine at all.
    """
    _check_backend(name, "name")
    token = _forced.set((name, strict))
    try:
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
        return _extensions.missing("_cpu")
    if name == "cuda":
        if _extensions.emulating_cuda():
            return ""
        reason = _extensions.missing("_cuda") or ("" if torch.cuda.is_available() else "no CUDA device")
        cards = () if reason else range(torch.cuda.device_count())
        lacking = (_extensions.cuda_lacks(torch.cuda.get_device_capability(card)) for card in cards)
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
    emulated = {"cpu": True, "cuda": _extensions.emulating_cuda(), "triton": interpreting()}[name]
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


@functools.cache
def _candidates(operator: str, function: str, device: str, dtype: torch.dtype, forced: str | None):
    """What may run, best first: (backend, callable, unsupported, slower), with everything that depends on no argument."""
    order = PREFERENCES.get(device, ("reference",))
    if forced:
        order = (forced, *(name for name in order if name != forced))
    rows = []
    for name in order:
        module = kernel(name, operator) if not _cannot_run(name, device, dtype) else None
        if module is not None and hasattr(module, function):
            slower = getattr(module, f"slower_{function}", None) if name != forced else None
            rows.append((name, getattr(module, function), getattr(module, f"unsupported_{function}", None), slower))
    return tuple(rows)


def choose(operator: str, function: str, args: tuple[Any, ...]):
    """The callable that runs `function` ("forward" or "backward") of an operator for these arguments.

    The first argument decides device and dtype. Costs about 1 us: the table is cached, only the two reasons are asked.
    """
    forced = _forced.get() or _forced_by_environment()
    tensor = args[0]
    for name, call, unsupported, slower in _candidates(
        operator,
        function,
        "cpu" if tensor.is_cpu else tensor.device.type,  # the name of a device takes 0.9 us
        tensor.dtype,
        forced[0] if forced else None,
    ):
        if forced and forced[1] and name != forced[0] and not _lacks(forced[0], operator, function):
            break
        if (unsupported is None or unsupported(*args) is None) and (slower is None or slower(*args) is None):
            return call
    name = forced[0] if forced else "reference"
    reason = next((v.reason for v in verdicts(operator, function, args) if v.backend == name), "")
    raise BackendError(f"{operator}: backend {name!r} was asked for strictly and cannot run this: {reason}")


class Launches(dict[Any, Callable[..., tuple[Any, ...]]]):
    """What is prepared for calls of an operator's function, by what backend() asks for and the call's
    signature; dropped by forget()."""

    all: ClassVar[list[Launches]] = []
    MOST = 1024  # a decoder has a new signature for each token

    def __init__(self) -> None:
        super().__init__()
        self.all.append(self)

    def keep(self, key: Any, launch: Callable[..., tuple[Any, ...]]) -> None:
        if len(self) >= self.MOST:
            self.clear()
        self[key] = launch


def forget() -> None:
    """Drops all that is remembered of the kernels: after something that it depends on has changed."""
    _candidates.cache_clear()
    _lacks.cache_clear()
    for launches in Launches.all:
        launches.clear()


@dataclass(frozen=True)
class Verdict:
    """One backend's row in an explanation: does it run, and if not, why not."""

    backend: str
    runs: bool
    reason: str


@dataclass(frozen=True)
class Explanation:
    """What explain() returns: `backend` would run; str() is a table with every backend's reason."""

    operator: str
    backend: str
    verdicts: tuple[Verdict, ...]

    def __str__(self) -> str:
        rows = [f"{self.operator}: {self.backend}"]
        rows += [f"  {'->' if v.runs else '  '} {v.backend:<10} {v.reason}" for v in self.verdicts]
        return "\n".join(rows)


def verdicts(operator: str, function: str, args: tuple[Any, ...]) -> tuple[Verdict, ...]:
    """Every backend's verdict on one call, in the order in which they are asked."""
    forced = _forced.get() or _forced_by_environment()
    device, dtype = args[0].device.type, args[0].dtype
    order = PREFERENCES.get(device, ("reference",))
    order = (*((forced[0],) if forced else ()), *order, *BACKENDS)
    rows: list[Verdict] = []
    found = False
    for name in dict.fromkeys(order):
        listed = name in PREFERENCES.get(device, ("reference",)) or bool(forced and forced[0] == name)
        reason = _cannot_run(name, device, dtype)
        module = None if reason else kernel(name, operator)
        if not reason and module is None:
            reason = "has no such operator"
        if not reason and _lacks(name, operator, function):
            reason, module = f"has no {function} of this operator", None
        if module is not None:
            unsupported = getattr(module, f"unsupported_{function}", None)
            slower = getattr(module, f"slower_{function}", None)
            reason = (unsupported and unsupported(*args)) or ""
            if not reason and slower and not (forced and forced[0] == name):
                reason = slower(*args) or ""
            if not reason and not listed:
                reason = f"not used for {device} tensors unless forced"
        runs = not reason and not found
        found = found or runs
        if not reason:
            forced_here = forced is not None and forced[0] == name
            reason = ("forced" if forced_here else "first that fits") if runs else "fits, and comes later"
        rows.append(Verdict(name, runs, reason))
    return tuple(rows)


def explain(operator: str, *args: Any, **kwargs: Any) -> Explanation:
    """Says which backend would run an operator for these arguments, and why the others would not. Runs no kernel.

    Args:
        operator: its name, such as "attention".
        args, kwargs: what one would pass to the operator itself.

    Example:
        print(pyfused.explain("layer_norm", x, weight, bias))
    """
    from . import ops

    module = ops.MODULES.get(operator)
    if module is None:
        raise ValueError(f"operator={operator!r} is unknown; there are {', '.join(ops.MODULES)}")
    rows = verdicts(operator, "forward", module.bind(*args, **kwargs))
    return Explanation(operator, next(v.backend for v in rows if v.runs), rows)
