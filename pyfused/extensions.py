"""Which compiled kernels can run here? Loads pyfused._cpu and pyfused._cuda; missing() says why one cannot be used,
cudnn_missing() why torch's cuDNN cannot, gluon_missing() why kernels for Hopper cannot."""

from __future__ import annotations

import functools
import importlib
import os
import re
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from types import ModuleType
from typing import Any

import torch
from torch.autograd import forward_ad

from . import interface

# The kernels' numbers for dtypes (csrc/include/pyfused/simd.h).
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

# Instruction sets for dot products, weakest first, and the set whose other kernels they are used with (CMakeLists.txt).
DOT_PRODUCTS = {"avx2_vnni": "avx2", "avx512_vnni": "avx512", "avx512_bf16": "avx512", "avx512_amx": "avx512"}

# Sets of them that no processor of ours has run. Nothing chooses them, not even evidence; PYFUSED_ISA and use_isa force them.
UNPROVEN = frozenset({"avx512_amx"})

_active_isa: str | None = None
_emulated: Callable[[], ModuleType] | None = None
_emulated_cudnn = False
_emulated_gluon = False
GLUON_NEEDS = "3.6."  # the release of Triton whose Gluon the kernels are written in and were measured with


@functools.cache
def _load(name: str) -> tuple[ModuleType | None, str]:
    try:
        module = importlib.import_module(f"pyfused.{name}")
        if reason := _outdated(name, module):
            warnings.warn(f"{reason}. Until then it is not used", RuntimeWarning, stacklevel=2)
            return None, reason
        if name == "_cpu" and not module.supported:  # as PYFUSED_BUILD_ISAS="avx512" on a processor without it
            reason = "the extension pyfused._cpu was built for instruction sets that this processor lacks"
            warnings.warn(f"{reason}; it is not used", RuntimeWarning, stacklevel=2)
            return None, reason
        use_tensors(module)
        return module, ""
    except ModuleNotFoundError as error:
        if error.name != f"pyfused.{name}":
            raise
        return None, f"the extension pyfused.{name} is not built"
    except Exception as error:  # a broken build must not break `import pyfused`
        warnings.warn(f"pyfused.{name} cannot be loaded and is not used: {error}", RuntimeWarning, stacklevel=2)
        return None, f"the extension pyfused.{name} cannot be loaded: {error}"


def use_tensors(module: ModuleType) -> None:
    """Lets an extension read tensors by torch's capsule, which torch 2.10 and later have. Without it C++ reads tensors more
    slowly, and CPU calls have no signature."""
    if hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        module.use_tensors(torch.Tensor.__dlpack_c_exchange_api__, torch.Tensor, torch.nn.Parameter)


def _outdated(name: str, module: ModuleType) -> str:
    """Why an extension does not fit this checkout; "" if it does, or if there is no checkout. Its kernels would take their
    arguments for others. One that was built without setup.py says "": nobody knows what it was built for. One that says
    nothing is older than this check."""
    built, wanted = getattr(module, "interface", "none"), interface.digest(name)
    if not built or not wanted or built == wanted:
        return ""
    checkout = interface.SOURCES.parent
    return (
        f"the extension pyfused.{name} was built from other sources: build it again (`pip install -e .` in {checkout})"
    )


def cpu_supported() -> list[str]:
    """The instruction sets that were built and that this processor has, weakest first. Empty without the extension."""
    module, _ = _load("_cpu")
    return list(module.supported) if module else []


@functools.cache
def _forced_isa() -> str | None:
    """PYFUSED_ISA, or None if it is not set."""
    supported, forced = cpu_supported(), os.environ.get("PYFUSED_ISA")
    if forced and supported and forced not in supported:
        raise ValueError(f"PYFUSED_ISA={forced!r} cannot run: this build and processor support {', '.join(supported)}")
    return forced or None


@functools.cache
def _default_isa() -> str | None:
    """The best set. Those for dot products are chosen product by product, where evidence shows them faster."""
    return next((name for name in reversed(cpu_supported()) if name not in DOT_PRODUCTS), None)


def isa() -> str | None:
    """The instruction set in use, or None without the extension."""
    return _active_isa or _forced_isa() or _default_isa()


def base_isa() -> str | None:
    """The set of all kernels but those of dot_products()."""
    name = isa()
    return DOT_PRODUCTS.get(name, name) if name else None


