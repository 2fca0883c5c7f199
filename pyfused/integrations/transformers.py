"""How do Hugging Face transformers' models run on pyfused? Registers attn_implementation="pyfused", and what fuse_ replaces."""

from __future__ import annotations

from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from ..fuse import Adapter
from . import _albert, _fnet, _t5
from ._attend import attend
from ._masks import make_mask

__all__ = ["ADAPTERS", "NAME", "attend", "make_mask"]

NAME = "pyfused"

AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, make_mask)

ADAPTERS: dict[str, Adapter] = {**_albert.ADAPTERS, **_fnet.ADAPTERS, **_t5.ADAPTERS}
