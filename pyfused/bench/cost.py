"""How many bytes and FLOPs does a call need at least? The sum over its operators (pyfused/ops/cost.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ..ops.cost import COSTS, Cost, size
from ..ops.registration import operator_of


class _Counter(TorchDispatchMode):
    """Adds up the bytes and FLOPs of pyfused's operators and of torch's matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if name := operator_of(func):
            cost = COSTS[name](*args, **(kwargs or {}))
        elif func.overloadpacket in flop_registry:
            written = out if isinstance(out, tuple | list) else (out,)
            flops = flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
            cost = Cost(size(*args, *written), flops)
        else:
            return out
        self.bytes += cost.bytes
        self.flops += cost.flops
        return out


def cost_of(call: Callable[[], Any]) -> Cost:
    """The bytes and FLOPs of the operators in one call. Runs the call."""
    with _Counter() as counter:
        call()
    return Cost(counter.bytes, counter.flops)
