"""Which way does a call of an operator take to its kernel?

    pyfused.layer_norm(x, ...)        the public function, ops/layer_norm.py
        |
        |-- call_prepared             a call of the same signature was checked before: its launch runs again, 1 us
        |       no                    (or, where a gradient is wanted, its launch and what autograd records of it)
        |-- bind                      checks the arguments
        |-- call_checked              runs them, and keeps the launch for call_prepared
        v
    Operator.__call__                 by who watches the call, first match:

        torch.func, forward-mode derivatives, torch.jit.trace       in_plain_torch    plain PyTorch, which they see through
        a gradient of a gradient                                    plainly           the same
        torch.compile, torch.export, dispatch modes, the profiler,
        tensor subclasses                                           registered        torch.ops.pyfused.<name>
        a gradient is wanted                                        autograd          direct, inside autograd.Function
        nobody                                                      direct            the kernel that dispatch chooses

Measured per call on one core: a direct Python call 1.3 us, Library.impl 4.5, autograd.Function 9.5, register_autograd 11 to 40.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from .. import dispatch, extensions
from ..notices import once
from ..tracing import jit_is_tracing, modes, profiler_is_on

_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter, type(None), bool, int, float, str})
_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_in_transform = torch._C._are_functorch_transforms_active  # torch.func's; their tensors have no memory of their own
# Where one of these says something true, somebody watches the operators: a launch is not enough.
WATCHERS = modes, profiler_is_on, jit_is_tracing, _in_transform
_forced = dispatch._forced.get
_signature = extensions.signature()


def _transformed() -> bool:
    return _in_transform() or forward_ad._current_level >= 0


def _wants_gradient(args: tuple[Any, ...]) -> bool:
    if torch.is_grad_enabled():
        for a in args:
            if isinstance(a, torch.Tensor) and a.requires_grad:
                return True
    return False


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _address(value: Any) -> int | None:
    return value.data_ptr() if isinstance(value, torch.Tensor) else None


class Call:
    """The ways of the table above, for one operator.

    Args:
        kernel, function: kernels/<backend>/<kernel>.py and the function in it, "forward" or "backward".
        residual: the argument, by its position, beside which the second output is a result too: x + residual.
    """

    autograd: type[torch.autograd.Function] | None = None  # absent for what is itself a backward
    overload: Any  # torch.ops.pyfused.<name>
    inference: tuple[Any, Any]  # its forms without gradients, of one result and of two

    def __init__(self, kernel: str, function: str, residual: int | None, outputs: int):
        self.kernel, self.function = kernel, function
        self._residual, self._outputs = residual, outputs
        self._launches = dispatch.Launches()
        self._prepared = extensions.prepared(self._launches, dispatch._forced, WATCHERS)
        self._recorded = dispatch.Launches()  # as _launches, with what autograd records of the call
        self._prepared_with_gradient = extensions.prepared(self._recorded, dispatch._forced, WATCHERS)
        self._reference: Any = dispatch.kernel("reference", kernel)  # now: torch.compile traces no import

    def call_prepared(self, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The results for arguments as the public function got them, in this operator's order, if a call of their signature
        was checked before; else None, and the arguments are to be checked."""
        if _is_compiling():
            return None
        return self._prepared_with_gradient(*args) if _is_grad_enabled() else self._prepared(*args)

    def call_checked(self, given: tuple[Any, ...], bound: tuple[Any, ...]) -> tuple[Any, ...]:
        """Runs the arguments `bound`, which the checks made of `given`, and keeps the launch for call_prepared(given). What
        `bound` has behind those of `given`, such as `save`, a launch need not be told.

        A launch reads addresses, so it is kept only where both have the same memory. Where the checks took a view, the launch
        is prepared for that view; autograd would miss it, so what it records is kept only where the tensors are the same.
        """
        outputs = self(*bound)
        if _is_compiling() or _transformed() or any(watcher() for watcher in WATCHERS):
            return outputs
        signature = _signature(*given)
        if signature is None or list(map(_address, given)) != list(map(_address, bound[: len(given)])):
            return outputs
        if not _is_grad_enabled():
            launch = self._launches.get((_forced(), _signature(*bound)))
            if launch is not None:
                self._launches.keep((_forced(), signature), launch)
        elif _wants_gradient(bound) and all(b is g or not _is_tensor(b) for g, b in zip(given, bound)):
            self._recorded.keep((_forced(), signature), self._recording(given, bound))
        return outputs

    def _recording(self, given: tuple[Any, ...], bound: tuple[Any, ...]) -> Callable[..., tuple[Any, ...] | None]:
        """The call with what autograd records of it, for arguments that differ from `given` in their memory alone. It returns
        None where none of them wants a gradient."""
        # torch.autograd.Function.apply in Python looks for things that cannot be here, in 5 us.
        apply = super(torch.autograd.Function, self.autograd).apply  # type: ignore[misc, arg-type]
        others = [(i, b) for i, (g, b) in enumerate(zip(given, bound)) if b is not g]
        more = bound[len(given) :]

        def record(*args: Any) -> tuple[Any, ...] | None:
            if not _wants_gradient(args):
                return None
            found = [*args, *more]
            for i, value in others:
                found[i] = value
            return apply(*found)

        return record

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        if self.autograd is None and not _is_grad_enabled():  # in a backward pass
            outputs = self.call_prepared(args)
            if outputs is not None:
                return outputs
        if _transformed() or jit_is_tracing():
            return self._in_plain_torch(args)
        if self.autograd is None and _wants_gradient(args):
            return self.plainly(*args)  # a gradient that is to be differentiated: create_graph=True
        if _is_compiling() or modes() or profiler_is_on() or not _PLAIN.issuperset(map(type, args)):
            return self._registered(args)
        if self.autograd is not None and _wants_gradient(args):
            return self.autograd.apply(*args)
        return self.direct(*args)

    def direct(self, *args: Any) -> tuple[Any, ...]:
        """Runs the chosen kernel, with no autograd and no dispatcher."""
        key = _forced(), _signature(*args)
        launch = self._launches.get(key)
        if launch is None:
            launch = dispatch.choose(self.kernel, self.function, args)
            prepare = getattr(launch, "prepare", None)
            prepared = dispatch.prepared(prepare, args) if prepare is not None and key[1] is not None else None
            if prepared is not None:
                launch = prepared
                self._launches.keep(key, launch)
        return launch(*args)

    def _in_plain_torch(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The reference, which torch.func's transforms and forward-mode derivatives go through as through any torch code; and
        torch.jit.trace, whose programs are to run without Python."""
        if not _is_compiling():
            once(
                "inside torch.func's transforms, forward-mode derivatives and torch.jit.trace pyfused's operators run in plain "
                "PyTorch"
            )
        return self.plainly(*args)

    def plainly(self, *args: Any) -> tuple[Any, ...]:
        """The reference: plain PyTorch, which autograd follows any number of times."""
        return getattr(self._reference, self.function)(*args)

    def _registered(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Through the dispatcher, which returns a single output bare; None for what only a gradient needs, where none is
        wanted."""
        overload = self.overload
        if self.autograd is not None and not _wants_gradient(args):
            overload = self.inference[self.results_of(args) - 1]
        outputs = overload(*args)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return (*outputs, *[None] * (self._outputs - len(outputs)))

    def results_of(self, args: tuple[Any, ...]) -> int:
        """How many of the outputs are results; the others are kept for a gradient."""
        return 1 if self._residual is None or args[self._residual] is None else 2
