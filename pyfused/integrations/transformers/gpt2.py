"""What do transformers' GPT-2 modules compute on pyfused? The MLP is one operator; each residual sum joins the next operator.

A fused block may read a child's parameters instead of calling the child. It does so only if the child is fused too, has no
hooks, and was not replaced (by LoRA, quantisation or FSDP). Otherwise it calls the child.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention, GPT2Block, GPT2Model
from transformers.pytorch_utils import Conv1D

from ...decode_plan import DecodeLayer, DecodePlan, Matrix, Norm
from ...ops import ffn, layer_norm
from ...ops.attention import MAX_HEAD_SIZE
from ...own_forward import Adapter, Forward, fused_forward, is_bare, is_fused, original
from .activations import activation_reason, kernel_activation
from .attention import reason_to_scale
from .decode import Ready, one_token, same
from .plain_modules import drops, go_together, is_fused_norm
from .releases import full_name, named, parameters
from .unchanged import Kind, Watch, known


@fused_forward
def mlp_forward(module: GPT2MLP, hidden_states: Tensor) -> Any:
    """pyfused.ffn"""
    if not _plain_mlp(module, hidden_states):
        return original(module, hidden_states)
    return module.dropout(_ffn(module, hidden_states, None))


@fused_forward
def block_forward(module: GPT2Block, *args: Any, **kwargs: Any) -> Any:
    """residual sums inside pyfused.layer_norm and pyfused.ffn"""
    given = named(module, args, kwargs)
    if _needs_own_code(module, given):
        return original(module, *args, **kwargs)  # as given: reentrant checkpointing sees no gradient in a keyword
    return _block(module, **given)


@fused_forward
def block_of_tuples_forward(module: GPT2Block, *args: Any, **kwargs: Any) -> Any:
    """residual sums inside pyfused.layer_norm and pyfused.ffn"""
    given = named(module, args, kwargs)
    if given.get("output_attentions") or _needs_own_code(module, given):
        return original(module, *args, **kwargs)
    return (_block(module, **given),)


def _needs_own_code(module: Any, given: dict[str, Any]) -> bool:
    cannot_attend = given.get("encoder_hidden_states") is not None and not hasattr(module, "crossattention")
    checkpoints = getattr(module, "gradient_checkpointing", False) and module.training
    # Under autocast the residual stream stays in float32 while the products are in half precision.
    return checkpoints or cannot_attend or torch.is_autocast_enabled(given["hidden_states"].device.type)


def _block(
    module: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    **given: Any,
) -> Tensor:
    branch = module.attn(module.ln_1(hidden_states), **given)[0]
    if encoder_hidden_states is not None:
        y, hidden_states = _add_and_norm(module.ln_cross_attn, branch, hidden_states)
        known = "past_key_values", "attention_mask", "head_mask"
        shared: dict[str, Any] = {name: given[name] for name in known if name in given}
        shared |= {"encoder_hidden_states": encoder_hidden_states, "encoder_attention_mask": encoder_attention_mask}
        branch = module.crossattention(y, **shared)[0]
    y, hidden_states = _add_and_norm(module.ln_2, branch, hidden_states)
    mlp = module.mlp
    whole = type(mlp) is GPT2MLP and is_fused(mlp) and is_bare(mlp) and _plain_mlp(mlp, y)
    if whole and hidden_states.dtype == y.dtype and not drops(mlp.dropout):
        return _ffn(mlp, y, hidden_states)
    return hidden_states + mlp(y)  # type: ignore[no-any-return]


def _add_and_norm(norm: Any, branch: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """(norm(branch + residual), branch + residual)"""
    if type(norm) is nn.LayerNorm and branch.dtype == residual.dtype and is_fused_norm(branch, norm):
        y, total = layer_norm(branch, norm.weight, norm.bias, eps=norm.eps, residual=residual)
        return y, total
    total = branch + residual
    return norm(total), total


def _plain_mlp(mlp: GPT2MLP, x: Tensor) -> bool:
    """Whether the MLP's parts are unchanged and one operator can compute them."""
    expand, contract = mlp.c_fc, mlp.c_proj
    plain = type(expand) is type(contract) is Conv1D and go_together(expand, x) and go_together(contract, x)
    return plain and is_bare(expand, contract) and kernel_activation(mlp.act) is not None


def _ffn(mlp: GPT2MLP, x: Tensor, residual: Tensor | None) -> Tensor:
    expand, contract = mlp.c_fc, mlp.c_proj
    w_in, w_out = expand.weight.t(), contract.weight.t()  # Conv1D keeps (in, out)
    activation = kernel_activation(mlp.act) or ""
    return ffn(x, w_in, expand.bias, w_out, contract.bias, activation=activation, residual=residual)