def dot_products() -> str | None:
    """The set for dot products that may be used beside base_isa(): the forced one, or this processor's best proven one
    if no set is forced; else None. Evidence decides for each product (evidence.dot_products), unless it is forced."""
    forced = _active_isa or _forced_isa()
    if forced:
        return forced if forced in DOT_PRODUCTS else None
    base = base_isa()
    known = (name for name in reversed(cpu_supported()) if name not in UNPROVEN)
    return next((name for name in known if DOT_PRODUCTS.get(name) == base), None)


def set_isa(name: str | None) -> str | None:
    """Chooses an instruction set (None for the best) and returns the previous choice. Use it through dispatch.use_isa."""
    global _active_isa
    if name is not None and name not in cpu_supported():
        raise ValueError(f"isa {name!r} cannot run: this build and processor support {', '.join(cpu_supported())}")
    before, _active_isa = _active_isa, name
    return before


def _cpp_reads_tensors() -> bool:
    """Whether the extension is there and can read a tensor's address and sizes without Python."""
    return _load("_cpu")[0] is not None and hasattr(torch.Tensor, "__dlpack_c_exchange_api__")


def signature() -> Callable[..., Any]:
    """A function of a call's arguments. Its results for two calls are equal if and only if the calls differ only in the values
    of their tensors. A signature of GPU tensors includes device and alignment. The function returns None for arguments that it
    does not know. Without the extension, or with a torch that lacks the capsule, only calls on a GPU have a signature."""
    if _cpp_reads_tensors():
        return _load("_cpu")[0].signature  # type: ignore[union-attr]
    return gpu_signature if torch.backends.cuda.is_built() else lambda *args: None


_VALUES = frozenset({type(None), bool, int, float, str})
_TENSORS = frozenset({torch.Tensor, torch.nn.Parameter})


def gpu_signature(*args: Any) -> tuple[Any, ...] | None:
    """signature() in Python, for GPU tensors: a few microseconds. C++ has its own in csrc/include/pyfused/python_call.h."""
    words: list[Any] = []
    for a in args:
        kind = type(a)
        if kind in _VALUES:
            words.append((kind, a))
        elif kind in _TENSORS and a.is_cuda and not a.is_neg():
            words.append((a.dtype, a.get_device(), a.data_ptr() % 16 == 0, a.shape, a.stride()))
        else:
            return None
    return tuple(words)


def prepared(
    launches: dict[Any, Callable[..., Any]],
    forced: ContextVar[Any],
    watchers: tuple[Callable[[], Any], ...],
    otherwise: Callable[..., Any] | None = None,
    count: int = 0,
) -> Callable[..., Any]:
    """A function that runs a call's prepared launch: launches[forced.get(), signature of the call].

    It returns the launch's first `count` outputs: a tuple of all for 0, the output itself for 1. If there is no such launch, or
    a watcher returns something true, or a forward-mode derivative is taken, it returns otherwise(*args), or None.
    """
    if _cpp_reads_tensors():
        return _load("_cpu")[0].prepared(launches, forced, vars(forward_ad), otherwise, count, *watchers)  # type: ignore[union-attr]
    if torch.backends.cuda.is_built():
        return gpu_prepared(launches, forced, watchers, otherwise, count)
    return otherwise or (lambda *args: None)


def gpu_prepared(
    launches: dict[Any, Callable[..., Any]],
    forced: ContextVar[Any],
    watchers: tuple[Callable[[], Any], ...],
    otherwise: Callable[..., Any] | None,
    count: int,
) -> Callable[..., Any]:
    """prepared() in Python, with gpu_signature."""

    def run(*args: Any, **names: Any) -> Any:
        key = None if names else gpu_signature(*args)
        launch = launches.get((forced.get(), key)) if key is not None else None
        if launch is None or forward_ad._current_level >= 0 or any(watcher() for watcher in watchers):
            return otherwise(*args, **names) if otherwise else None
        outputs = launch(*args)
        if count == 0:
            return outputs
        return outputs[0] if count == 1 else outputs[:count]

    return run


def same() -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]] | None:
    """`unchanged`, `memory` and `same_memory` of csrc/include/pyfused/python_same.h; None without the extension."""
    module = _load("_cpu")[0]
    return None if module is None else (module.unchanged, module.memory, module.same_memory)


