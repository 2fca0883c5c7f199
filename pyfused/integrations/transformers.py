"""How do Hugging Face transformers' models run on pyfused? Registers attn_implementation="pyfused", and what fuse_ replaces."""

from __future__ import annotations

from ..fuse import Adapter
from . import _albert, _fnet, _gpt2, _t5
from ._attend import attend
from ._enter import NAME, enter, leave
from ._masks import make_mask

__all__ = ["ADAPTERS", "NAME", "attend", "enter", "leave", "make_mask"]

ADAPTERS: dict[str, Adapter] = {**_gpt2.ADAPTERS, **_albert.ADAPTERS, **_fnet.ADAPTERS, **_t5.ADAPTERS}
