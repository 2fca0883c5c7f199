"""How is an operator registered? Its schema, shapes and gradient in torch.ops.pyfused, and the ways of call.py to its kernel.

Eager mode with plain tensors calls the kernel directly, through autograd.Function where a gradient is wanted. Tensor subclasses
and torch.compile go through the registered operator, which has its own fake and autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import dispatch, extensions
from .autocast import without_autocast
from .call import WATCHERS, Call
from .cost import COSTS, Cost

LIBRARY = torch.library.Library("pyfused", "DEF")


class Operator(Call):
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
    autograd records a call, it returns the results alone.

    A differentiable operator has a second form in traces, <name>_inference, which returns the results alone. It is what
    programs without gradients hold, and costs them no more than an eager call; the operator with its empty tensors and its
    autograd costs 24 us above the kernel. With a residual in its place the form is <name>_inference_sum, of two results.
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
            ctx.set_materialize_grads(len(outputs) == 1)  # else the operator sees which gradients there are
            ctx.mark_non_differentiable(*outputs[self.results_of(inputs) :])

        torch.library.register_autograd(f"pyfused::{self.name}", backward, setup_context=setup_registered, lib=LIBRARY)

        def forward(ctx: Any, *args: Any) -> tuple[Any, ...]:
            outputs = self.direct(*args)
            setup_context(ctx, args, outputs)
            ctx.set_materialize_grads(len(outputs) == 1)
            return outputs[: self.results_of(args)]  # what is kept for backward is no output: 4 us less

        # With a setup_context of its own torch would look at the signature of forward at every call, in 40 us.
        members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
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
        if hasattr(overload, "_op"):  # what a call from Python runs, as those of compiled programs are; no public name
            # Through torch's dispatcher and back is 9 us, which a prepared launch need not go.
            watchers = *WATCHERS, torch.is_grad_enabled
            overload._op = extensions.prepared(self._launches, dispatch._forced, watchers, overload._op, count)
        return overload
