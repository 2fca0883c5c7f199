"""How do Hugging Face transformers' models run on pyfused? Registers attn_implementation="pyfused", and what fuse_ replaces."""

from __future__ import annotations

import transformers
from packaging.version import Version

OLDEST = "5.16"  # from here on T5 attends by the interface
if Version(transformers.__version__) < Version(OLDEST):
    raise ImportError(
        f"pyfused works with transformers {OLDEST} and later; this is {transformers.__version__}", name="transformers"
    )

from ..fuse import Adapter  # noqa: E402
from . import _albert, _fnet, _gpt2, _t5  # noqa: E402
from ._attend import attend  # noqa: E402
from ._enter import NAME, enter, leave  # noqa: E402
from ._masks import make_mask  # noqa: E402

__all__ = ["ADAPTERS", "NAME", "attend", "enter", "leave", "make_mask"]

ADAPTERS: dict[str, Adapter] = {**_gpt2.ADAPTERS, **_albert.ADAPTERS, **_fnet.ADAPTERS, **_t5.ADAPTERS}
