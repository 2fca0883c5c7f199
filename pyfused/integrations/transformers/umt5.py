"""What does fuse_ replace in transformers' UMT5? Its attention: the kernel reads the table of biases that every layer has."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.umt5 import modeling_umt5

from ...nn.t5 import attend
from ...ops import RelativeBias
from ...own_forward import Adapter, Forward, fused_forward, original
from .config import NAME
from .plain_modules import overridden
from .releases import full_name, interface
from .t5_tables import has_plain_table


@fused_forward
def attention(
    module: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    past_key_values: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """pyfused.attention, the bias by relative position inside the kernel"""
    given = (hidden_states, encoder_hidden_states, past_key_values, attention_mask)
    if module.config._attn_implementation != NAME:
        return original(module, *given, **kwargs)
    function = interface(NAME, modeling_umt5.eager_attention_forward)

    def compute(query, key, value, bias):
        return function(
            *(module, query, key, value, attention_mask),
            dropout=module.dropout if module.training else 0.0,
            scaling=module.scaling,
            **({"relative_bias": bias} if isinstance(bias, RelativeBias) else {"position_bias": bias}),
            **kwargs,
        )

    hands_on = not module.has_relative_attention_bias or has_plain_table(module)
    seen, _, weights = attend(
        module, hidden_states, encoder_hidden_states, None, past_key_values, compute, hands_on_table=hands_on
    )
    return module.o(seen), weights


def _attention(module: Any) -> Forward | str:
    if not hasattr(modeling_umt5, "eager_attention_forward"):
        return "in this release of transformers its attention is code of its own"
    return overridden(module, modeling_umt5.UMT5Attention, "compute_bias", "_relative_position_bucket") or attention


ADAPTERS: dict[str, Adapter] = {full_name("umt5.UMT5Attention"): _attention}
