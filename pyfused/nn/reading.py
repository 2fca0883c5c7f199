"""How does a module compute with something made of its parameters, such as a cast, while its state dict stays as it is?

The module gets a class made here. It has a property for each parameter, and that property applies a function to the parameter
whenever it is read. Gradients flow through the function. Parameters keep their names and their places in the state dict. A
class may be made of one that was made here: the functions then follow each other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

Read = Callable[[Tensor], "Tensor | None"]  # hashable, and pickled by its name or its fields


def read_through(module: Any, read: Read, *names: str) -> None:
    """From now on the module's code sees read(parameter) for the parameters of these names, or for all of its own."""
    kind: Any = type(module)
    module.__class__ = _reading(kind, read, names or tuple(module._parameters))


@functools.cache
def _reading(base: Any, read: Read, names: tuple[str, ...]) -> Any:
    def through(name: str) -> property:
        earlier: Any = getattr(base, name, None)

        def get(module: nn.Module) -> Tensor | None:
            found = module._parameters[name] if earlier is None else earlier.fget(module)
            return None if found is None else read(found)

        return property(get)

    root, steps = getattr(base, "_made_of", (base, ()))
    made_of = root, (*steps, (read, names))

    def reduce(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
        return _empty, made_of, module.__dict__

    members: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__reduce_ex__": reduce,
        "_made_of": made_of,
    }
    return type(base.__name__, (base,), {**members, **{name: through(name) for name in names}})


def _empty(root: Any, steps: tuple[tuple[Read, tuple[str, ...]], ...]) -> nn.Module:
    """An empty module for pickle and deepcopy to fill: they cannot look up the class by name."""
    cls = functools.reduce(lambda base, step: _reading(base, *step), steps, root)
    module: nn.Module = cls.__new__(cls)
    return module
