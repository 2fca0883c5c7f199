"""How does a module of a usual shape run on pyfused? shapes.py says what the shapes are.

A fused forward looks its children's names up by class, and reads the children at every call. Where one is gone, such as an
activation that a plain function stands in for now, the class's own statements run.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch.nn.functional as F
from torch import Tensor, nn

from ...ops import ffn, gated_ffn, layer_norm, linear, rms_norm
from ...own_forward import Adapter, Forward, fused_forward, is_bare, is_fused, is_own, original
from ..torch_nn import takes
from .activations import activation_reason, kernel_activation
from .plain_modules import drops, is_plain_linear, other_linear
from .shapes import (
    CHUNKS,
    FeedForward,
    Function,
    Half,
    InLine,
    Inner,
    Layer,
    LayerNorm,
    Norm,
    Normed,
    Outer,
    Output,
    Part,
    Summed,
    find,
    shape_of,
)
from .statements import source_of


def adapter_for(module: nn.Module) -> Adapter | None:
    """The adapter of a transformers module of a usual shape, or of one that looks like a feed-forward. None for others."""
    kind: Any = type(module)
    source = str(getattr(kind.forward, "__module__", ""))
    if not source.startswith("transformers"):  # or transformers_modules, from the hub
        return None
    if not isinstance(shape_of(module), Half | None):
        return _forward
    return _unknown if _computes(module) and "Attention" not in kind.__name__ else None


def _computes(module: nn.Module) -> bool:
    """Whether a module of no usual shape has products of its own: several linear layers, weights such as a stack of experts',
    the two halves of a feed-forward, or one that is a method, while no child is one."""
    children = module._modules.values()
    if sum(type(child) is nn.Linear for child in children) > 1:
        return True
    if any(isinstance(shape_of(child), Inner) for child in children if child is not None):
        return True
    if sum(p is not None and p.dim() > 1 and min(p.shape) > 1 for p in module._parameters.values()) > 1:
        return True
    own = any(hasattr(type(module), method) for method in CHUNKS)
    whole = FeedForward | Normed | Summed | InLine
    return own and not any(isinstance(shape_of(child), whole) for child in children if child is not None)


def _unknown(module: nn.Module) -> str:
    return "of no shape that fuse_ knows"


def _forward(module: nn.Module) -> Forward | str:
    shape = shape_of(module)
    if shape != find(module):
        return "its settings differ from those of other modules of its class"
    if isinstance(shape, Normed):
        inner = _forward(module._modules[shape.feed_forward])  # type: ignore[arg-type]
        return f"its {shape.feed_forward}: {inner}" if isinstance(inner, str) else normed
    if isinstance(shape, FeedForward):
        return _reason_against(module, shape) or (feed_forward if shape.gate is None else gated)
    if isinstance(shape, Summed):
        return _reason_against(module, shape.what) or (summed if shape.what.gate is None else gated_summed)
    if isinstance(shape, Layer):
        own = vars(module).get(shape.method)
        if own is not None and not is_own(own):
            return f"this instance has a {shape.method} of its own already"
        return _reason_against(module, shape) or _LAYERS[shape.method]
    if isinstance(shape, InLine):
        reasons = [_reason_against(module, part.what) for part in shape.parts]
        has_gate = any(isinstance(part.what, FeedForward) and part.what.gate is not None for part in shape.parts)
        return reasons[0] if all(reasons) else _ready(module, gated_in_line if has_gate else in_line)
    if isinstance(shape, Output):
        return _other_linear([(module, shape.dense)]) or (output if shape.norm else sum_alone)
    return norm if isinstance(shape, Norm) else centred_norm


def _reason_against(module: nn.Module, shape: FeedForward | Layer) -> str:
    children: Any = module._modules
    if isinstance(shape, Layer):
        first, last = children[shape.inner], children[shape.output]
        products = [(half, shape_of(half).dense) for half in (first, last)]
        return _other_linear(products) or _activation_reason(first, shape_of(first).activation)
    products = [children[name] for name in (shape.inner, shape.gate, shape.outer) if name]
    if shape.gate is not None and any(getattr(product, "bias", None) is not None for product in products):
        return "has biases beside a gate; the kernels take none"
    if reason := _other_linear([(module, name) for name in (shape.inner, shape.gate, shape.outer) if name]):
        return reason
    return _activation_reason(module, shape.activation)


def _other_linear(products: list[tuple[Any, str]]) -> str:
    """Why one of these children, each with its owner, is no plain linear layer; "" if all are."""
    reasons = [(name, other_linear(owner._modules[name])) for owner, name in products]
    return next((f"its {name} {reason}" for name, reason in reasons if reason), "")


def _activation_reason(module: Any, activation: str | Function) -> str:
    return "" if isinstance(activation, Function) else activation_reason(module._modules[activation])


def _kernel_activation(module: Any, activation: str | Function) -> str | None:
    return activation.name if isinstance(activation, Function) else kernel_activation(module._modules.get(activation))


@fused_forward
def norm(module: Any, x: Tensor) -> Any:
    """pyfused.rms_norm"""
    shape = shape_of(module)
    if not isinstance(shape, Norm) or not takes(x, module.weight):
        return original(module, x)
    weight = 1.0 + module.weight if shape.plus_one else module.weight
    return rms_norm(x, weight, eps=getattr(module, shape.eps))


@fused_forward
def centred_norm(module: Any, x: Tensor) -> Any:
    """pyfused.layer_norm"""
    shape = shape_of(module)
    if not isinstance(shape, LayerNorm) or not takes(x, module.weight, module.bias):
        return original(module, x)
    return layer_norm(x, module.weight, module.bias, eps=getattr(module, shape.eps))


@fused_forward
def feed_forward(module: Any, x: Tensor) -> Any:
    """pyfused.ffn"""
    shape = shape_of(module)
    y = _computed(module, shape, x, None) if isinstance(shape, FeedForward) else None
    return original(module, x) if y is None else y


@fused_forward
def gated(module: Any, x: Tensor) -> Any:
    """pyfused.gated_ffn"""
    return feed_forward(module, x)


@fused_forward
def normed(module: Any, x: Tensor) -> Any:
    """the norm, then the feed-forward with the residual"""
    shape = shape_of(module)
    if isinstance(shape, Normed) and not _active(module, shape.dropouts):
        inner = module._modules.get(shape.feed_forward)
        of_inner = None if inner is None else shape_of(inner)
        if isinstance(of_inner, FeedForward) and is_fused(inner) and is_bare(inner):  # type: ignore[arg-type]
            given = getattr(module, shape.norm)(x)
            y = _computed(inner, of_inner, given, x)
            return x + inner(given) if y is None else y  # type: ignore[misc]
    return original(module, x)


@fused_forward
def summed(module: Any, x: Tensor, residual: Tensor) -> Any:
    """pyfused.ffn with the residual"""
    shape = shape_of(module)
    if isinstance(shape, Summed) and not _active(module, shape.dropouts):
        y = _computed(module, shape.what, x, residual)
        if y is not None:
            return y
    return original(module, x, residual)


@fused_forward
def gated_summed(module: Any, x: Tensor, residual: Tensor) -> Any:
    """pyfused.gated_ffn with the residual"""
    return summed(module, x, residual)


@fused_forward
def output(module: Any, x: Tensor, residual: Tensor) -> Any:
    """pyfused.linear with the residual, then the norm"""
    shape = shape_of(module)
    if not isinstance(shape, Output) or not _adds_residual(module, shape, x, residual):
        return original(module, x, residual)
    dense: Any = module._modules[shape.dense]
    return _normed(module, shape, linear(x, dense.weight, dense.bias, residual=residual))


def _normed(module: Any, shape: Output, x: Tensor) -> Any:
    return getattr(module, shape.norm)(x) if shape.norm else x


@fused_forward
def sum_alone(module: Any, x: Tensor, residual: Tensor) -> Any:
    """pyfused.linear with the residual"""
    return output(module, x, residual)


@fused_forward
def chunk(module: Any, x: Tensor) -> Any:
    """pyfused.ffn with the residual, then the norm"""
    shape = shape_of(module)
    y = _pair(module, shape, x, x) if isinstance(shape, Layer) else None
    return type(module).feed_forward_chunk(module, x) if y is None else y


@fused_forward
def ff_chunk(module: Any, x: Tensor) -> Any:
    """pyfused.ffn with the residual, then the norm"""
    shape = shape_of(module)
    y = _pair(module, shape, x, x) if isinstance(shape, Layer) else None
    return type(module).ff_chunk(module, x) if y is None else y


@fused_forward
def layer(module: Any, *args: Any, **kwargs: Any) -> Any:
    """as it is; its feed-forward is pyfused.ffn with the residual, then the norm"""
    return original(module, *args, **kwargs)


@fused_forward
def ff_layer(module: Any, *args: Any, **kwargs: Any) -> Any:
    """as it is; its feed-forward is pyfused.ffn with the residual, then the norm"""
    return original(module, *args, **kwargs)


_LAYERS = {"feed_forward_chunk": layer, "ff_chunk": ff_layer}
vars(layer)["methods"], vars(ff_layer)["methods"] = {"feed_forward_chunk": chunk}, {"ff_chunk": ff_chunk}


@fused_forward
def in_line(module: Any, *args: Any, **kwargs: Any) -> Any:
    """as it is; the feed-forward in it is pyfused.ffn"""
    of, forward = _in_line.get(type(module), (None, None))
    if forward is None or of is not type(module).forward:
        return original(module, *args, **kwargs)
    return forward(module, *args, **kwargs)


@fused_forward
def gated_in_line(module: Any, *args: Any, **kwargs: Any) -> Any:
    """as it is; the feed-forward in it is pyfused.gated_ffn"""
    return in_line(module, *args, **kwargs)


# By class: its forward, and the forward with calls of _part
_in_line: WeakKeyDictionary[type, tuple[Any, Any]] = WeakKeyDictionary()


def _ready(module: nn.Module, forward: Forward) -> Forward:
    shape, kind = shape_of(module), type(module)
    source = source_of(shape.forward) if isinstance(shape, InLine) else None
    if source is not None and _in_line.get(kind, (None, None))[0] is not shape.forward:
        calls = [(part.run, part.names) for part in shape.parts]
        _in_line[kind] = shape.forward, source.with_calls(_part, calls)
    return forward


def _part(number: int, module: Any, x: Tensor, *residual: Tensor) -> Any:
    """What a part of the module's forward computes, on pyfused if that is possible now."""
    part = shape_of(module).parts[number]
    y = _part_computed(module, part, x, *residual) if all(isinstance(t, Tensor) for t in (x, *residual)) else None
    return part.plain(module, x, *residual) if y is None else y


