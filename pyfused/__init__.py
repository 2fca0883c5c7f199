"""pyfused: fused transformer kernels for PyTorch, and GPT-2, ALBERT, T5 and FNet made of them."""

from .dispatch import BackendError, backend, explain
from .ops import attention, ffn, layer_norm, linear

__version__ = "0.1.0"

__all__ = ["BackendError", "__version__", "attention", "backend", "explain", "ffn", "layer_norm", "linear"]
