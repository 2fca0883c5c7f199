"""What does fuse_ replace in the attention classes that older transformers releases have for sdpa? Their attention.

BERT's kin, DistilBERT and ALBERT got transformers' attention interface later. A call with a cache, a head mask or attention
weights runs the class's own code.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...own_forward import Adapter, fused_forward, original
from .attention import attend, original_telling
from .config import FusedConfig
from .releases import full_name, named, output_capturing, parameters


def attended(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, size: int, is_causal: bool = False
) -> Tensor:
    """(B, Sq, H * size) -> (B, Sq, H * size); key and value have Sk rows, the mask broadcasts to (B, H, Sq, Sk)."""
    q, k, v = (x.unflatten(-1, (-1, size)).transpose(1, 2) for x in (query, key, value))
    dropout = module.dropout_prob if module.training else 0.0
    seen, _ = attend(module, q, k, v, mask, dropout=dropout, is_causal=is_causal)
    return seen.flatten(2)


def wants_more(module: Any, given: dict[str, Any], *known: str) -> bool:
    """Whether a call asks for what attention alone is not: an argument beside the known ones, or biases by position."""
    absolute = getattr(module, "position_embedding_type", "absolute") == "absolute"
    return not absolute or any(
        value is not None and value is not False for name, value in given.items() if name not in known
    )


@fused_forward
def bert_attention(module: Any, *args: Any, **kwargs: Any) -> Any:
    """pyfused.attention"""
    given = named(module, args, kwargs)
    known = ("hidden_states", "attention_mask", "encoder_hidden_states", "cache_position")
    if wants_more(module, given, *known):
        return original(module, **given)
    x, mask, encoder = given["hidden_states"], given.get("attention_mask"), given.get("encoder_hidden_states")
    states = x if encoder is None else encoder
    is_causal = module.is_decoder and encoder is None and mask is None and x.shape[1] > 1
    projected = module.query(x), module.key(states), module.value(states)
    return attended(module, *projected, mask, module.attention_head_size, is_causal), None


@fused_forward
def distilbert_attention(module: Any, *args: Any, **kwargs: Any) -> Any:
    """pyfused.attention"""
    given = named(module, args, kwargs)
    if wants_more(module, given, "query", "key", "value", "mask"):
        return original(module, **given)
    projected = module.q_lin(given["query"]), module.k_lin(given["key"]), module.v_lin(given["value"])
    return (module.out_lin(attended(module, *projected, given["mask"], module.attention_head_size)),)


@fused_forward
def interface_layer(module: Any, *args: Any, **kwargs: Any) -> Any:
    """pyfused.attention, by transformers' attention interface"""
    return original_telling(module, args, kwargs)


def adapter_for(module: nn.Module) -> Adapter | None:
    """The adapter of a layer that uses the interface, but may not tell it that attention weights are wanted."""
    if output_capturing is not None or not isinstance(vars(module).get("config"), FusedConfig):
        return None
    return (lambda module: interface_layer) if "output_attentions" in parameters(type(module)) else None


_BERTS = "bert.Bert", "camembert.Camembert", "roberta.Roberta", "xlm_roberta.XLMRoberta"


ADAPTERS: dict[str, Adapter] = {
    **{full_name(f"{row}SdpaSelfAttention"): lambda module: bert_attention for row in _BERTS},
    full_name("distilbert.DistilBertSdpaAttention"): lambda module: distilbert_attention,
}