def cpu(dot_products: str | None = None) -> ModuleType:
    """The kernels for the instruction set in use, pyfused._cpu.<isa>; or those of a set for dot products, which has few."""
    module, reason = _load("_cpu")
    if module is None:
        raise RuntimeError(reason)
    if dot_products == "avx512_amx" and not module.ask_for_tiles():
        raise RuntimeError("isa 'avx512_amx' cannot run: the system does not give this process AMX's registers")
    return getattr(module, dot_products or base_isa() or "baseline")


def emulate_cuda(load: Callable[[], ModuleType]) -> None:
    """From now on cuda() returns load(), and its kernels run on CPU tensors. The tests compile the CUDA sources for the CPU and
    load them so. Call it before any operator runs."""
    global _emulated
    _emulated = load


def emulating_cuda() -> bool:
    """Whether emulate_cuda was called: CUDA kernels then take CPU tensors."""
    return _emulated is not None


def cuda() -> ModuleType:
    """The CUDA kernels: pyfused._cuda."""
    if _emulated is not None:
        return _emulated()
    module, reason = _load("_cuda")
    if module is None:
        raise RuntimeError(reason)
    return module


def cuda_lacks(capability: tuple[int, int]) -> str:
    """Why pyfused._cuda cannot run on a GPU of this compute capability; "" if it can, or does not say."""
    module, _ = _load("_cuda")
    built = getattr(module, "architectures", "").split()
    if not built or any(_runs_on(architecture, capability) for architecture in built):
        return ""
    return f"pyfused._cuda has no code for sm_{capability[0]}{capability[1]}; it was built for {', '.join(built)}"


def _runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code for a CMake architecture runs on a chip. "80-real" is machine code: it runs on 8.0 and later minor versions.
    "90-virtual" is PTX: it runs on all later chips. "90" is both. "90a" runs on 9.0 only, "100f" on 10.0 and its family."""
    number, suffix, kind = re.fullmatch(r"(\d+)([af]?)-?(real|virtual)?", architecture).groups()  # type: ignore[union-attr]
    major, minor = divmod(int(number), 10)
    if suffix == "a":
        return capability == (major, minor)
    same = capability[0] == major and capability[1] >= minor
    return same or (kind != "real" and suffix == "" and capability >= (major, minor))


def emulate_cudnn() -> None:
    """From now on the backend cudnn takes CPU tensors. The tests give torch's cuDNN operators a stand-in there. Call it before
    any operator runs."""
    global _emulated_cudnn
    _emulated_cudnn = True


def emulating_cudnn() -> bool:
    """Whether emulate_cudnn was called."""
    return _emulated_cudnn


def cudnn_missing() -> str:
    """Why torch cannot call cuDNN's attention here; "" if it can."""
    if _emulated_cudnn:
        return ""
    if not torch.cuda.is_available():
        return "no CUDA device"
    version = torch.version.cuda
    if version is None or not torch.backends.cudnn.is_available():
        return "this torch has no cuDNN"
    if tuple(map(int, version.split(".")[:2])) < (12, 9):
        # pytorch's pull request 171627 switched it off there by default
        return f"this torch is built for CUDA {version}; torch trusts cuDNN's attention from 12.9 on"
    return ""


def emulate_gluon() -> None:
    """From now on the backend gluon takes CPU tensors. The tests have an interpreter for its kernels. Call it before any
    operator runs."""
    global _emulated_gluon
    _emulated_gluon = True


def emulating_gluon() -> bool:
    """Whether emulate_gluon was called."""
    return _emulated_gluon


def is_hopper(index: int) -> bool:
    """Whether this GPU is one of NVIDIA's with a compute capability of 9."""
    return torch.cuda.get_device_capability(index)[0] == 9


def gluon_missing() -> str:
    """Why kernels for Hopper cannot run here; "" if they can, apart from Triton."""
    if _emulated_gluon:
        return ""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.version.hip or not any(is_hopper(index) for index in range(torch.cuda.device_count())):  # an MI300 says 9.4
        return "its kernels are for Hopper (sm_90)"
    found = str(getattr(importlib.import_module("triton"), "__version__", "of no known version"))
    if not found.startswith(GLUON_NEEDS):
        return f"Triton {found} is installed; its language for one chip still changes, and {GLUON_NEEDS[:-1]} is tested"
    return ""


def missing(name: str) -> str:
    """Why the extension `_cpu` or `_cuda` cannot be used; "" if it can."""
    return _load(name)[1]
