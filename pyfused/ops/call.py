"""Which way does an operator's call take to its kernel?

    pyfused.layer_norm(x, ...)        the public function, ops/layer_norm.py
        |
        |-- call_prepared             a call with this signature was checked before: its launch runs again, 1 us
        |       no                    (with autograd's record of it, where a gradient is wanted)
        |-- bind                      checks the arguments
        |-- call_checked              runs them, and keeps the launch for call_prepared
        v
    Operator.__call__                 who watches the call? The first match decides:

        torch.func, forward-mode derivatives, torch.jit.trace       in_plain_torch    plain PyTorch, which they can follow
        a gradient of a gradient, DTensors, is_grads_batched        plainly           the same
        torch.compile, torch.export, dispatch modes, the profiler,
        tensor subclasses                                           registered        torch.ops.pyfused.<name>
        a gradient is wanted                                        autograd          direct, inside autograd.Function
        nobody                                                      direct            the kernel chosen by dispatch

Per call on one core: a direct Python call takes 1.3 us, Library.impl 4.5, autograd.Function 9.5, register_autograd 11 to 40.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from .. import dispatch, extensions
from ..notices import once
from ..spread import is_spread
from ..tracing import jit_is_tracing, modes, profiler_is_on

_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter, type(None), bool, int, float, str})
_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_in_transform = torch._C._are_functorch_transforms_active  # torch.func's transforms; their tensors have no memory
_is_batched = torch._C._functorch.is_legacy_batchedtensor  # of is_grads_batched=True: they have no memory
# If one of these returns something true, somebody watches the operators, and a launch alone is not enough.
WATCHERS = modes, profiler_is_on, jit_is_tracing, _in_transform
_forced = dispatch._forced.get
_signature = extensions.signature()


def transformed() -> bool:
    """Whether a transform of torch.func or a forward-mode derivative is under way."""
    return _in_transform() or forward_ad._current_level >= 0


def _wants_gradient(args: tuple[Any, ...]) -> bool:
    if torch.is_grad_enabled():
        for a in args:
            if isinstance(a, torch.Tensor) and a.requires_grad:
                return True
    return False


def watched(*tensors: Any) -> bool:
    """Whether somebody has to see what is done to these: a tracer, a transform, autograd, a subclass. The profiler has not."""
    if _is_compiling() or transformed() or modes() or jit_is_tracing() or _wants_gradient(tensors):
        return True
    return not _PLAIN.issuperset(map(type, tensors))


def _without_negated_views(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """z.conj().imag is a view that stands for its memory with the other sign. Kernels read memory, so they get a copy. (torch's
    dispatcher does the same for registered operators.) Such a call has no signature."""
    if any(isinstance(a, torch.Tensor) and a.is_neg() for a in args):
        return tuple(a.resolve_neg() if isinstance(a, torch.Tensor) else a for a in args)
    return args


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _address(value: Any) -> int | None:
    return value.data_ptr() if isinstance(value, torch.Tensor) else None


def _completing(given: tuple[Any, ...], bound: tuple[Any, ...]) -> Callable[[tuple[Any, ...]], list[Any]]:
    """A function that makes checked arguments of others that differ from `given` only in their memory. `bound` are those of
    `given`, with the same tensors."""
    others = [(i, b) for i, (g, b) in enumerate(zip(given, bound)) if b is not g]
    more = bound[len(given) :]

    def complete(args: tuple[Any, ...]) -> list[Any]:
        found = [*args, *more]
        for i, value in others:
            found[i] = value
        return found

    return complete


def _for_given(
    launch: Callable[..., Any], given: tuple[Any, ...], bound: tuple[Any, ...], same: bool
) -> Callable[..., Any] | None:
    """The launch for arguments like `given` of the one for arguments like `bound`; None if it needs the checked ones. It may
    return None, and then the arguments are checked again. `same`: whether the tensors are the same."""
    if isinstance(launch, dispatch.Conditional):
        found = _for_given(launch.launch, given, bound, same)
        return found and launch.but(found, lambda *args: None)
    if not isinstance(launch, dispatch.WholeCall):
        return launch
    complete = _completing(given, bound)
    return (lambda *args: launch(*complete(args))) if same else None


class Call:
    """The table above, for one operator.

    Args:
        kernel, function: kernels/<backend>/<kernel>.py and the function in it, "forward" or "backward".
        residual: the position of the argument `residual`. If it is given, the second output is a result too: x + residual.
    """

    autograd: type[torch.autograd.Function] | None = None  # None if the operator is itself a backward
    overload: Any  # torch.ops.pyfused.<name>
    inference: tuple[Any, Any]  # the forms without gradients, with one result and with two

    def __init__(self, kernel: str, function: str, residual: int | None, outputs: int):
        self.kernel, self.function = kernel, function
        self._residual, self._outputs = residual, outputs
        self._launches = dispatch.Launches()
        self._prepared = extensions.prepared(self._launches, dispatch._forced, WATCHERS)
        self._recorded = dispatch.Launches()  # as _launches, with autograd's record of the call
        self._prepared_with_gradient = extensions.prepared(self._recorded, dispatch._forced, WATCHERS)
        self._reference: Any = dispatch.kernel("reference", kernel)  # imported now: torch.compile traces no import

    def call_prepared(self, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The results, if a call with the same signature was checked before; else None, and the caller checks the arguments.
        args: as the public function got them, in this operator's order."""
        if _is_compiling():
            return None
        return self._prepared_with_gradient(*args) if _is_grad_enabled() else self._prepared(*args)

    def call_checked(self, given: tuple[Any, ...], bound: tuple[Any, ...]) -> tuple[Any, ...]:
        """Runs `bound`, the checked form of the arguments `given`, and keeps the launch for call_prepared(given). A launch does
        not need the extra arguments at the end of `bound`, such as `save`.

        A launch reads addresses, so it is kept only if both have the same memory. If the checks took a view, the launch is
        prepared for that view. Autograd and kernels without a launch would miss the view, so they are kept only if the tensors
        are the same.
        """
        outputs = self(*bound)
        if _is_compiling() or transformed() or any(watcher() for watcher in WATCHERS):
            return outputs
        signature = _signature(*given)
        if signature is None or list(map(_address, given)) != list(map(_address, bound[: len(given)])):
            return outputs
        same = all(b is g or not _is_tensor(b) for g, b in zip(given, bound))
        if not _is_grad_enabled():
            whole = _signature(*bound)
            launch = self._launches.get((_forced(), whole)) if whole != signature else None
            if launch is not None and (launch := _for_given(launch, given, bound, same)) is not None:
                self._launches.keep((_forced(), signature), launch)
        elif same and _wants_gradient(bound):
            self._recorded.keep((_forced(), signature), self._recording(given, bound))
        return outputs

    def _recording(self, given: tuple[Any, ...], bound: tuple[Any, ...]) -> Callable[..., tuple[Any, ...] | None]:
        """The call with autograd's record, for arguments that differ from `given` only in their memory. It returns None if no
        argument wants a gradient."""
        # torch.autograd.Function.apply in Python spends 5 us on checks that do not apply here.
        apply = super(torch.autograd.Function, self.autograd).apply  # type: ignore[misc, arg-type]
        complete = _completing(given, bound)

        def record(*args: Any) -> tuple[Any, ...] | None:
            return apply(*complete(args)) if _wants_gradient(args) else None

        return record

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        if self.autograd is None and not _is_grad_enabled():  # in a backward pass
            outputs = self.call_prepared(args)
            if outputs is not None:
                return outputs
        if transformed() or jit_is_tracing():
            return self._in_plain_torch(args)
        if self.autograd is None and _wants_gradient(args):
            return self.plainly(*args)  # create_graph=True: this gradient will be differentiated
        if _is_compiling() or modes() or profiler_is_on() or not _PLAIN.issuperset(map(type, args)):
            if any(map(is_spread, args)) and not _is_compiling():
                once("operators on DTensors run in plain PyTorch, whose rules say how each is spread")
                return self.plainly(*args)
            return self._registered(args)
        args = _without_negated_views(args)
        if self.autograd is not None and _wants_gradient(args):
            return self.autograd.apply(*args)
        return self.direct(*args)

    def direct(self, *args: Any) -> tuple[Any, ...]:
        """Runs the chosen kernel, with no autograd and no dispatcher."""
        key = _forced(), _signature(*args)
        if key[1] is None and any(isinstance(a, torch.Tensor) and _is_batched(a) for a in args):
            return self.plainly(*args)
        return (self._launches.get(key) or self._choose(key, args))(*args)

    def _choose(self, key: Any, args: tuple[Any, ...]) -> Callable[..., tuple[Any, ...]]:
        """The launch of a call that has none yet. It is kept if the call has a signature."""
        kernel, settings = dispatch.chosen(self.kernel, self.function, args)
        if key[1] is None:
            return kernel
        prepare = getattr(kernel, "prepare", None)
        launch = dispatch.WholeCall(kernel) if prepare is None else dispatch.prepared(prepare, args)
        if launch is None:
            return kernel
        if settings is not None:

            def choose_again(*args: Any) -> tuple[Any, ...]:
                self._launches.pop(key, None)
                return self.direct(*args)

            launch = dispatch.Conditional(settings, launch, choose_again)
        self._launches.keep(key, launch)
        return launch

    def _in_plain_torch(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The reference. torch.func's transforms and forward-mode derivatives can follow it like any torch code, and
        torch.jit.trace needs programs that run without Python."""
        if not _is_compiling():
            once(
                "inside torch.func's transforms, forward-mode derivatives and torch.jit.trace pyfused's operators run in plain "
                "PyTorch"
            )
        return self.plainly(*args)

    def plainly(self, *args: Any) -> tuple[Any, ...]:
        """The reference: plain PyTorch, which autograd can differentiate any number of times."""
        return getattr(self._reference, self.function)(*args)

    def _registered(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Through the dispatcher, which returns a single output without a tuple. Outputs that only a gradient needs are None
        where no gradient is wanted."""
        overload = self.overload
        if self.autograd is not None and not _wants_gradient(args):
            overload = self.inference[self.results_of(args) - 1]
        outputs = overload(*args)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return (*outputs, *[None] * (self._outputs - len(outputs)))

    def results_of(self, args: tuple[Any, ...]) -> int:
        """How many outputs are results. The others are kept for a gradient."""
        return 1 if self._residual is None or args[self._residual] is None else 2
