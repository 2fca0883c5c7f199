"""What does fuse_ replace in models that have T5's code under other names? What it replaces in T5, where the code is alike."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

from torch import nn

from ...own_forward import Adapter, Forward
from . import shaped
from .alike import HAS_INTERFACE, PREFIXES, UNREADABLE, module_of, reason, text_of

_OTHER_STACKS = ("longt5",)  # its encoder has attention code of its own


def adapters(of_t5: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """T5's adapters, by the name of a class without its prefix, for all kin: by the full name of a class."""
    return {
        f"{module_of(folder)}.{prefix}{name}": functools.partial(_if_alike, name, adapter)
        for folder, prefix in PREFIXES.items()
        for name, adapter in of_t5.items()
    }


def stacks(adapter: Adapter) -> dict[str, Adapter]:
    """The adapter for kin's stacks. With the interface they must hand keyword arguments on to their layers."""

    def checked(module: nn.Module) -> Forward | str:
        if not HAS_INTERFACE:
            return adapter(module)
        try:
            call = re.search(r"\blayer_module\((.*?)\n *\)", text_of(type(module).forward), re.DOTALL)
        except UNREADABLE:
            return "its source cannot be read"
        return adapter(module) if call and "**kwargs" in call[1] else "it hands no keyword arguments on to its layers"

    return {
        f"{module_of(folder)}.{prefix}Stack": checked
        for folder, prefix in PREFIXES.items()
        if folder not in _OTHER_STACKS
    }


def _if_alike(name: str, adapter: Adapter, module: nn.Module) -> Forward | str:
    reasons = [reason(base, name) for base in type(module).__mro__ if base.__name__.endswith(name)]
    if "" in reasons:
        return adapter(module)
    by_shape = shaped.adapter_for(module)
    return reasons[0] if by_shape is None else by_shape(module)
