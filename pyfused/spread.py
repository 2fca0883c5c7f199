"""Is a tensor spread over several processes, as a DTensor? Asked without importing DTensor's module, which takes a second."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn


def is_spread(value: Any) -> bool:
    """Whether this is a DTensor. There are none before somebody has imported their module."""
    module = sys.modules.get("torch.distributed.tensor")
    kind = getattr(module, "DTensor", None)
    return kind is not None and isinstance(value, kind)


def has_spread_weights(model: nn.Module) -> bool:
    """Whether parameters of the model are DTensors: parallelize_module or fully_shard made them so."""
    return any(map(is_spread, model.parameters()))


def is_wrapped(module: nn.Module) -> bool:
    """Whether fully_shard wrapped this module. Its weights are whole only inside its calls."""
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)
