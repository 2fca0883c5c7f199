"""How do Hugging Face transformers' models run on pyfused? Registers attn_implementation="pyfused", and what fuse_ replaces."""

from __future__ import annotations

from ..fuse import Adapter
from . import _albert, _fnet, _t5

ADAPTERS: dict[str, Adapter] = {**_albert.ADAPTERS, **_fnet.ADAPTERS, **_t5.ADAPTERS}
