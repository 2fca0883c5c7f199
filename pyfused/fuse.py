"""How does an existing model run on fused kernels? fuse_ gives its modules another forward and changes nothing else.

The new forward is an attribute of the instance (own_forward.py). Class, parameters, buffers, hooks and state dict stay. unfuse_
removes the attribute. Deep copies, pickles and nn.DataParallel's replicas of a fused module are fused too; any other copy, such
as copy.copy's, runs its class's forward. A fused forward computes the same as the class's own, and calls that one (`original`)
for arguments that the kernels do not support. It is a function at the top of a file, so that it can be pickled.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from torch import nn

from .own_forward import (
    Adapter,
    Entry,
    Forward,
    check_module,
    checked_filter,
    give,
    has_another_forward,
    is_fused,
    summary,
    take_back,
)
from .rules import FLAG, check

# From the library that defines a model's classes to the module of pyfused/integrations for it. Such a module has ADAPTERS, a
# table by the full name of a class. It may have adapter_for(module), for classes that the table lacks; LINEAR and ENCODERS,
# tables for fuse_'s switches; enter(model, wanted) and leave(model), for changes to a model as a whole.
INTEGRATIONS = {"torch": "torch_nn", "transformers": "transformers"}


@dataclass(frozen=True)
class FuseReport:
    """What fuse_ did; print() it. Modules in `replaced` now run on pyfused. Those in `left` do not; their notes say why."""

    replaced: tuple[Entry, ...]
    left: tuple[Entry, ...]

    def __str__(self) -> str:
        return summary(self.replaced, self.left)


def fuse_(
    model: nn.Module,
    *,
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
    skip_padding: bool = False,
    linear: bool = False,
) -> FuseReport:
    """Makes an existing model run on pyfused's kernels, in place. Only this instance changes, no class and nothing global.

    It supports transformers' GPT-2, ALBERT, T5 and FNet with any head; attention of every transformers model that uses the
    attention interface, and of DeBERTa, BLOOM and others that compute it by hand; norms, feed-forwards of the usual shapes and
    the heads of language models; and torch.nn's LayerNorm, RMSNorm, MultiheadAttention, TransformerEncoderLayer,
    TransformerDecoderLayer and TransformerEncoder, anywhere in the model. Parameters, state dict, hooks, classes, configs and
    outputs stay.

    Args:
        model: any module. Modules that are already fused stay fused.
        filter_fn: takes (name in the model, module) and returns whether to fuse it. It is called for every module that could be
            fused.
        skip_padding: encoders of transformers' models compute only the real tokens of a padded batch, packed one after the
            other. A batch that is half padding costs half. Real tokens get the same states; padding gets zeros. Padding is
            still computed in traces of torch.compile, with a chunk_size_feed_forward, where a call asks for hidden states or
            attentions, and where the encoder holds modules with hooks or of your own classes. On a GPU each call waits for
            the device once.
        linear: every other nn.Linear runs on pyfused.linear too. Use it for weights in half precision on a CPU without
            instructions for them, where torch's product is slow.

    Returns:
        The modules that were replaced, and those that were not, with the reasons.

    Raises:
        TypeError: model is not a torch.nn.Module, filter_fn is not callable, or a switch is not a bool.
        ValueError: skip_padding is True, and the model has no encoder that can leave padding out. Nothing was changed then.
    """
    check_module(model)
    check(FLAG, skip_padding=skip_padding, linear=linear)
    wanted = checked_filter(filter_fn)
    adapters = _adapters(model, skip_padding, linear)
    replaced: dict[str, Entry] = {}  # by name: an adapter's note replaces enter's, and says more
    left: list[Entry] = []
    for library in _integrations(model):
        if hasattr(library, "enter"):
            done, kept = library.enter(model, wanted)
            replaced |= {entry.name: entry for entry in done}
            left += kept
    shaped = [library.adapter_for for library in _integrations(model) if hasattr(library, "adapter_for")]
    for name, module in model.named_modules():
        found = _adapter(module, adapters) or next(filter(None, (adapter_for(module) for adapter_for in shaped)), None)
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
    """Undoes fuse_: this model and its submodules run their classes' forwards again.

    Returns:
        The model itself.

    Raises:
        TypeError: model is not a torch.nn.Module.
    """
    check_module(model)
    for module in model.modules():
        if is_fused(module):
            take_back(module)
    for library in _integrations(model):
        if hasattr(library, "leave"):
            library.leave(model)
    return model


def _integrations(model: nn.Module) -> list[ModuleType]:
    """The integrations for the classes of this model. Libraries that were not imported cannot have any, and are not loaded."""
    bases = {base for module in model.modules() for base in type(module).__mro__}
    libraries = {base.__module__.partition(".")[0] for base in bases}
    names = [INTEGRATIONS[library] for library in INTEGRATIONS if library in libraries and library in sys.modules]
    return [importlib.import_module(f"pyfused.integrations.{name}") for name in names]


def _adapters(model: nn.Module, skip_padding: bool, linear: bool) -> dict[str, Adapter]:
    """The adapters for this model, by the full name of a class."""
    libraries = _integrations(model)
    adapters = {name: adapter for library in libraries for name, adapter in library.ADAPTERS.items()}
    if linear:
        adapters |= {name: adapter for library in libraries for name, adapter in getattr(library, "LINEAR", {}).items()}
    if skip_padding:
        encoders = {name: found for library in libraries for name, found in getattr(library, "ENCODERS", {}).items()}
        if not any(callable(_adapter(module, encoders)) for module in model.modules()):
            raise ValueError(
                f"skip_padding is True, but this {type(model).__name__} has no encoder that can leave padding out; it takes "
                f"False. Known encoders: {', '.join(sorted(name.rpartition('.')[2] for name in encoders)) or 'none'}"
            )
        adapters |= encoders
    return adapters


def _adapter(module: nn.Module, adapters: dict[str, Adapter]) -> Adapter | str | None:
    """The adapter for the module's class, or for a base class whose forward it inherits; or why that does not fit; or None."""
    for base in type(module).__mro__:
        if base.__module__.startswith("pyfused."):
            return None  # pyfused's own modules need no adapter
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
