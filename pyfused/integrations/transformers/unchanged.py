"""Is a model still as it was when a plan of it was made? Asked before every step, so that the plan may skip the modules.

A step skips a hundred modules, each of which may have got a hook, a forward, another weight or another memory since. All of it
is looked at anew, in C: one `map` over all modules for each question. 12 layers of GPT-2 take 40 us on a quiet core.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain, repeat
from operator import is_
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ... import extensions
from ...own_forward import changes, is_bare, is_fused
from .activations import kernel_activation
from .config import NAME, FusedConfig


class Kind(NamedTuple):
    """What a plan needs of the modules of one class."""

    is_fused: bool = False  # whether fuse_ must have given it its forward
    settings: str = ""  # the attributes that the plan has read


_LEAF = Kind()
Kinds = Mapping[type, Kind]


def kind_of(module: nn.Module, kinds: Kinds) -> Kind | None:
    """The module's row; None for a class that a plan does not know, subclasses included."""
    found = kinds.get(type(module))
    return _LEAF if found is None and kernel_activation(module) else found


def is_plain(root: nn.Module, kinds: Kinds) -> bool:
    """Whether every module below `root` is of a known class, runs on pyfused if that is needed, and nothing looks at it."""
    for module in list(root.modules())[1:]:
        kind = kind_of(module, kinds)
        if kind is None or not is_bare(module) or (kind.is_fused and not is_fused(module)):
            return False
        config = vars(module).get("config")
        if config is not None and not (type(config) is FusedConfig and config._attn_implementation == NAME):
            return False
    parameters = list(root.parameters())
    like = parameters[0]
    return all(type(p) is nn.Parameter and p.dtype == like.dtype and p.device == like.device for p in parameters)


class Watch:
    """The state of the modules below `root`, which is_plain said to be plain."""

    def __init__(self, root: nn.Module, kinds: Kinds):
        modules = list(root.modules())
        self._attributes = list(map(vars, modules))
        self._below = self._attributes[1:]  # the root itself is called as ever
        self._modules = modules[1:]
        self._types = list(map(type, self._modules))
        self._with_parts = [d for d in self._attributes if d["_modules"]]
        self._with_weights = [d for d in self._attributes if d["_parameters"]]
        named = [(vars(m), name) for m in self._modules for name in (kind_of(m, kinds) or _LEAF).settings.split()]
        self._owners, self._names = [d for d, _ in named], [name for _, name in named]
        configs = (d["config"] for d in self._below if "config" in d)
        self._configs = list({(id(c._fused), c._had): c for c in configs}.values())
        self._parts, self._weights = self._now("_modules", self._with_parts), self._now("_parameters", self._with_weights)
        self.parameters: list[Tensor] = [w for w in self._weights if w is not None]
        self._signature_of = extensions.signature()
        if self._signature_of(*self.parameters) is None:
            self._signature_of = _layouts
        self._state = self._read()

    @staticmethod
    def _now(name: str, owners: list[dict[str, Any]]) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, map(dict.get, owners, repeat(name)))))

    def _read(self) -> tuple[Any, ...]:
        """All that is compared with ==."""
        return (
            changes(),
            list(map(type, self._modules)),
            list(map(dict.get, self._below, repeat("forward"))),
            list(map(dict.get, self._owners, self._names)),
            list(map(Tensor.data_ptr, self.parameters)),
            self._signature_of(*self.parameters),
        )

    def holds(self) -> bool:
        """Whether nothing changed that a plan depends on."""
        weights = self._now("_parameters", self._with_weights)
        return (
            len(weights) == len(self._weights)
            and all(map(is_, weights, self._weights))
            and self._now("_modules", self._with_parts) == self._parts
            and not any(map(dict.get, self._attributes, repeat("training")))
            and not any(map(dict.get, self._below, repeat("_forward_hooks")))
            and not any(map(dict.get, self._below, repeat("_forward_pre_hooks")))
            and not torch_module._has_any_global_hook()
            and all(config._attn_implementation == NAME for config in self._configs)
            and self._read() == self._state
        )


def _layouts(*tensors: Tensor) -> Any:
    return [(t.dtype, t.shape, t.stride()) for t in tensors]
