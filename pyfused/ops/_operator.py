"""How does an operator reach its kernels? Registration in torch.ops.pyfused, autograd, and the direct call in eager mode.

Measured per call on one core: a direct Python call 1.3 us, Library.impl 4.5, autograd.Function 9.5, register_autograd 11
to 40. So eager mode with plain tensors calls the kernel directly, through autograd.Function where a gradient is wanted;
tensor subclasses and torch.compile go through the registered operator, which has its own fake and autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from .. import _extensions, dispatch
from .._notices import once
from .._tracing import jit_is_tracing, modes, profiler_is_on
from ._autocast import without_autocast

LIBRARY = torch.library.Library("pyfused", "DEF")
_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter, type(None), bool, int, float, str})
_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_in_transform = torch._C._are_functorch_transforms_active  # torch.func's; their tensors have no memory of their own
# Where one of these says something true, a launch is not enough.
_WATCHERS = modes, profiler_is_on, jit_is_tracing, _is_grad_enabled, _in_transform
_forced = dispatch._forced.get
_signature = _extensions.signature()


def _transformed() -> bool:
    return _in_transform() or forward_ad._current_level >= 0


def _wants_gradient(args: tuple[Any, ...]) -> bool:
    if torch.is_grad_enabled():
        for a in args:
            if isinstance(a, torch.Tensor) and a.requires_grad:
                return True
    return False


def _address(value: Any) -> int | None:
    return value.data_ptr() if isinstance(value, torch.Tensor) else None


class Operator:
    """A registered operator. Calling it with positional arguments returns the outputs of its schema, as a tuple.

    Args:
        name: the name in torch.ops.pyfused; `<kernel>_backward` calls `backward` of kernels/<backend>/<kernel>.py.
        schema: arguments and returns, as torch.library.define takes them.
        fake: the shapes, dtypes and strides of the outputs for given inputs.
        setup_context, backward: as torch.autograd.Function has them; absent for operators that are themselves backward.
        residual: the argument, by its position, beside which the second output is a result too: x + residual.

    A kernel may return None for an output that was not asked for; the registered operator returns an empty tensor there. Of
    a differentiable operator, `<name>_inference` (with a residual in its place `<name>_inference_sum`) is registered too,
    which returns the results alone and has no gradient: what a trace without gradients holds. A call of
    it that repeats an earlier one's signature costs what an eager call does; the operator with its empty tensors and its
    autograd costs 24 us above the kernel.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        fake: Callable[..., Any],
        setup_context: Callable[..., None] | None = None,
        backward: Callable[..., Any] | None = None,
        residual: int | None = None,
    ):
        self.name = name
        self.kernel = name.removesuffix("_backward")
        self.function = "backward" if name.endswith("_backward") else "forward"
        self._launches = dispatch.Launches()
        self._again = _extensions.prepared(self._launches, dispatch._forced, _WATCHERS)
        self._reference: Any = dispatch.kernel("reference", self.kernel)  # now: torch.compile traces no import
        LIBRARY.define(f"{name}{schema}")
        LIBRARY.impl(name, self._registered, "CompositeExplicitAutograd")
        torch.library.register_fake(f"pyfused::{name}", fake, lib=LIBRARY)
        self.autograd: type[torch.autograd.Function] | None = None
        if backward is not None and setup_context is not None:
            backward = without_autocast(backward)
            shortened: Any = _Shortened(self)
            torch.library.register_autograd(f"pyfused::{name}", backward, setup_context=setup_context, lib=shortened)
            members = {
                "forward": staticmethod(self.direct),
                "setup_context": staticmethod(setup_context),
                "backward": staticmethod(once_differentiable(backward)),
            }
            self.autograd = type(f"pyfused.{name}", (torch.autograd.Function,), members)
        self.overload = getattr(torch.ops.pyfused, name).default
        self._residual = residual
        self._outputs = schema.partition("->")[2].count("Tensor")
        if self.autograd is not None:
            self._inference = self._without_gradient("inference", schema, fake, 1)
            self._inference_sum = None if residual is None else self._without_gradient("inference_sum", schema, fake, 2)

    def _without_gradient(self, suffix: str, schema: str, fake: Callable[..., Any], count: int) -> Any:
        """The registered operator <name>_<suffix> of the first `count` outputs."""
        name = f"{self.name}_{suffix}"

        def run(*args: Any) -> Any:
            outputs = self.direct(*args)
            return outputs[0] if count == 1 else outputs[:count]

        def run_fake(*args: Any) -> Any:
            outputs = fake(*args)
            if isinstance(outputs, torch.Tensor):
                return outputs
            return outputs[0] if count == 1 else outputs[:count]

        LIBRARY.define(f"{name}{schema.partition('->')[0]}-> ({', '.join(['Tensor'] * count)})")
        LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"pyfused::{name}", run_fake, lib=LIBRARY)
        overload = getattr(torch.ops.pyfused, name).default
        if hasattr(overload, "_op"):  # what a call from Python runs, as those of compiled programs are; no public name
            # Through torch's dispatcher and back is 9 us, which a prepared launch need not go.
            overload._op = _extensions.prepared(self._launches, dispatch._forced, _WATCHERS, overload._op, count)
        return overload

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        if _transformed() or jit_is_tracing():
            return self._in_plain_torch(args)
        if _is_compiling() or modes() or profiler_is_on() or not _PLAIN.issuperset(map(type, args)):
            return self._overloaded(args)
        if self.autograd is not None and _wants_gradient(args):
            return self.autograd.apply(*args)
        return self.direct(*args)

    def again(self, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The outputs for arguments as the public function got them, in this operator's order, if a call of their signature
        was found good before and no gradient is wanted; else None, and the arguments are to be checked."""
        return None if _is_compiling() else self._again(*args)

    def first(self, given: tuple[Any, ...], bound: tuple[Any, ...]) -> tuple[Any, ...]:
        """Runs the arguments `bound`, which the checks made of those of again(), and remembers them for it where they have
        the same memory: a launch reads addresses, and where the checks took a view it is prepared for that view."""
        outputs = self(*bound)
        if not (_is_compiling() or _transformed() or any(watcher() for watcher in _WATCHERS)):
            signature = _signature(*given)
            launch = self._launches.get((_forced(), _signature(*bound)))
            if (
                signature is not None
                and launch is not None
                and list(map(_address, given)) == list(map(_address, bound))
            ):
                self._launches.keep((_forced(), signature), launch)
        return outputs

    def direct(self, *args: Any) -> tuple[Any, ...]:
        """Runs the chosen kernel, with no autograd and no dispatcher."""
        key = _forced(), _signature(*args)
        launch = self._launches.get(key)
        if launch is None:
            launch = dispatch.choose(self.kernel, self.function, args)
            prepare = getattr(launch, "prepare", None)
            prepared = prepare(*args) if prepare is not None and key[1] is not None else None
            if prepared is not None:
                self._launches.keep(key, prepared)
                launch = prepared
        return launch(*args)

    def _in_plain_torch(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The reference, which torch.func's transforms and forward-mode derivatives go through as through any torch code; and
        torch.jit.trace, whose programs are to run without Python."""
        if not _is_compiling():
            once(
                "inside torch.func's transforms, forward-mode derivatives and torch.jit.trace pyfused's operators run in plain "
                "PyTorch"
            )
        return getattr(self._reference, self.function)(*args)

    def _registered(self, *args: Any) -> torch.Tensor | tuple[torch.Tensor, ...]:
        outputs = self.direct(*args)
        if len(outputs) == 1:
            return outputs[0]
        return tuple([t if t is not None else args[0].new_empty(0) for t in outputs])

    def _overloaded(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Through the dispatcher, which returns a single output bare; None for what only a gradient needs, where none is
        wanted."""
        overload = self.overload
        if self.autograd is not None and not _wants_gradient(args):
            summed = self._residual is not None and args[self._residual] is not None
            overload = self._inference_sum if summed else self._inference
        outputs = overload(*args)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return (*outputs, *[None] * (self._outputs - len(outputs)))


class _Shortened:
    """The library as register_autograd sees it: what it registers is asked only where there is something to differentiate, or
    something looks on. Otherwise the kernel runs at once, as in an exported program that is run without gradients."""

    def __init__(self, operator: Operator):
        self._operator = operator

    def impl(self, name: str, autograd: Callable[..., Any], key: str, *, with_keyset: bool) -> None:
        run = self._operator._registered

        def shortened(keyset: Any, *args: Any) -> Any:
            if not _PLAIN.issuperset(map(type, args)) or modes() or _transformed() or _is_compiling():
                return autograd(keyset, *args)
            if _wants_gradient(args):
                return autograd(keyset, *args)
            return run(*args)

        LIBRARY.impl(name, shortened, key, with_keyset=with_keyset)
