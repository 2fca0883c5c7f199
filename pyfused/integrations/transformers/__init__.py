"""How do Hugging Face transformers' models run on pyfused? Registers attn_implementation="pyfused" and fuse_'s adapters."""

from __future__ import annotations

from collections.abc import Callable

import transformers
from packaging.version import Version
from torch import nn

OLDEST = "4.57"  # the oldest that the tests run with
if Version(transformers.__version__) < Version(OLDEST):
    raise ImportError(
        f"pyfused works with transformers {OLDEST} and later; this is {transformers.__version__}", name="transformers"
    )

from ...families import FAMILIES, load  # noqa: E402
from ...own_forward import Adapter, Entry  # noqa: E402
from . import by_hand, config, mpnet, own_attention, sdpa_calls, shaped, squeezebert, umt5  # noqa: E402
from .attention import attend  # noqa: E402
from .config import NAME, leave  # noqa: E402
from .heads import fuse_heads  # noqa: E402
from .masks import make_mask  # noqa: E402
from .padding import ENCODERS  # noqa: E402
from .projections import fuse_projections  # noqa: E402

__all__ = ["ADAPTERS", "ENCODERS", "NAME", "adapter_for", "attend", "enter", "leave", "make_mask"]


def enter(model: nn.Module, wanted: Callable[[str, nn.Module], bool]) -> tuple[list[Entry], list[Entry]]:
    """What fuse_ does to a model as a whole: attention layers, their projections, and heads; returns (replaced, left)."""
    done, left = config.enter(model, wanted, _OWN_ATTENTION)
    more, others = fuse_heads(model, wanted)
    return done + more + fuse_projections(model, wanted), left + others


def adapter_for(module: nn.Module) -> Adapter | None:
    """The adapter of a module whose class ADAPTERS lacks; None if there is none."""
    return own_attention.adapter_for(module) or shaped.adapter_for(module)


ADAPTERS: dict[str, Adapter] = {}
for _family in FAMILIES.values():
    ADAPTERS |= load(_family.adapters) if _family.adapters else {}
ADAPTERS |= umt5.ADAPTERS | mpnet.ADAPTERS | squeezebert.ADAPTERS | own_attention.ADAPTERS
ADAPTERS |= by_hand.ADAPTERS | sdpa_calls.ADAPTERS
_OWN_ATTENTION = [name for name in ADAPTERS if "Attention" in name.rpartition(".")[2]]
