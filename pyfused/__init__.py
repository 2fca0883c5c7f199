"""pyfused: fused transformer kernels for PyTorch, and GPT-2, ALBERT, T5 and FNet made of them."""

from .dispatch import BackendError, backend, explain
from .generation import Generator
from .models import Backbone, GPT2Backbone
from .ops import attention, ffn, layer_norm, linear

__version__ = "0.1.0"

__all__ = [
    "Backbone",
    "BackendError",
    "GPT2Backbone",
    "Generator",
    "__version__",
    "attention",
    "backend",
    "explain",
    "ffn",
    "layer_norm",
    "linear",
]
