"""How does an operator reach its kernels? Registration in torch.ops.pyfused, autograd, and the direct call in eager mode.

Measured per call on one core: a direct Python call 1.3 us, Library.impl 4.5, autograd.Function 9.5, register_autograd 11
to 40. So eager mode with plain tensors calls the kernel directly, through autograd.Function where a gradient is wanted;
tensor subclasses and torch.compile go through the registered operator, which has its own fake and autograd.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .. import dispatch, extensions
from .._version import __version__
from ..notices import once
from ..tracing import jit_is_tracing, modes, profiler_is_on
from .autocast import without_autocast
from .cost import COSTS, Cost

LIBRARY = torch.library.Library("pyfused", "DEF")
_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter, type(None), bool, int, float, str})
_is_compiling = torch.compiler.is_compiling
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_is_grad_enabled = torch.is_grad_enabled
_in_transform = torch._C._are_functorch_transforms_active  # torch.func's; their tensors have no memory of their own
# Where one of these says something true, somebody watches the operators: a launch is not enough.
_WATCHERS = modes, profiler_is_on, jit_is_tracing, _in_transform
_forced = dispatch._forced.get
_inside_composite: ContextVar[bool] = ContextVar("pyfused_inside_composite", default=False)
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


class Operator:
    """A registered operator. Calling it with positional arguments returns the outputs of its schema, as a tuple.

    Args:
        name: the name in torch.ops.pyfused; `<kernel>_backward` calls `backward` of kernels/<backend>/<kernel>.py.
        schema: arguments and returns, as torch.library.define takes them.
        fake: the shapes, dtypes and strides of the outputs for given inputs.
        setup_context, backward: as torch.autograd.Function has them; absent for operators that are themselves backward.
            With create_graph=True gradient mode is on inside backward: what the kernel kept of the forward, autograd has seen
            no derivative of, so backward computes it again; the operators of gradients then run in plain PyTorch.
        residual: the argument, by its position, beside which the second output is a result too: x + residual.
        cost: the least that a call must move and compute, of the schema's arguments.

    A kernel may return None for an output that was not asked for; the registered operator returns an empty tensor there. Where
    autograd records a call, it returns the results alone, as no more is asked for. Of
    a differentiable operator two forms without gradients are registered too, for traces:
        <name>_inference returns the results alone: what an exported program holds.
        <name>_into writes them into tensors given behind the arguments: what torch.compile gets on a CPU, which plans the
            memory itself then, and checks no sizes of what an operator returned: 3% of FNet's preset.
    With a residual in its place they are called <name>_inference_sum and <name>_into_sum, of two results. A call of them that
    repeats an earlier one's signature costs what an eager call does; the operator with its empty tensors and its autograd
    costs 24 us above the kernel.
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
        cost: Callable[..., Cost],
    ):
        self.name = name
        COSTS[name] = cost
        self.kernel = name.removesuffix("_backward")
        self.function = "backward" if name.endswith("_backward") else "forward"
        self._launches = dispatch.Launches()
        self._again = extensions.prepared(self._launches, dispatch._forced, _WATCHERS)
        self._recorded = dispatch.Launches()  # as _launches, with what autograd records of the call
        self._record_again = extensions.prepared(self._recorded, dispatch._forced, _WATCHERS)
        self._reference: Any = dispatch.kernel("reference", self.kernel)  # now: torch.compile traces no import
        LIBRARY.define(f"{name}{schema}")
        LIBRARY.impl(name, self._registered, "CompositeExplicitAutograd")
        torch.library.register_fake(f"pyfused::{name}", fake, lib=LIBRARY)
        self.autograd: type[torch.autograd.Function] | None = None
        if backward is not None and setup_context is not None:
            backward = without_autocast(backward)
            shortened: Any = _Shortened(self)
            setup = setup_context

            def setup_registered(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
                outputs = output if isinstance(output, tuple) else (output,)
                setup(ctx, inputs, outputs)
                ctx.set_materialize_grads(len(outputs) == 1)  # else the operator sees which gradients there are
                ctx.mark_non_differentiable(*outputs[self._results_of(inputs) :])

            torch.library.register_autograd(f"pyfused::{name}", backward, setup_context=setup_registered, lib=shortened)

            def forward(ctx: Any, *args: Any) -> tuple[Any, ...]:
                outputs = self.direct(*args)
                setup(ctx, args, outputs)
                ctx.set_materialize_grads(len(outputs) == 1)
                return outputs[: self._results_of(args)]  # what is kept for backward is no output: 4 us less

            # With a setup_context of its own torch would look at the signature of forward at every call, in 40 us.
            members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
            self.autograd = type(f"pyfused.{name}", (torch.autograd.Function,), members)
        self.overload = getattr(torch.ops.pyfused, name).default
        self._residual = residual
        self._outputs = schema.partition("->")[2].count("Tensor")
        if self.autograd is not None:
            self._fake = fake
            self._inference = self._returning("inference", schema, 1)
            self._into = self._writing("into", schema, 1)
            if residual is not None:
                self._inference_sum = self._returning("inference_sum", schema, 2)
                self._into_sum = self._writing("into_sum", schema, 2)

    def _returning(self, suffix: str, schema: str, count: int) -> Any:
        """The registered operator <name>_<suffix> that returns the first `count` outputs."""

        def run(*args: Any) -> Any:
            outputs = self.direct(*args)
            return outputs[0] if count == 1 else outputs[:count]

        def run_fake(*args: Any) -> Any:
            outputs = self._results(args, count)
            return outputs[0] if count == 1 else outputs

        arguments = schema.partition("->")[0]
        return self._without_gradient(suffix, f"{arguments}-> ({', '.join(['Tensor'] * count)})", run, run_fake, count)

    def _writing(self, suffix: str, schema: str, count: int) -> Any:
        """The registered operator <name>_<suffix> that writes the first `count` outputs into as many last arguments."""

        def run(*args: Any) -> None:
            self._direct_into(args[:-count], args[-count:])

        # Without defaults: no argument that has none may follow one that has.
        arguments = re.sub(r"=\w+", "", schema.partition("->")[0].rstrip(" )"))
        outputs = "".join(f", Tensor({'abc'[i]}!) out_{i}" for i in range(count))
        return self._without_gradient(suffix, f"{arguments}{outputs}) -> ()", run, lambda *args: None, -1)

    def _without_gradient(
        self, suffix: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any], count: int
    ) -> Any:
        """Registers <name>_<suffix>; count: as extensions.prepared takes it."""
        name = f"{self.name}_{suffix}"
        LIBRARY.define(name + schema)
        LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"pyfused::{name}", fake, lib=LIBRARY)
        overload = getattr(torch.ops.pyfused, name).default
        if hasattr(overload, "_op"):  # what a call from Python runs, as those of compiled programs are; no public name
            # Through torch's dispatcher and back is 9 us, which a prepared launch need not go.
            watchers = *_WATCHERS, _is_grad_enabled
            overload._op = extensions.prepared(self._launches, dispatch._forced, watchers, overload._op, count)
        return overload

    def _results_of(self, args: tuple[Any, ...]) -> int:
        """How many of the outputs are results; the others are kept for a gradient."""
        return 1 if self._residual is None or args[self._residual] is None else 2

    def _results(self, args: tuple[Any, ...], count: int) -> tuple[torch.Tensor, ...]:
        """New tensors for the first `count` outputs, with nothing in them."""
        outputs = self._fake(*args)
        return (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs[:count])

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        if self.autograd is None and not _is_grad_enabled():  # in a backward pass
            outputs = self.again(args)
            if outputs is not None:
                return outputs
        if _transformed() or jit_is_tracing():
            return self._in_plain_torch(args)
        if self.autograd is None and _wants_gradient(args):
            return self.plainly(*args)  # a gradient that is to be differentiated: create_graph=True
        if _is_compiling() or modes() or profiler_is_on() or not _PLAIN.issuperset(map(type, args)):
            return self._overloaded(args)
        if self.autograd is not None and _wants_gradient(args):
            return self.autograd.apply(*args)
        return self.direct(*args)

    def again(self, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The results for arguments as the public function got them, in this operator's order, if a call of their signature
        was found good before; else None, and the arguments are to be checked."""
        if _is_compiling():
            return None
        return self._record_again(*args) if _is_grad_enabled() else self._again(*args)

    def first(self, given: tuple[Any, ...], bound: tuple[Any, ...]) -> tuple[Any, ...]:
        """Runs the arguments `bound`, which the checks made of those of again(), and remembers them for it where they have
        the same memory: a launch reads addresses, and where the checks took a view it is prepared for that view."""
        outputs = self(*bound)
        if _is_compiling() or _transformed() or any(watcher() for watcher in _WATCHERS):
            return outputs
        signature = _signature(*given)
        if signature is None or list(map(_address, given)) != list(map(_address, bound)):
            return outputs
        if not _is_grad_enabled():
            launch = self._launches.get((_forced(), _signature(*bound)))
            if launch is not None:
                self._launches.keep((_forced(), signature), launch)
        elif _wants_gradient(bound) and all(b is g or not _is_tensor(b) for g, b in zip(given, bound, strict=True)):
            self._recorded.keep((_forced(), signature), self._recording(given, bound))  # autograd would miss the view
        return outputs

    def _recording(self, given: tuple[Any, ...], bound: tuple[Any, ...]) -> Callable[..., tuple[Any, ...] | None]:
        """The call with what autograd records of it, for arguments that differ from `given` in their memory alone; it returns
        None where none of them wants a gradient."""
        # torch.autograd.Function.apply in Python looks for things that cannot be here, in 5 us.
        apply = super(torch.autograd.Function, self.autograd).apply  # type: ignore[misc, arg-type]
        others = [(i, b) for i, (g, b) in enumerate(zip(given, bound, strict=True)) if b is not g]

        def record(*args: Any) -> tuple[Any, ...] | None:
            if not _wants_gradient(args):
                return None
            found = list(args)
            for i, value in others:
                found[i] = value
            return apply(*found)

        return record

    def direct(self, *args: Any) -> tuple[Any, ...]:
        """Runs the chosen kernel, with no autograd and no dispatcher."""
        key = _forced(), _signature(*args)
        launch = self._launches.get(key)
        if launch is None:
            launch = dispatch.choose(self.kernel, self.function, args)
            launch = self._prepared(launch, args, key) or launch
        return launch(*args)

    def _direct_into(self, args: tuple[Any, ...], outputs: tuple[torch.Tensor, ...]) -> None:
        """As direct(), and writes the results into `outputs`. Prepared launches do, and functions that have an `into`."""
        key = _forced(), _signature(*args, *outputs)
        launch = self._launches.get(key)
        if launch is None:
            chosen = dispatch.choose(self.kernel, self.function, args)
            expected = self._results(args, len(outputs))
            fits = all(o.shape == e.shape and o.stride() == e.stride() for o, e in zip(outputs, expected, strict=True))
            launch = (self._prepared(chosen, args, key) or getattr(chosen, "into", None)) if fits else None
            if launch is None:
                for output, found in zip(outputs, chosen(*args), strict=False):
                    output.copy_(found)
                return
        launch(*args, *outputs)

    def _prepared(self, chosen: Any, args: tuple[Any, ...], key: tuple[Any, bytes | None]) -> Any:
        """A launch for such arguments, and for results given behind them; kept for calls of this key. None where the chosen
        function prepares none, or the call has no signature."""
        prepare = getattr(chosen, "prepare", None)
        launch = dispatch.prepared(prepare, args) if prepare is not None and key[1] is not None else None
        if launch is not None:
            self._launches.keep(key, launch)
        return launch

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
            summed = self._results_of(args) == 2
            if not _is_dynamo_compiling() and _inside_composite.get() and _kernels_take(args):
                outputs = self._results(args, 2 if summed else 1)
                (self._into_sum if summed else self._into)(*args, *outputs)
                return (*outputs, *[None] * (self._outputs - len(outputs)))
            overload = self._inference_sum if summed else self._inference
        outputs = overload(*args)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return (*outputs, *[None] * (self._outputs - len(outputs)))


def _kernels_take(args: tuple[Any, ...]) -> bool:
    """Whether these may be a CPU kernel's: no tensors that are made of others, and of a dtype that it computes in."""
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    if any(t.device.type != "cpu" or is_traceable_wrapper_subclass(t) for t in tensors):
        return False
    return tensors[0].dtype in dispatch.KERNEL_DTYPES


def is_recorded() -> bool:
    """Whether torch.compile is recording what runs, which is to hold composite() nodes. torch.export records operators, and
    torch.func.vmap takes no node apart."""
    # The flag behind torch.compiler.is_exporting(), which torch 2.11's torch.compile takes to be true.
    return _is_dynamo_compiling() and not torch.compiler._is_exporting_flag and not _in_transform()


def composite(name: str, schema: str, function: Callable[..., Any]) -> Any:
    """A public function as an operator of its own, which torch.compile records as one node and takes apart afterwards.

    So a compiled program watches nothing of the function's Python: 464 things instead of 615 in FNet's preset, which takes
    70 us less of a call's 3 ms. What the function reads but for its arguments, gradient mode and the version must not decide
    what it does: torch keeps compiled programs on disk by the node alone.

    Args:
        name: the function's, of its operator too; the node is torch.ops.pyfused.<name>_composite_<version>.
        schema: its arguments, as it takes them; it returns Tensor[], of one tensor where the function returns a bare one.
        function: the public function itself, which is_recorded() tells apart from the call that records it.
    """
    node = f"{name}_composite_{re.sub('[^0-9a-z]', '_', __version__)}"

    def run(*args: Any, **keywords: Any) -> list[torch.Tensor]:
        token = _inside_composite.set(True)
        try:
            found = function(*args, **keywords)
        finally:
            _inside_composite.reset(token)
        return [found] if isinstance(found, torch.Tensor) else list(found)

    LIBRARY.define(f"{node}{schema} -> Tensor[]")
    LIBRARY.impl(node, run, "CompositeImplicitAutograd")
    return getattr(torch.ops.pyfused, node).default


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
