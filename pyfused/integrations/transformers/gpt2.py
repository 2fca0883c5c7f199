"""What do transformers' GPT-2 modules compute on pyfused? The MLP is one operator; each residual sum joins the next operator.

A fused block may read a child's parameters instead of calling the child. It does so only if the child is fused too, has no
hooks, and was not replaced (by LoRA, quantisation or FSDP). Otherwise it calls the child.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Block
from transformers.pytorch_utils import Conv1D

from ...ops import ffn, layer_norm
from ...own_forward import Adapter, Forward, fused_forward, is_bare, is_fused, original
from .activations import activation_reason, kernel_activation
from .plain_modules import drops, go_together, is_fused_norm


@fused_forward
def mlp_forward(module: GPT2MLP, hidden_states: Tensor) -> Any:
    """pyfused.ffn"""
    if not _plain_mlp(module, hidden_states):
        return original(module, hidden_states)
    return module.dropout(_ffn(module, hidden_states, None))


@fused_forward
def block_forward(
    module: GPT2Block,
    hidden_states: Tensor,
    past_key_values: Any = None,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    use_cache: bool | None = False,
    **kwargs: Any,
) -> Any:
    """residual sums inside pyfused.layer_norm and pyfused.ffn"""
    checkpoints = getattr(module, "gradient_checkpointing", False) and module.training
    cannot_attend = encoder_hidden_states is not None and not hasattr(module, "crossattention")
    if checkpoints or cannot_attend or torch.is_autocast_enabled(hidden_states.device.type):
        # Under autocast the residual stream stays in float32 while the products are in half precision.
        return original(
            *(module, hidden_states, past_key_values, attention_mask, encoder_hidden_states),
            encoder_attention_mask=encoder_attention_mask,
            use_cache=use_cache,
            **kwargs,
        )
    shared = {"past_key_values": past_key_values, "attention_mask": attention_mask}
    branch, _ = module.attn(module.ln_1(hidden_states), **shared, use_cache=use_cache, **kwargs)
    if encoder_hidden_states is not None:
        y, hidden_states = _add_and_norm(module.ln_cross_attn, branch, hidden_states)
        branch, _ = module.crossattention(
            y, **shared, encoder_hidden_states=encoder_hidden_states, encoder_attention_mask=encoder_attention_mask
        )
    y, hidden_states = _add_and_norm(module.ln_2, branch, hidden_states)
    mlp = module.mlp
    whole = type(mlp) is GPT2MLP and is_fused(mlp) and is_bare(mlp) and _plain_mlp(mlp, y)
    if whole and hidden_states.dtype == y.dtype and not drops(mlp.dropout):
        return _ffn(mlp, y, hidden_states)
    return hidden_states + mlp(y)


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


def _adapter(kind: type[nn.Module], forward: Forward) -> Adapter:
    """Gives `forward` only to a class with the signature written here; another transformers release may differ."""
    known = list(inspect.signature(forward).parameters)[1:]

    def adapter(module):
        if list(inspect.signature(kind.forward).parameters)[1:] != known:
            return f"this release of transformers has another {kind.__name__}.forward"
        return (activation_reason(module.act) if isinstance(module, GPT2MLP) else "") or forward

    return adapter


ADAPTERS: dict[str, Adapter] = {
    "transformers.models.gpt2.modeling_gpt2.GPT2MLP": _adapter(GPT2MLP, mlp_forward),
    "transformers.models.gpt2.modeling_gpt2.GPT2Block": _adapter(GPT2Block, block_forward),
}
