"""How does one instance get a forward of its own, which no copy of the instance runs on the instance's parameters?

The forward is a functools.partial of a function and the module, in the module's __dict__, where Module.__call__ finds it. A
plain copy of that __dict__ would take it along, still bound to the module it was made for: copy.copy does that, and so do
nn.DataParallel's replicas and people who copy by hand. So the __dict__ of such a module is an `_Attributes`, which has the
forward but does not list it: whatever copies its items gets a module that runs its class's forward. Where the new owner is
known (deepcopy, pickle, torch's replicas) the copy gets the same function, bound to itself.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn
from torch.nn.modules import module as torch_module

Forward = Callable[..., Any]  # (module, *args, **kwargs), at the top level of a file
Adapter = Callable[[nn.Module], "Forward | str"]  # the forward for this instance, or why it keeps its own
F = TypeVar("F", bound=Forward)

_REPLICATE = "_replicate_for_data_parallel"


@dataclass(frozen=True)
class Entry:
    """One line of a report: a module's name in the model, its class, and what happened to it."""

    name: str
    kind: str
    note: str


def fused_forward(function: F) -> F:
    """Marks a function as one that instances may be given. Its docstring's first line is what the report says."""
    function.__dict__["pyfused_forward"] = True
    return function


def is_own(attribute: Any) -> bool:
    """Whether `attribute`, of a module's __dict__, was put there by `give`."""
    return isinstance(attribute, functools.partial) and getattr(attribute.func, "pyfused_forward", False)


def is_fused(module: nn.Module) -> bool:
    """Whether fuse_ gave this module its forward."""
    return is_own(module.forward)  # not of its __dict__: torch.compile knows of that what it lists


def original(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of the module's class: what a fused forward does with a call that the kernels do not have."""
    return type(module).forward(module, *args, **kwargs)


def is_bare(*modules: nn.Module | None) -> bool:
    """Whether calling these modules does no more than their classes' (or our) forward, so that another function may read
    their parameters instead of calling them: no hooks, and no forward put on the instance by someone else."""
    if torch_module._has_any_global_hook():
        return False
    for m in modules:
        if m is not None and (
            m._forward_hooks
            or m._forward_pre_hooks
            or m._backward_hooks
            or m._backward_pre_hooks
            or has_another_forward(m)
        ):
            return False
    return True


def has_another_forward(module: nn.Module) -> bool:
    """Whether someone else put a forward on this instance."""
    forward = module.__dict__.get("forward")
    return forward is not None and not is_own(forward)


def give(module: nn.Module, function: Forward) -> None:
    """From now on module.forward(...) is function(module, ...)."""
    _attach(module, _Attributes(vars(module)), {"forward": function, _REPLICATE: _replicate})


def take_back(module: nn.Module) -> None:
    """Undoes `give`."""
    object.__setattr__(module, "__dict__", dict(vars(module)))


class _Attributes(dict[str, Any]):
    """A module's __dict__. Iteration, by which Python and torch copy a dict, leaves out what is bound to the module."""

    __slots__ = ()

    def __iter__(self) -> Iterator[str]:
        return iter([name for name, value in dict.items(self) if not is_own(value)])

    def keys(self) -> Any:
        return list(self)

    def values(self) -> Any:
        return [self[name] for name in self]

    def items(self) -> Any:
        return [(name, self[name]) for name in self]

    def copy(self) -> _State:
        bound = {name: value for name, value in dict.items(self) if is_own(value)}
        state = _State(self)
        state.owner = bound[_REPLICATE].args[0]
        state.functions = {name: value.func for name, value in bound.items()}  # a wrapper may keep the forward elsewhere
        return state

    def __copy__(self) -> dict[str, Any]:
        return dict(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return copy.deepcopy(self.copy(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.copy().__reduce_ex__(protocol)


class _State(dict[str, Any]):
    """What Module.__getstate__ gives: the listed items alone, for a deep copy or a pickle with what was bound to the module."""

    __slots__ = ("functions", "owner")
    owner: Any
    functions: dict[str, Forward]

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        listed = {name: copy.deepcopy(value, memo) for name, value in self.items()}
        copied = memo.get(id(self.owner))  # the module that is to have these attributes
        return listed if copied is None else _attach(copied, _Attributes(listed), self.functions)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _restored, (self.owner, self.functions), None, None, iter(self.items())


def _attach(module: Any, attributes: _Attributes, functions: dict[str, Forward]) -> _Attributes:
    attributes.update({name: functools.partial(function, module) for name, function in functions.items()})
    object.__setattr__(module, "__dict__", attributes)
    return attributes


def _restored(module: Any, functions: dict[str, Forward]) -> _Attributes:
    """While a module is unpickled: its __dict__, which the listed items are then put into."""
    return _attach(module, _Attributes(), functions)


@fused_forward
def _replicate(module: Any) -> nn.Module:
    """As the class does it; the replica has the same forward, bound to itself."""
    replica: nn.Module = getattr(type(module), _REPLICATE)(module)
    _attach(replica, _Attributes(vars(replica)), vars(module).copy().functions)  # type: ignore[attr-defined]
    return replica
