"""pyfused: fused transformer kernels for PyTorch, and GPT-2, ALBERT, T5 and FNet built on them."""

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .dispatch import BackendError, backend
from .families import FAMILIES, load
from .ops import (
    DistanceBias,
    RelativeBias,
    attention,
    decode,
    ffn,
    fourier_mix,
    gated_ffn,
    layer_norm,
    linear,
    relative_bias,
    rms_norm,
)
from .ops.explain import explain

if TYPE_CHECKING:
    from .checkpoints.tokenizer import Tokenizer
    from .encoding import encode
    from .fuse import FuseReport, fuse_, unfuse_
    from .generation.generator import Generator
    from .generation.plans import plan_of
    from .models import AlbertBackbone, Backbone, FNetBackbone, GPT2Backbone, T5Backbone
    from .quantize import QuantizeReport, quantize_, unquantize_

__all__ = [
    "AlbertBackbone",
    "Backbone",
    "BackendError",
    "DistanceBias",
    "FNetBackbone",
    "FuseReport",
    "GPT2Backbone",
    "Generator",
    "QuantizeReport",
    "RelativeBias",
    "T5Backbone",
    "Tokenizer",
    "__version__",
    "attention",
    "backend",
    "decode",
    "encode",
    "explain",
    "ffn",
    "fourier_mix",
    "fuse_",
    "gated_ffn",
    "layer_norm",
    "linear",
    "plan_of",
    "quantize_",
    "relative_bias",
    "rms_norm",
    "unfuse_",
    "unquantize_",
]

# Imported at first use, so that users of the operators do not wait for the models.
_LAZY = {"Backbone": "pyfused.models:Backbone", "Generator": "pyfused.generation:Generator"}
_LAZY |= {"plan_of": "pyfused.generation:plan_of"}
_LAZY |= {"Tokenizer": "pyfused.checkpoints.tokenizer:Tokenizer"}
_LAZY |= {"encode": "pyfused.encoding:encode"}
_LAZY |= {name: f"pyfused.fuse:{name}" for name in ("FuseReport", "fuse_", "unfuse_")}
_LAZY |= {name: f"pyfused.quantize:{name}" for name in ("QuantizeReport", "quantize_", "unquantize_")}
_LAZY |= {family.class_name: family.backbone for family in FAMILIES.values()}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return load(_LAZY[name])
    if name == "nn":
        return importlib.import_module(".nn", __name__)
    raise AttributeError(f"module 'pyfused' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
