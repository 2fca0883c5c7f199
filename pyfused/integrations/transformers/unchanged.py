"""Is a model still as it was when a plan of it was made? Asked before every step, so that the plan may skip the modules.

A step skips a hundred modules, each of which may have got a hook, a forward, another weight or other memory since. All of it is
looked at anew. Each question is put to all modules at once, in C++ (csrc/include/pyfused/python_same.h) or, without the
extension, in Python.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain, repeat
from operator import attrgetter, is_
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ... import extensions
from ...ops.checks import is_dense
from ...own_forward import changes, is_bare, is_fused
from .activations import kernel_activation
from .config import NAME, FusedConfig


class Kind(NamedTuple):
    """What a plan needs of the modules of one class."""

    is_fused: bool = False  # whether fuse_ must have given it its forward
    settings: str = ""  # the attributes that the plan has read
    forward: Any = None  # the class's own; None: any


_LEAF = Kind()
_get: Any = dict.get
_VALUE, _EMPTY, _ITEMS, _TYPE = range(4)  # kinds of questions, as python_same.h numbers them
Kinds = Mapping[type, Kind]


def known(kinds: Kinds) -> Kinds:
    """The rows with the classes' present forwards, so that a later patch of a class is noticed."""
    of: Any = {kind: row._replace(forward=kind.forward) for kind, row in kinds.items()}  # type: ignore[attr-defined]
    return of  # type: ignore[no-any-return]


def kind_of(module: nn.Module, kinds: Kinds) -> Kind | None:
    """The module's row; None for a class that a plan does not know, subclasses included."""
    found = kinds.get(type(module))
    return _LEAF if found is None and kernel_activation(module) else found


class Question(NamedTuple):
    """Put to many owners at once, the dicts of modules: is the answer the same object as before?"""

    kind: int
    key: str
    expected: tuple[Any, ...]


Owners = tuple[dict[str, Any], ...]
Group = tuple[Owners, tuple[Question, ...]]


def _value(owners: Owners, key: str) -> Question:
    return Question(_VALUE, key, tuple(map(_get, owners, repeat(key))))


def _items(owners: Owners, key: str) -> Question:
    return Question(_ITEMS, key, tuple(map(_items_of, owners, repeat(key))))


def _items_of(owner: dict[str, Any], key: str) -> tuple[Any, ...]:
    found = _get(owner, key)
    return tuple(chain.from_iterable(dict.items(found))) if isinstance(found, dict) else (found,)


def unchanged(groups: tuple[Group, ...]) -> bool:
    """Whether every answer is still the expected one."""
    return all(_holds(owners, question) for owners, questions in groups for question in questions)


def _holds(owners: Owners, question: Question) -> bool:
    kind, key, expected = question
    if kind == _TYPE:
        return all(type(module) is kind_then for module, kind_then in expected)
    if kind == _VALUE:
        return all(map(is_, map(_get, owners, repeat(key)), expected))
    if kind == _EMPTY:
        return not any(map(_get, owners, repeat(key)))
    now = map(_items_of, owners, repeat(key))
    return all(len(a) == len(b) and all(map(is_, a, b)) for a, b in zip(now, expected))


def memory(tensors: tuple[Tensor, ...]) -> Any:
    """What tells each tensor from every other view of the same memory, and from a tensor that has taken its place."""
    return [list(map(look, tensors)) for look in _LOOKS]


def same_memory(tensors: tuple[Tensor, ...], known: Any) -> bool:
    """Whether memory(tensors) is still what it was."""
    return bool(memory(tensors) == known)


_LOOKS: tuple[Any, ...] = Tensor.data_ptr, Tensor.stride, attrgetter("shape"), attrgetter("dtype"), attrgetter("device")
_IN_PYTHON = unchanged, memory, same_memory
_NATIVE: tuple[Any, Any, Any] = extensions.same() or _IN_PYTHON


class Watch:
    """The state of the modules below `root`, which are all plain."""

    def __init__(self, root: nn.Module, modules: list[nn.Module], kinds: Kinds):
        below = tuple(map(vars, modules))
        of_root = (vars(root),)  # which itself is called as ever, so its own hooks run
        with_settings: dict[str, list[Any]] = {}
        for module, attributes in zip(modules, below):
            if names := (kind_of(module, kinds) or _LEAF).settings:
                with_settings.setdefault(names, []).append(attributes)
        none = (None,) * len(below)

        def of_all(owners: Owners) -> tuple[Question, ...]:
            return _value(owners, "training"), _items(owners, "_parameters"), _items(owners, "_modules")

        of_below = (
            Question(_TYPE, "", tuple((module, type(module)) for module in modules)),
            _value(below, "forward"),
            Question(_EMPTY, "_forward_hooks", none),
            Question(_EMPTY, "_forward_pre_hooks", none),
        )
        groups: list[Group] = [(of_root, of_all(of_root)), (below, (*of_all(below), *of_below))]
        for names, found in with_settings.items():
            owners = tuple(found)
            groups.append((owners, tuple(_value(owners, name) for name in names.split())))
        self._groups = tuple(groups)
        configs = (attributes["config"] for attributes in below if "config" in attributes)
        self._configs = list({(id(c._fused), c._had): c for c in configs}.values())
        weights = chain.from_iterable(attributes["_parameters"].values() for attributes in (*of_root, *below))
        self.parameters: tuple[Tensor, ...] = tuple(w for w in weights if w is not None)
        self._unchanged, look, self._same_memory = _NATIVE
        self._memory = look(self.parameters)
        if self._memory is None:  # C++ cannot read one of them
            self._memory, self._same_memory = memory(self.parameters), same_memory
        self._changes = changes()
        classes: Any = set(map(type, modules))
        self._classes = [(kind, kind.forward) for kind in classes]

    @classmethod
    def of(cls, root: nn.Module, kinds: Kinds) -> Watch | None:
        """None unless every module below `root` is of a known class, runs on pyfused if that is needed, and has no hooks, no
        module is in training mode, and the parameters have one dtype and one device."""
        modules = list(root.modules())[1:]
        if root.training:
            return None
        for module in modules:
            kind = kind_of(module, kinds)
            if kind is None or module.training or not is_bare(module) or (kind.is_fused and not is_fused(module)):
                return None
            if kind.forward is not None and type(module).forward is not kind.forward:
                return None
            attributes = vars(module)
            if (
                "weight" in attributes or "bias" in attributes
            ):  # no parameter: pruning and FSDP leave a tensor in its place
                return None
            config = attributes.get("config")
            if config is not None and not (type(config) is FusedConfig and config._attn_implementation == NAME):
                return None
        weights = chain.from_iterable(module._parameters.values() for module in (root, *modules))
        if not all(p is None or is_dense(p) for p in weights):  # sparse ones have no memory to compare
            return None
        watch = cls(root, modules, kinds)
        for p in watch.parameters:
            like = watch.parameters[0]
            if type(p) is not nn.Parameter or p.dtype != like.dtype or p.device != like.device:
                return None
        return watch

    def holds(self) -> bool:
        """Whether nothing changed that a plan depends on."""
        return (
            changes() == self._changes
            and not torch_module._has_any_global_hook()
            and all(config._attn_implementation == NAME for config in self._configs)
            and all(kind.forward is forward for kind, forward in self._classes)
            and self._unchanged(self._groups)
            and self._same_memory(self.parameters, self._memory)
        )
