"""How do Hugging Face transformers' models run on pyfused? Registers attn_implementation="pyfused", and what fuse_ replaces."""

from __future__ import annotations

from ..fuse import Adapter

ADAPTERS: dict[str, Adapter] = {}
