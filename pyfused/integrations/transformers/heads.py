"""How does a language model's head run on pyfused? Its product with the vocabulary is pyfused.linear, which reads a big matrix
fast for the one row of a generation step."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from transformers import PreTrainedModel

from ...own_forward import Entry, give, has_another_forward
from ..torch_nn import linear_forward


def fuse_heads(model: nn.Module, wanted: Callable[[str, nn.Module], bool]) -> tuple[list[Entry], list[Entry]]:
    """Gives the heads that make logits their forward; returns (replaced, left)."""
    heads = {id(head) for part in model.modules() if isinstance(part, PreTrainedModel) and (head := _head(part))}
    done, left = [], []
    for name, module in model.named_modules():
        if id(module) not in heads:
            continue
        if not wanted(name, module):
            left.append(Entry(name, "Linear", "filter_fn says no"))
        elif has_another_forward(module):
            left.append(Entry(name, "Linear", "this instance has a forward of its own already"))
        else:
            give(module, linear_forward)
            done.append(Entry(name, "Linear", "pyfused.linear"))
    return done, left


def _head(model: PreTrainedModel) -> nn.Linear | None:
    try:
        head = model.get_output_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    return head if type(head) is nn.Linear else None
