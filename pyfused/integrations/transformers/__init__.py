"""How do Hugging Face transformers' models run on pyfused? Registers attn_implementation="pyfused" and fuse_'s adapters."""

from __future__ import annotations

import transformers
from packaging.version import Version

OLDEST = "5.16"  # the first release whose T5 uses the attention interface
if Version(transformers.__version__) < Version(OLDEST):
    raise ImportError(
        f"pyfused works with transformers {OLDEST} and later; this is {transformers.__version__}", name="transformers"
    )

from ...families import FAMILIES, load  # noqa: E402
from ...own_forward import Adapter  # noqa: E402
from .attention import attend  # noqa: E402
from .config import NAME, enter, leave  # noqa: E402
from .masks import make_mask  # noqa: E402

__all__ = ["ADAPTERS", "NAME", "attend", "enter", "leave", "make_mask"]

ADAPTERS: dict[str, Adapter] = {}
for _family in FAMILIES.values():
    ADAPTERS |= load(_family.adapters) if _family.adapters else {}