def _part_computed(module: Any, part: Part, x: Tensor, *residual: Tensor) -> Any:
    """None if the kernels cannot compute it."""
    compute: Any = _pair if isinstance(part.what, Layer) else _computed
    if len(part.run.op.args) == 3:  # output(inner(x), residual)
        return compute(module, part.what, x, *(residual or (x,)))
    if not _active(module, part.dropouts):
        return compute(module, part.what, x, *residual)
    y = compute(module, part.what, x)
    if y is None:
        return None
    for name in part.dropouts:
        y = _dropped(module, name, y)
    return residual[0] + y if residual else y


def _active(module: Any, dropouts: Iterable[str]) -> bool:
    """Whether one of these dropouts may change its input or run a hook."""
    return any(_is_active(module, name) for name in dropouts)


def _is_active(module: Any, name: str) -> bool:
    dropout = getattr(module, name, None)
    if isinstance(dropout, int | float):
        return module.training and dropout > 0.0
    return not isinstance(dropout, nn.Module) or drops(dropout)


def _dropped(module: Any, name: str, x: Tensor) -> Tensor:
    dropout = getattr(module, name)
    y: Tensor = dropout(x) if callable(dropout) else F.dropout(x, dropout, module.training)
    return y


def _adds_residual(module: Any, shape: Output, x: Tensor, residual: Tensor) -> bool:
    dense = module._modules.get(shape.dense)
    return not _active(module, shape.dropouts) and is_plain_linear(x, dense) and _fits(dense, x, residual)


