"""What does fuse_ replace in transformers' FNet? The Fourier mixing, the feed-forward, and the residuals before the norms."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.fnet import modeling_fnet
from transformers.pytorch_utils import apply_chunking_to_forward

from ... import notices
from ...ops import ffn, fourier_mix, layer_norm, linear
from ...own_forward import Adapter, Forward, fused_forward, is_bare, is_fused, original
from ..torch_nn import takes
from .activations import activation_reason, kernel_activation
from .plain_modules import drops, is_fused_norm, is_plain_linear, overridden
from .releases import full_name

_OTHER_TRANSFORM = "FNet's transform is another than torch.fft.fftn (use_tpu_fourier_optimizations): it stays as it is"


@fused_forward
def fourier_transform(module: Any, hidden_states: Tensor) -> Any:
    """pyfused.fourier_mix"""
    if not _is_fft(module.fourier_transform):
        notices.once(_OTHER_TRANSFORM)
        return original(module, hidden_states)
    if not takes(hidden_states):
        return original(module, hidden_states)
    if hidden_states.is_cpu and torch.is_autocast_enabled("cpu"):
        hidden_states = hidden_states.float()  # autocast runs torch.fft in float32 on the CPU
    return (fourier_mix(hidden_states),)  # also in float16 and bfloat16, which torch.fft refuses


@fused_forward
def basic_output(module: Any, hidden_states: Tensor, input_tensor: Tensor) -> Any:
    """pyfused.layer_norm with the residual"""
    norm = module.LayerNorm
    if not is_fused_norm(input_tensor, norm) or hidden_states.dtype != input_tensor.dtype:
        return original(module, hidden_states, input_tensor)
    return layer_norm(hidden_states, norm.weight, norm.bias, eps=norm.eps, residual=input_tensor)[0]


@fused_forward
def output(module: Any, hidden_states: Tensor, input_tensor: Tensor) -> Any:
    """pyfused.linear with the residual, then the norm"""
    dense = module.dense
    if drops(module.dropout) or not is_plain_linear(hidden_states, dense) or input_tensor.dtype != hidden_states.dtype:
        return original(module, hidden_states, input_tensor)
    return module.LayerNorm(linear(hidden_states, dense.weight, dense.bias, residual=input_tensor))


@fused_forward
def layer(module: Any, hidden_states: Tensor) -> Any:
    """pyfused.ffn with the residual, then the norm"""
    if module.gradient_checkpointing and module.training:  # the forward that this one replaces does the checkpointing
        return module._gradient_checkpointing_func(functools.partial(_layer_forward, module), hidden_states)
    return _layer_forward(module, hidden_states)


def _layer_forward(module: Any, hidden_states: Tensor) -> tuple[Tensor]:
    mixed = module.fourier(hidden_states)[0]
    chunk = functools.partial(_feed_forward, module)
    return (apply_chunking_to_forward(chunk, module.chunk_size_feed_forward, module.seq_len_dim, mixed),)


def _feed_forward(module: Any, x: Tensor) -> Tensor:
    inner, outer = module.intermediate, module.output
    if type(inner) is modeling_fnet.FNetIntermediate and is_bare(inner, outer) and is_fused(outer):
        activation = kernel_activation(inner.intermediate_act_fn)
        w_in, w_out = inner.dense, outer.dense
        if activation is not None and not drops(outer.dropout) and is_plain_linear(x, w_in, w_out):
            y = ffn(x, w_in.weight, w_in.bias, w_out.weight, w_out.bias, activation=activation, residual=x)
            return outer.LayerNorm(y)
    return module.feed_forward_chunk(x)


def _is_fft(transform: Any) -> bool:
    return (
        isinstance(transform, functools.partial)
        and transform.func is torch.fft.fftn
        and not transform.args
        and transform.keywords == {"dim": (1, 2)}
    )


def _mixing(module: nn.Module) -> Forward | str:
    if _is_fft(module.fourier_transform):
        return fourier_transform
    notices.once(_OTHER_TRANSFORM)
    return _OTHER_TRANSFORM


def _layer(module: Any) -> Forward | str:
    changed = overridden(module, modeling_fnet.FNetLayer, "feed_forward_chunk")
    return changed or activation_reason(module.intermediate.intermediate_act_fn) or layer


ADAPTERS: dict[str, Adapter] = {
    full_name("fnet.FNetBasicFourierTransform"): _mixing,
    full_name("fnet.FNetBasicOutput"): lambda module: basic_output,
    full_name("fnet.FNetOutput"): lambda module: output,
    full_name("fnet.FNetLayer"): _layer,
}
