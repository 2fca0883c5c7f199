"""The public operators. Each file has the checks, schema, fake and autograd of one; the kernels are in kernels/."""

import importlib

# `pyfused.ops.attention` is the function; MODULES holds the modules, for explain() and the tests.
NAMES = ("attention", "decode", "ffn", "fourier_mix", "gated_ffn", "layer_norm", "linear", "relative_bias", "rms_norm")
MODULES = {name: importlib.import_module(f".{name}", __name__) for name in NAMES}

from .attention import attention  # noqa: E402
from .decode import decode  # noqa: E402
from .ffn import ffn  # noqa: E402
from .fourier_mix import fourier_mix  # noqa: E402
from .gated_ffn import gated_ffn  # noqa: E402
from .layer_norm import layer_norm  # noqa: E402
from .linear import linear  # noqa: E402
from .relative_bias import DistanceBias, RelativeBias, relative_bias  # noqa: E402
from .rms_norm import rms_norm  # noqa: E402

__all__ = [
    "MODULES",
    "NAMES",
    "DistanceBias",
    "RelativeBias",
    "attention",
    "decode",
    "ffn",
    "fourier_mix",
    "gated_ffn",
    "layer_norm",
    "linear",
    "relative_bias",
    "rms_norm",
]
