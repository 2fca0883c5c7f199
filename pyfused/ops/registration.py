"""How is an operator registered? torch.ops.pyfused gets its schema, shapes and gradient; call.py leads to its kernel.

Eager mode calls the kernel directly for plain tensors, through autograd.Function if a gradient is wanted. Tensor subclasses
and torch.compile go through the registered operator, which has its own fake and autograd.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

from .. import dispatch, extensions
from .autocast import without_autocast
from .call import WATCHERS, Call
from .cost import COSTS, Cost

LIBRARY = torch.library.Library("pyfused", "DEF")


def operator_of(overload: Any) -> str:
    """The name of the operator that a dispatch mode meets in one of its registered forms; "" for torch's own."""
    namespace, _, name = overload._schema.name.partition("::")
    return re.sub("_inference(_sum)?$", "", name) if namespace == "pyfused" else ""


class _Unpacked:
    """An autograd context whose saved tensors are unpacked. They can be unpacked only once."""

    def __init__(self, ctx: Any):
        self._ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


class Operator(Call):
    """A registered operator. Calling it with positional arguments returns the outputs of its schema, as a tuple.

    Args:
        name: the name in torch.ops.pyfused; `<kernel>_backward` calls `backward` of kernels/<backend>/<kernel>.py.
        schema: arguments and returns, as torch.library.define takes them.
        fake: the shapes, dtypes and strides of the outputs for given inputs.
        setup_context, backward: as in torch.autograd.Function; None for operators that are themselves a backward. With
            create_graph=True gradient mode is on inside backward. Autograd knows no derivative of the tensors that the
            kernel kept, so backward computes them again, and the operators of gradients run in plain PyTorch. If
            setup_context sets ctx.follows_kept, they are outputs that autograd follows, and backward gets their gradients.
        residual: the position of the argument `residual`. If it is given, the second output is a result too: x + residual.
        cost: the least that a call must move and compute; takes the schema's arguments.

    A kernel may return None for an output that was not asked for; the registered operator returns an empty tensor there. If
    autograd records a call, the call returns the results alone.

    A differentiable operator has a second form in traces, <name>_inference, which returns the results alone. Programs without
    gradients hold this form, and it costs them no more than an eager call. The full operator, with its empty tensors and
    autograd, costs 24 us above the kernel. With a residual the form is <name>_inference_sum, with two results.
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
        arguments, _, returns = schema.partition("->")
        function = "backward" if name.endswith("_backward") else "forward"
        super().__init__(name.removesuffix("_backward"), function, residual, returns.count("Tensor"))
        self.name, self._fake = name, fake
        COSTS[name] = cost
        self.overload = self._define(name, schema, self._all_outputs, fake)
        if backward is not None and setup_context is not None:
            self._differentiate(setup_context, without_autocast(backward))
            forms = [self._inference(arguments, count) for count in ((1,) if residual is None else (1, 2))]
            self.inference = forms[0], forms[-1]

    def _define(self, name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
        LIBRARY.define(f"{name}{schema}")
        LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"pyfused::{name}", fake, lib=LIBRARY)
        return getattr(torch.ops.pyfused, name).default

    def _all_outputs(self, *args: Any) -> torch.Tensor | tuple[torch.Tensor, ...]:
        outputs = self.direct(*args)
        if len(outputs) == 1:
            return outputs[0]
        return tuple([t if t is not None else args[0].new_empty(0) for t in outputs])

    def _differentiate(self, setup_context: Callable[..., None], backward: Callable[..., Any]) -> None:
        """Registers the gradient, and makes the autograd.Function of direct calls."""

        def setup_registered(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            setup_context(ctx, inputs, outputs)
            ctx.forced = dispatch._forced.get()
            ctx.set_materialize_grads(len(outputs) == 1)  # else backward gets None for absent gradients
            if not getattr(ctx, "follows_kept", False):
                ctx.mark_non_differentiable(*outputs[self.results_of(inputs) :])

        def backward_of_forced(ctx: Any, *grads: Any) -> Any:
            """On a GPU the backward runs in a thread of its own, which sees no backend() around it. The forward's is meant."""
            if ctx.forced is None or dispatch._forced.get() is not None:
                return backward(ctx, *grads)
            ctx = _Unpacked(ctx)  # unpacking may run a user's code: checkpoints compute their block again
            with dispatch.as_forced(ctx.forced):
                return backward(ctx, *grads)

        name = f"pyfused::{self.name}"
        torch.library.register_autograd(name, backward_of_forced, setup_context=setup_registered, lib=LIBRARY)

        def forward(ctx: Any, *args: Any) -> tuple[Any, ...]:
            outputs = self.direct(*args)
            setup_context(ctx, args, outputs)
            ctx.forced = dispatch._forced.get()
            ctx.set_materialize_grads(len(outputs) == 1)
            if getattr(ctx, "follows_kept", False):
                return outputs
            return outputs[: self.results_of(args)]  # tensors kept for backward are no outputs: saves 4 us

        # With a separate setup_context torch would inspect forward's signature at every call, in 40 us.
        members = {"forward": staticmethod(forward), "backward": staticmethod(backward_of_forced)}
        self.autograd = type(f"pyfused.{self.name}", (torch.autograd.Function,), members)

    def _inference(self, arguments: str, count: int) -> Any:
        """Registers the form without gradients that returns the first `count` outputs."""

        def run(*args: Any) -> Any:
            outputs = self.direct(*args)
            return outputs[0] if count == 1 else outputs[:count]

        def fake(*args: Any) -> Any:
            outputs = self._fake(*args)
            return outputs if isinstance(outputs, torch.Tensor) else outputs[0] if count == 1 else outputs[:count]

        name = f"{self.name}_inference" + ("_sum" if count == 2 else "")
        overload = self._define(name, f"{arguments}-> ({', '.join(['Tensor'] * count)})", run, fake)
        if hasattr(overload, "_op"):  # a private name: calls from Python run this, also in compiled programs
            # A prepared launch skips torch's dispatcher, which takes 9 us.
            watchers = *WATCHERS, torch.is_grad_enabled
            overload._op = extensions.prepared(self._launches, dispatch._forced, watchers, overload._op, count)
        return overload
