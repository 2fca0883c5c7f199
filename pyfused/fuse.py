"""How does an existing model run on fused kernels, unchanged otherwise? fuse_ gives its modules another forward.

The forward is an attribute of the instance (own_forward.py): class, parameters, buffers, hooks and state dict stay, and
taking the attribute away (unfuse_) restores the module. Deep copies, pickles and nn.DataParallel's replicas have such a forward
of their own; any other copy of a fused module's attributes, as copy.copy makes, computes as its class does. The forward is a
function that can be imported by its name. It computes what the class's own forward does and hands over to it (`original`) what
the kernels do not have, call by call.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from types import ModuleType
from typing import Any

from torch import nn

from .own_forward import Adapter, Entry, Forward, give, has_another_forward, is_fused, take_back

# The library a model's classes come from -> the file of pyfused/integrations that knows them. Such a file has ADAPTERS, by the
# full name of a class, and may have enter(model, wanted) and leave(model) for what concerns a model as a whole.
INTEGRATIONS = {"torch": "torch_nn", "transformers": "transformers"}


@dataclass(frozen=True)
class FuseReport:
    """What fuse_ did. print() it: `replaced` run on pyfused now, `left` are as they were, each with the reason."""

    replaced: tuple[Entry, ...]
    left: tuple[Entry, ...]

    def __str__(self) -> str:
        rows = [f"replaced: {len(self.replaced)}", *_rows(self.replaced), f"left: {len(self.left)}", *_rows(self.left)]
        return "\n".join(rows)


def _rows(entries: tuple[Entry, ...]) -> Iterator[str]:
    """One row for all layers of the same kind: the numbers in a name are what tells them apart."""

    def pattern(entry):
        parts = entry.name.split(".")
        return ".".join("*" if p.isdigit() else p for p in parts) or "(the model)", entry.kind, entry.note

    for (name, kind, note), group in groupby(sorted(entries, key=pattern), pattern):
        count = len(list(group))
        yield f"  {name} ({kind}){f' x{count}' if count > 1 else ''}: {note}"


def fuse_(model: nn.Module, *, filter_fn: Callable[[str, nn.Module], bool] | None = None) -> FuseReport:
    """Makes an existing model run on pyfused's kernels, in place: this instance alone, no class and nothing global.

    Known are transformers' GPT-2, ALBERT, T5 and FNet with any head, every transformers model that uses the attention
    interface (attention and norms), and torch.nn's LayerNorm, RMSNorm, MultiheadAttention, TransformerEncoderLayer,
    TransformerDecoderLayer and TransformerEncoder, wherever they stand in the model. Parameters, state dict, hooks, classes,
    configs and outputs stay.

    Args:
        model: any module. What is fused already stays fused.
        filter_fn: (name in the model, module) -> whether this module may be fused. It is asked for each module that could
            be.

    Returns:
        What was replaced, and what was left and why.

    Raises:
        TypeError: model is no torch.nn.Module, or filter_fn cannot be called.
    """
    _check_module(model)
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn is a {type(filter_fn).__name__}; it takes a function of (name, module), or None")
    wanted = filter_fn or (lambda name, module: True)
    replaced: dict[str, Entry] = {}  # by name: what an adapter says of a module is more than what enter said
    left: list[Entry] = []
    for library in _integrations(model):
        if hasattr(library, "enter"):
            done, kept = library.enter(model, wanted)
            replaced |= {entry.name: entry for entry in done}
            left += kept
    adapters = {name: adapter for library in _integrations(model) for name, adapter in library.ADAPTERS.items()}
    for name, module in model.named_modules():
        found = _adapter(module, adapters)
        if found is None:
            continue
        forward = found if isinstance(found, str) else _reason_against(name, module, wanted) or found(module)
        kind = type(module).__name__
        if isinstance(forward, str):
            left.append(Entry(name, kind, forward))
        else:
            give(module, forward)
            replaced[name] = Entry(name, kind, _first_line(forward))
    return FuseReport(tuple(replaced.values()), tuple(left))


def unfuse_(model: nn.Module) -> nn.Module:
    """Takes away what fuse_ gave to this model and its submodules, which then compute as their classes do.

    Returns:
        The model itself.

    Raises:
        TypeError: model is no torch.nn.Module.
    """
    _check_module(model)
    for module in model.modules():
        if is_fused(module):
            take_back(module)
    for library in _integrations(model):
        if hasattr(library, "leave"):
            library.leave(model)
    return model


def _check_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it takes a torch.nn.Module")


def _integrations(model: nn.Module) -> list[ModuleType]:
    """The files that know some class of this model. A library that nobody imported has no class in it."""
    bases = {base for module in model.modules() for base in type(module).__mro__}
    libraries = {base.__module__.partition(".")[0] for base in bases}
    names = [INTEGRATIONS[library] for library in INTEGRATIONS if library in libraries and library in sys.modules]
    return [importlib.import_module(f"pyfused.integrations.{name}") for name in names]


def _adapter(module: nn.Module, adapters: dict[str, Adapter]) -> Adapter | str | None:
    """By the module's class, or a base whose forward it inherits."""
    for base in type(module).__mro__:
        if base.__module__.startswith("pyfused."):
            return None  # fused by construction
        adapter = adapters.get(f"{base.__module__}.{base.__qualname__}")
        if adapter is not None:
            if type(module).forward is vars(base)["forward"]:
                return adapter
            return f"its class has a forward other than {base.__name__}'s"
    return None


def _reason_against(name: str, module: nn.Module, wanted: Callable[[str, nn.Module], bool]) -> str:
    if not wanted(name, module):
        return "filter_fn says no"
    if has_another_forward(module):
        return "this instance has a forward of its own already"
    return ""


def _first_line(forward: Forward) -> str:
    return (forward.__doc__ or forward.__name__).strip().splitlines()[0].rstrip(".")
