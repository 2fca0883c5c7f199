"""Which torch.nn modules does fuse_ replace, and with which operators?"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..nn.multihead import multihead_forward, takes
from ..nn.torch_layers import decoder_layer_forward, encoder_forward, encoder_layer_forward, reason_against
from ..ops import layer_norm, linear, rms_norm
from ..ops.attention import MAX_HEAD_SIZE
from ..ops.rms_norm import default_eps
from ..own_forward import Adapter, Forward, fused_forward, original


@fused_forward
def linear_forward(module: nn.Linear, input: Tensor) -> Any:
    """pyfused.linear"""
    if type(module) is nn.Linear and go_together(module, input):
        return linear(input, module.weight, module.bias)
    return original(module, input)


def go_together(module: nn.Module, x: Tensor) -> bool:
    """Whether the kernels take this module's weight and bias together with x: dtypes, device, no tensor subclass."""
    weight, bias = module.weight, getattr(module, "bias", None)
    return (
        takes(x, weight, bias)  # type: ignore[arg-type]
        and weight.device == x.device
        and not is_traceable_wrapper_subclass(weight)
        and not is_traceable_wrapper_subclass(bias)
    )


@fused_forward
def layer_norm_forward(module: nn.LayerNorm, input: Tensor) -> Any:
    """pyfused.layer_norm"""
    if module.weight is not None and takes(input, module.weight):
        return layer_norm(input, module.weight, module.bias, eps=module.eps)
    return original(module, input)


@fused_forward
def rms_norm_forward(module: nn.RMSNorm, x: Tensor) -> Any:
    """pyfused.rms_norm"""
    if module.weight is not None and takes(x, module.weight):
        return rms_norm(x, module.weight, eps=default_eps(x.dtype) if module.eps is None else module.eps)
    return original(module, x)


def _norm(forward: Forward) -> Adapter:
    def adapter(module):
        if len(module.normalized_shape) != 1:
            return f"normalises over {len(module.normalized_shape)} dimensions; the kernels take the last one"
        if module.weight is None:
            return "has no weight"
        return forward

    return adapter


def _multihead(module: Any) -> Forward | str:
    if module.head_dim > MAX_HEAD_SIZE:
        return f"has heads of size {module.head_dim}; the kernels take {MAX_HEAD_SIZE}"
    return multihead_forward


def _layer(forward: Forward) -> Adapter:
    return lambda module: reason_against(module) or forward


def _encoder(module: Any) -> Forward | str:
    kinds = {type(m).__name__ for m in module.layers if not isinstance(m, nn.TransformerEncoderLayer)}
    return f"has layers of class {', '.join(sorted(kinds))}" if kinds or not module.layers else encoder_forward


LINEAR: dict[str, Adapter] = {  # with fuse_(linear=True)
    "torch.nn.modules.linear.Linear": lambda module: (
        linear_forward if type(module) is nn.Linear else "is of a subclass of nn.Linear"
    ),
}
ADAPTERS: dict[str, Adapter] = {
    "torch.nn.modules.normalization.LayerNorm": _norm(layer_norm_forward),
    "torch.nn.modules.normalization.RMSNorm": _norm(rms_norm_forward),
    "torch.nn.modules.activation.MultiheadAttention": _multihead,
    "torch.nn.modules.transformer.TransformerEncoderLayer": _layer(encoder_layer_forward),
    "torch.nn.modules.transformer.TransformerDecoderLayer": _layer(decoder_layer_forward),
    "torch.nn.modules.transformer.TransformerEncoder": _encoder,
}
