"""What does fuse_ replace in transformers' MPNet? Its attention. The bias by relative position is T5's: the kernel reads the
table.

MPNet does not use transformers' attention interface. Its encoder makes the bias once and hands it to all layers: here a
`TableBias` takes that way, in place of a (B, H, S, S) tensor.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.mpnet import modeling_mpnet

from ... import notices
from ...nn.attention import EVERYTHING
from ...nn.packing import Packing
from ...ops import RelativeBias, relative_bias
from ...ops.attention import MAX_HEAD_SIZE
from ...own_forward import Adapter, Forward, fused_forward, is_bare, is_fused, original
from ..torch_nn import takes
from .masks import read_mask, with_dense_bias
from .plain_modules import overridden
from .releases import full_name, named

_MAX_DISTANCE = 128  # of MPNetEncoder.relative_position_bucket


class TableBias(NamedTuple):
    """The table of biases, and where the texts of a packed row begin."""

    relative: RelativeBias
    packing: Packing | None = None


@fused_forward
def attention(module: Any, *args: Any, **kwargs: Any) -> Any:
    """pyfused.attention, the bias by relative position inside the kernel"""
    given = named(module, args, kwargs)
    hidden_states: Tensor = given["hidden_states"]
    attention_mask, position_bias = given.get("attention_mask"), given.get("position_bias")
    table = position_bias if isinstance(position_bias, TableBias) else None
    dropout, size = module.dropout, module.attention_head_size
    own = given.get("output_attentions") or given.get("head_mask") is not None
    if given.get("output_attentions"):
        notices.once("output_attentions: attention runs in transformers' own code, which has the probabilities")
    if own or type(dropout) is not nn.Dropout or not is_bare(dropout) or not takes(hidden_states):
        dense = position_bias if table is None else _dense(table, hidden_states)
        return original(module, **{**given, "position_bias": dense})
    query, key, value = (
        m(hidden_states).unflatten(-1, (-1, size)).transpose(1, 2) for m in (module.q, module.k, module.v)
    )
    visible = EVERYTHING if attention_mask is None else read_mask(attention_mask, query, key)
    if table is not None:
        visible = replace(visible, relative_bias=table.relative, packing=table.packing)
    elif position_bias is not None:
        visible = with_dense_bias(visible, position_bias, query.dtype)
    seen = visible.attend(query, key, value, dropout_p=dropout.p if dropout.training else 0.0)
    return (module.o(seen.transpose(1, 2).flatten(2)),)


def _dense(table: TableBias, hidden_states: Tensor) -> Tensor:
    weight, both, distance = table.relative
    b, s = hidden_states.shape[:2]
    return relative_bias(weight, s, s, bidirectional=both, max_distance=distance).expand(b, -1, -1, -1)


@fused_forward
def position_bias(module: Any, x: Tensor, position_ids: Tensor | None = None, num_buckets: int = 32) -> Any:
    """the table in place of the tensor"""
    weight = _table(module)
    if weight is None or position_ids is not None or num_buckets != weight.shape[0]:
        return type(module).compute_position_bias(module, x, position_ids, num_buckets)
    return TableBias(RelativeBias(weight, True, _MAX_DISTANCE))


@fused_forward
def encoder(module: Any, *args: Any, **kwargs: Any) -> Any:
    """as it is; hands the table of the bias to all layers"""
    return original(module, *args, **kwargs)


def run_packed(module: Any, hidden_states: Tensor, packing: Packing, return_dict: bool) -> Any:
    """MPNetEncoder's forward on the real tokens alone."""
    weight = _table(module)
    assert weight is not None  # the caller asked reads_table
    bias, x = TableBias(RelativeBias(weight, True, _MAX_DISTANCE), packing), packing.pack(hidden_states)
    for layer in module.layer:
        x = layer(x, position_bias=bias, output_attentions=False)[0]
    found = packing.unpack(x)
    return BaseModelOutput(last_hidden_state=found) if return_dict else (found,)


def reads_table(module: Any) -> bool:
    """Whether all layers read the table."""
    return _table(module) is not None


def _table(module: Any) -> Tensor | None:
    """The encoder's table of biases, if every layer's attention reads it and nobody changed how it is looked up."""
    embedding = module.relative_attention_bias
    kinds = modeling_mpnet.MPNetLayer, modeling_mpnet.MPNetAttention
    for layer in module.layer:
        if (type(layer), type(layer.attention)) != kinds or not is_fused(layer.attention.attn):
            return None
    plain = type(embedding) is nn.Embedding and is_bare(embedding) and embedding.max_norm is None
    weight: Tensor = embedding.weight
    return weight if plain and weight.shape[0] == 32 and not is_traceable_wrapper_subclass(weight) else None


def _attention(module: Any) -> Forward | str:
    if module.attention_head_size > MAX_HEAD_SIZE:
        return f"has heads of size {module.attention_head_size}; the kernels take {MAX_HEAD_SIZE}"
    return attention


def changed(module: Any) -> str:
    """Why the encoder must make its bias itself; "" if it need not."""
    return overridden(module, modeling_mpnet.MPNetEncoder, "compute_position_bias", "relative_position_bucket")


METHODS = {"compute_position_bias": position_bias}
vars(encoder)["methods"] = METHODS

ADAPTERS: dict[str, Adapter] = {
    full_name("mpnet.MPNetSelfAttention"): _attention,
    full_name("mpnet.MPNetEncoder"): lambda module: changed(module) or encoder,
}