def _pair(module: Any, shape: Layer, x: Tensor, residual: Tensor | None = None) -> Any:
    """output(inner(x), residual), or outer(inner(x)) + residual. None if the kernels cannot compute it."""
    norm, inner, outer = (module._modules.get(name) for name in (shape.norm, shape.inner, shape.output))
    if inner is None or outer is None:
        return None
    if not shape.norm:
        return _halves(inner, outer, x, residual)
    if norm is None:
        return None
    given = norm(x)
    y = _halves(inner, outer, given, residual)
    return outer(inner(given), residual) if y is None else y


def _halves(inner: Any, outer: Any, x: Tensor, residual: Tensor | None) -> Any:
    """None if the kernels cannot compute it."""
    first, last = shape_of(inner), shape_of(outer)
    if not isinstance(first, Inner) or not isinstance(last, Output | Outer):
        return None
    activation = _kernel_activation(inner, first.activation)
    if activation is None or not is_bare(inner, outer):
        return None
    w_in, w_out = inner._modules.get(first.dense), outer._modules.get(last.dense)
    if not is_plain_linear(x, w_in, w_out) or _active(outer, last.dropouts) or not _fits(w_out, x, residual):
        return None
    if isinstance(last, Output) and (residual is None or not is_fused(outer)):
        return None
    y = ffn(x, w_in.weight, w_in.bias, w_out.weight, w_out.bias, activation=activation, residual=residual)
    return _normed(outer, last, y) if isinstance(last, Output) else y