@fused_forward
def model_forward(module: GPT2Model, *args: Any, **kwargs: Any) -> Any:
    """pyfused.decode for steps of one token"""
    others = named(module, args, kwargs)
    names = "input_ids", "past_key_values", "attention_mask", "use_cache", "position_ids"
    input_ids, cache, mask, use_cache, position_ids = (others.pop(name, None) for name in names)
    found = one_token(*(module, _plan, input_ids, cache, mask, use_cache, others), position_ids=position_ids)
    if found is None:
        return original(module, *args, **kwargs)
    module.warn_if_padding_and_no_attention_mask(input_ids, mask)
    return found


_KINDS = known(
    {
        GPT2Block: Kind(is_fused=True),
        GPT2MLP: Kind(True, "act"),
        GPT2Attention: Kind(
            settings="config layer_idx num_heads head_dim scaling is_causal is_cross_attention reorder_and_upcast_attn "
            "scale_attn_weights scale_attn_by_inverse_layer_idx"
        ),
        nn.LayerNorm: Kind(True, "eps"),
        nn.Embedding: Kind(settings="max_norm"),
        **dict.fromkeys((Conv1D, nn.Dropout, nn.ModuleList), Kind()),
    }
)


def _plan(model: Any) -> Ready | None:
    """The plan of a GPT2Model whose modules nobody changed."""
    blocks, watch = list(model.h), Watch.of(model, _KINDS)
    if watch is None or not blocks or any(hasattr(block, "crossattention") for block in blocks):
        return None
    first = blocks[0].attn
    activations = {kernel_activation(block.mlp.act) for block in blocks}
    for i, attention in enumerate(block.attn for block in blocks):
        if attention.reorder_and_upcast_attn or attention.is_cross_attention or attention.layer_idx != i:
            return None
        if reason_to_scale(attention):
            return None
    if not same((block.attn.num_heads, block.attn.head_dim) for block in blocks) or first.head_dim > MAX_HEAD_SIZE:
        return None
    if len(activations) > 1 or model.wte.max_norm is not None or model.wpe.max_norm is not None:
        return None
    plan = DecodePlan(
        layers=tuple(map(_layer, blocks)),
        token_embedding=Matrix.of(model.wte),
        position_embedding=Matrix.of(model.wpe),
        head=Matrix(),
        final_norm=Norm.of(model.ln_f),
        heads=first.num_heads,
        kv_heads=first.num_heads,
        head_size=first.head_dim,
        is_rms=False,
        activation=activations.pop() or "",
    )
    return Ready.of(plan, watch)


def _layer(block: Any) -> DecodeLayer:
    query, key, value = Matrix.of(block.attn.c_attn, by_inputs=True).split(3)
    return DecodeLayer(
        attention_norm=Norm.of(block.ln_1),
        query=query,
        key=key,
        value=value,
        output=Matrix.of(block.attn.c_proj, by_inputs=True),
        feed_forward_norm=Norm.of(block.ln_2),
        inner=Matrix.of(block.mlp.c_fc, by_inputs=True),
        outer=Matrix.of(block.mlp.c_proj, by_inputs=True),
        scale=getattr(block.attn, "scaling", block.attn.head_dim**-0.5),
    )


model_forward.__signature__ = inspect.signature(GPT2Model.forward)  # type: ignore[attr-defined]  # torch.export reads it

# What the forwards above know to do with. Releases leave some of it out, and order it differently.
_PARAMETERS = {
    GPT2MLP: "hidden_states",
    GPT2Block: "hidden_states past_key_values cache_position attention_mask head_mask encoder_hidden_states "
    "encoder_attention_mask use_cache output_attentions kwargs",
    GPT2Model: "input_ids past_key_values cache_position attention_mask token_type_ids position_ids head_mask inputs_embeds "
    "encoder_hidden_states encoder_attention_mask use_cache output_attentions output_hidden_states return_dict kwargs",
}


def _adapter(kind: type[nn.Module], forward: Forward) -> Adapter:
    def adapter(module):
        if not {*parameters(kind)} <= {*_PARAMETERS[kind].split()}:
            return f"this release of transformers has another {kind.__name__}.forward"
        return (activation_reason(module.act) if isinstance(module, GPT2MLP) else "") or forward

    return adapter


_block_forward = block_of_tuples_forward if "output_attentions" in parameters(GPT2Block) else block_forward
ADAPTERS: dict[str, Adapter] = {
    full_name("gpt2.GPT2MLP"): _adapter(GPT2MLP, mlp_forward),
    full_name("gpt2.GPT2Block"): _adapter(GPT2Block, _block_forward),
    full_name("gpt2.GPT2Model"): _adapter(GPT2Model, model_forward),
}
