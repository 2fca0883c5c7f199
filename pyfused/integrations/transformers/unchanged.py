"""Is a model still as it was when a plan of it was made? Asked before every step, so that the plan may skip the modules.

A step skips a hundred modules, each of which may have got a hook, a forward, another weight or other memory since. All of it is
looked at anew: for each question one `map` over all modules, which runs in C.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain, repeat
from operator import attrgetter, is_
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

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
Kinds = Mapping[type, Kind]


def known(kinds: Kinds) -> Kinds:
    """The rows with the classes' present forwards, so that a later patch of a class is noticed."""
    of: Any = {kind: row._replace(forward=kind.forward) for kind, row in kinds.items()}  # type: ignore[attr-defined]
    return of  # type: ignore[no-any-return]


def kind_of(module: nn.Module, kinds: Kinds) -> Kind | None:
    """The module's row; None for a class that a plan does not know, subclasses included."""
    found = kinds.get(type(module))
    return _LEAF if found is None and kernel_activation(module) else found


class Watch:
    """The state of the modules below `root`, which are all plain."""

    def __init__(self, root: nn.Module, modules: list[nn.Module], kinds: Kinds):
        self._modules = modules
        self._below = list(map(vars, modules))
        self._attributes = [vars(root), *self._below]  # the root itself is called as ever, so its own hooks run
        self._with_parts = [d for d in self._attributes if d["_modules"]]
        self._with_weights = [d for d in self._attributes if d["_parameters"]]
        names = [(kind_of(m, kinds) or _LEAF).settings.split() for m in modules]
        self._owners = [d for d, read in zip(self._below, names) for _ in read]
        self._names = [name for read in names for name in read]
        configs = (d["config"] for d in self._below if "config" in d)
        self._configs = list({(id(c._fused), c._had): c for c in configs}.values())
        self._parts, self._weights = (
            self._now("_modules", self._with_parts),
            self._now("_parameters", self._with_weights),
        )
        self.parameters: list[Tensor] = [w for w in self._weights if w is not None]
        # Address, strides, number of elements and dtype tell a tensor from every other view of the same memory.
        self._tensors = [list(map(look, self.parameters)) for look in _LOOKS]
        self._changes = changes()
        self._types = list(map(type, self._modules))
        classes: Any = set(self._types)
        self._classes = [(kind, kind.forward) for kind in classes]
        self._forwards = list(map(_get, self._below, repeat("forward")))
        self._settings = list(map(_get, self._owners, self._names))

    @classmethod
    def of(cls, root: nn.Module, kinds: Kinds) -> Watch | None:
        """None unless every module below `root` is of a known class, runs on pyfused if that is needed, and has no hooks, and
        the parameters have one dtype and one device."""
        modules = list(root.modules())[1:]
        for module in modules:
            kind = kind_of(module, kinds)
            if kind is None or not is_bare(module) or (kind.is_fused and not is_fused(module)):
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
        watch = cls(root, modules, kinds)
        for p in watch.parameters:
            like = watch.parameters[0]
            if type(p) is not nn.Parameter or p.dtype != like.dtype or p.device != like.device:
                return None
        return watch

    @staticmethod
    def _now(name: str, owners: list[dict[str, Any]]) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, map(_get, owners, repeat(name)))))

    def holds(self) -> bool:
        """Whether nothing changed that a plan depends on."""
        weights = self._now("_parameters", self._with_weights)
        return (
            changes() == self._changes
            and not torch_module._has_any_global_hook()
            and all(config._attn_implementation == NAME for config in self._configs)
            and len(weights) == len(self._weights)
            and all(map(is_, weights, self._weights))
            and all(list(map(look, self.parameters)) == known for look, known in zip(_LOOKS, self._tensors))
            and self._now("_modules", self._with_parts) == self._parts
            and list(map(type, self._modules)) == self._types
            and all(kind.forward is forward for kind, forward in self._classes)
            and list(map(_get, self._below, repeat("forward"))) == self._forwards
            and list(map(_get, self._owners, self._names)) == self._settings
            and not any(map(_get, self._attributes, repeat("training")))
            and not any(map(_get, self._below, repeat("_forward_hooks")))
            and not any(map(_get, self._below, repeat("_forward_pre_hooks")))
        )


_LOOKS: tuple[Any, ...] = Tensor.data_ptr, Tensor.stride, Tensor.numel, attrgetter("dtype")