def _fits(dense: Any, x: Tensor, residual: Tensor | None) -> bool:
    """Whether the kernels can add this residual to a product with x."""
    if residual is None:
        return True
    return residual.dtype == x.dtype and residual.shape == (*x.shape[:-1], dense.out_features)


def _computed(module: Any, shape: FeedForward, x: Tensor, residual: Tensor | None = None) -> Tensor | None:
    """None if the kernels cannot compute it: active dropout, replaced layers, other dtypes, biases beside a gate."""
    children = module._modules
    activation = _kernel_activation(module, shape.activation)
    inner, outer = children.get(shape.inner), children.get(shape.outer)
    if activation is None or _active(module, shape.dropouts) or not is_plain_linear(x, inner, outer):
        return None
    if not _fits(outer, x, residual):
        return None
    if shape.gate is None:
        return ffn(x, inner.weight, inner.bias, outer.weight, outer.bias, activation=activation, residual=residual)
    gate = children.get(shape.gate) if shape.gate else inner
    if not is_plain_linear(x, gate) or any(m.bias is not None for m in (inner, outer, gate)):
        return None
    w_gate, w_up = (gate.weight, inner.weight) if shape.gate else inner.weight.chunk(2)
    return gated_ffn(x, w_gate, w_up, outer.weight, activation=activation, residual=residual)


for _function in (norm, centred_norm, feed_forward, gated, normed, summed, gated_summed, output, sum_alone, layer, ff_layer):
    vars(_function)["prepare"] = shape_of
for _function in (in_line, gated_in_line):
    vars(_function)["prepare"] = functools.partial(_ready, forward=_function)
