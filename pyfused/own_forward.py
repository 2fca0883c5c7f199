"""How can one instance have a forward of its own that its copies do not take along by accident?

The forward is functools.partial(function, module), in the module's __dict__, where Module.__call__ finds it. A plain copy of
the __dict__ would contain that partial, still bound to the first module: copy.copy, nn.DataParallel's replicas and users' own
code all copy it. So the __dict__ of such a module is an `_Attributes`. It has the forward, but does not list it, so a plain
copy runs its class's forward. deepcopy, pickle and torch's replicas tell which module is the new owner. They get the same
function, bound to the copy.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import nn
from torch.nn.modules import module as torch_module

from .rules import its_kind

Forward = Callable[..., Any]  # takes (module, *args, **kwargs), and stands at the top level of a file
Adapter = Callable[[nn.Module], "Forward | str"]  # returns the forward for this instance, or why there is none
Filter = Callable[[str, nn.Module], bool]  # (name in the model, module) -> whether the module is wanted
F = TypeVar("F", bound=Forward)

_REPLICATE = "_replicate_for_data_parallel"
_changes = 0


@dataclass(frozen=True)
class Entry:
    """One line of a report: a module's name in the model, its class, and what happened to it."""

    name: str
    kind: str
    note: str


def summary(replaced: tuple[Entry, ...], left: tuple[Entry, ...]) -> str:
    """A report as text."""
    lines = [f"replaced: {len(replaced)}", *_rows(replaced), f"left: {len(left)}", *_rows(left)]
    return "\n".join(lines)


def _rows(entries: tuple[Entry, ...]) -> Iterator[str]:
    """One row for modules whose names differ only in their numbers, such as the layers of a model."""

    def pattern(entry):
        parts = entry.name.split(".")
        return ".".join("*" if p.isdigit() else p for p in parts) or "(the model)", entry.kind, entry.note

    for (name, kind, note), group in groupby(sorted(entries, key=pattern), pattern):
        count = len(list(group))
        yield f"  {name} ({kind}){f' x{count}' if count > 1 else ''}: {note}"


def check_module(model: Any) -> None:
    """Raises TypeError unless this is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {its_kind(model)}; it takes a torch.nn.Module")


def checked_filter(filter_fn: Filter | None) -> Filter:
    """filter_fn, or a function that wants every module. Raises TypeError for anything but a function or None."""
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn is {its_kind(filter_fn)}; it takes a function of (name, module), or None")
    return filter_fn or (lambda name, module: True)


def fused_forward(function: F) -> F:
    """Marks a function that give() may put on instances. The first line of its docstring is its note in the report.

    Its attribute `methods`, if it has one, names more such functions, which stand in for the class's methods beside forward.
    Its attribute `prepare` is called with each module that a pickle brings back, so that no trace has to.
    """
    function.__dict__["pyfused_forward"] = True
    return function


def is_own(attribute: Any) -> bool:
    """Whether give() put this attribute into a module's __dict__."""
    return isinstance(attribute, functools.partial) and getattr(attribute.func, "pyfused_forward", False)


def is_fused(module: nn.Module) -> bool:
    """Whether fuse_ gave this module its forward."""
    return is_own(module.forward)  # not vars(module)["forward"]: torch.compile sees only what __dict__ lists


def original(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Runs the forward of the module's class. Fused forwards call this for arguments that the kernels do not support."""
    return type(module).forward(module, *args, **kwargs)


def is_bare(*modules: nn.Module | None) -> bool:
    """Whether these modules have no hooks, and no forward put on the instance by someone else. A fused function may then read
    their parameters instead of calling them."""
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
    """Whether someone else put a forward on this instance. The class's own is none: older transformers leave that behind."""
    forward = module.__dict__.get("forward")
    if forward is None or is_own(forward):
        return False
    return getattr(forward, "__func__", None) is not type(module).forward or forward.__self__ is not module


def changes() -> int:
    """How often a module has got another __dict__ here. While the number stays, a held __dict__ is still the module's."""
    return _changes


def kept(module: nn.Module) -> WeakKeyDictionary[Any, Any] | None:
    """Where a fused forward may keep things for as long as the keys live. Nobody else sees them. Copies, pickles and unfuse_
    leave them behind. None if this module is not fused."""
    attributes = vars(module)
    if not isinstance(attributes, _Attributes):
        return None
    try:
        return attributes.kept
    except AttributeError:
        attributes.kept = WeakKeyDictionary()
        return attributes.kept


def give(module: nn.Module, function: Forward) -> None:
    """Makes module.forward(...) run function(module, ...)."""
    global _changes
    _changes += 1
    methods: dict[str, Forward] = getattr(function, "methods", {})
    _attach(module, _Attributes(vars(module)), {"forward": function, _REPLICATE: _replicate, **methods})


def take_back(module: nn.Module) -> None:
    """Undoes `give`."""
    global _changes
    _changes += 1
    object.__setattr__(module, "__dict__", dict(vars(module)))


class _Attributes(dict[str, Any]):
    """A module's __dict__. Iterating over it skips the functions bound to the module. Python and torch copy a dict that way."""

    __slots__ = ("kept",)
    kept: WeakKeyDictionary[Any, Any]

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
        # Under every name: a wrapper such as accelerate's keeps the forward elsewhere.
        state.functions = {name: value.func for name, value in bound.items()}
        return state

    def __copy__(self) -> dict[str, Any]:
        return dict(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return copy.deepcopy(self.copy(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.copy().__reduce_ex__(protocol)


class _State(dict[str, Any]):
    """The result of Module.__getstate__: the listed items, with the bound functions beside them for deep copies and pickles."""

    __slots__ = ("functions", "owner")
    owner: Any
    functions: dict[str, Forward]

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        listed = {name: copy.deepcopy(value, memo) for name, value in self.items()}
        copied = memo.get(id(self.owner))  # the new owner
        return listed if copied is None else _attach(copied, _Attributes(listed), self.functions)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _restored, (self.owner, self.functions), self.owner, None, iter(self.items()), _prepare


def _attach(module: Any, attributes: _Attributes, functions: dict[str, Forward]) -> _Attributes:
    attributes.update({name: functools.partial(function, module) for name, function in functions.items()})
    object.__setattr__(module, "__dict__", attributes)
    return attributes


def _restored(module: Any, functions: dict[str, Forward]) -> _Attributes:
    """The __dict__ of a module that is being unpickled; pickle then adds the listed items."""
    return _attach(module, _Attributes(), functions)


def _prepare(attributes: _Attributes, module: Any) -> None:
    """Pickle calls this when all items are there."""
    for value in dict.values(attributes):
        if is_own(value) and hasattr(value.func, "prepare"):
            value.func.prepare(module)


@fused_forward
def _replicate(module: Any) -> nn.Module:
    """The class's own method; the replica then gets the same forward, bound to itself."""
    replica: nn.Module = getattr(type(module), _REPLICATE)(module)
    _attach(replica, _Attributes(vars(replica)), vars(module).copy().functions)  # type: ignore[attr-defined]
    return replica
