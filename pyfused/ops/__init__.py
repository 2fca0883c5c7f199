"""The public operators: checks, schema, fake and autograd of each; the kernels are in kernels/."""

from . import layer_norm as _layer_norm
from .layer_norm import layer_norm

# Operator name -> the module that defines it (the name itself is the function).
MODULES = {"layer_norm": _layer_norm}

__all__ = ["MODULES", "layer_norm"]
