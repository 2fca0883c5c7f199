"""Which modules of any transformers model are of a usual shape, whatever their class is called? Their traces say (symbols.py).

    norm            weight * x / rms(x), or (1 + weight) * x / rms(x)
    dense, gated    outer(act(inner(x)));  outer(act(gate(x)) * up(x)), also with gate and up in one matrix
    normed dense    x + dense(norm(x)), or gated
    output          norm(dense(x) + residual)
    inner           act(dense(x))
    layer           its feed_forward_chunk is output(inner(x), x)

Dropout may stand behind each product. A fused forward looks its children's names up by class, and reads the children at every
call.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ...ops import ffn, gated_ffn, linear, rms_norm
from ...own_forward import Adapter, Forward, fused_forward, is_bare, is_fused, is_own, original
from ..torch_nn import takes
from .activations import activation_reason, kernel_activation
from .plain_modules import drops, is_plain_linear
from .symbols import Op, trace


class Norm(NamedTuple):
    """eps: the attribute's name. plus_one: whether the factor is 1 + weight."""

    eps: str
    plus_one: bool


class FeedForward(NamedTuple):
    """The children's names. gate: None without one; "" where `inner` holds gate and up, one above the other."""

    inner: str
    outer: str
    activation: str
    gate: str | None
    dropouts: tuple[str, ...]


class Normed(NamedTuple):
    """The children's names."""

    norm: str
    feed_forward: str
    dropouts: tuple[str, ...]


class Output(NamedTuple):
    """The children's names."""

    dense: str
    norm: str
    dropouts: tuple[str, ...]


class Inner(NamedTuple):
    """The first half of a feed-forward. It has no forward of its own here."""

    dense: str
    activation: str


class Layer(NamedTuple):
    """The names of the two children that feed_forward_chunk calls, an Inner and an Output."""

    inner: str
    output: str


Shape = Norm | FeedForward | Normed | Output | Inner | Layer
_shapes: WeakKeyDictionary[type, Shape | None] = WeakKeyDictionary()


def adapter_for(module: nn.Module) -> Adapter | None:
    """The adapter of a transformers module of a usual shape, or of one that looks like a feed-forward. None for others."""
    kind: Any = type(module)
    source = str(getattr(kind.forward, "__module__", ""))
    if not source.startswith("transformers"):  # or transformers_modules, from the hub
        return None
    if not isinstance(shape_of(module), Inner | None):
        return _forward
    products = sum(type(child) is nn.Linear for child in module._modules.values())
    return _unknown if products > 1 and "Attention" not in kind.__name__ else None


def _unknown(module: nn.Module) -> str:
    return "of no shape that fuse_ knows"


def _forward(module: nn.Module) -> Forward | str:
    shape = shape_of(module)
    if shape != _find(module):
        return "its settings differ from those of other modules of its class"
    children: Any = module._modules
    if isinstance(shape, Normed):
        inner = _forward(children[shape.feed_forward])
        return f"its {shape.feed_forward}: {inner}" if isinstance(inner, str) else normed
    if isinstance(shape, FeedForward):
        products = [children[name] for name in (shape.inner, shape.gate, shape.outer) if name]
        if shape.gate is not None and any(getattr(product, "bias", None) is not None for product in products):
            return "has biases beside a gate; the kernels take none"
        return activation_reason(children[shape.activation]) or (feed_forward if shape.gate is None else gated)
    if isinstance(shape, Layer):
        own = vars(module).get("feed_forward_chunk")
        if own is not None and not is_own(own):
            return "this instance has a feed_forward_chunk of its own already"
        first = children[shape.inner]
        return activation_reason(first._modules[shape_of(first).activation]) or layer
    return norm if isinstance(shape, Norm) else output


def shape_of(module: nn.Module) -> Any:
    """The shape of the module's class, or None. Nor does a trace of torch.compile find one that is not known yet."""
    kind = type(module)
    if kind not in _shapes:
        if torch.compiler.is_compiling():
            return None
        _shapes[kind] = _find(module)
    return _shapes[kind]


def _find(module: nn.Module) -> Shape | None:
    children, own = module._modules, [p for p in module._parameters.values() if p is not None]
    if not children:
        return _norm(module) if len(own) == 1 and own[0].dim() == 1 else None
    if hasattr(type(module), "feed_forward_chunk"):
        return _layer(module)
    if own or len(children) > 8:
        return None
    wide, half = (trace(module, 1, dtype) for dtype in (torch.float32, torch.bfloat16))
    if wide is not None and wide == half:
        return _feed_forward(module, wide) or _normed(module, wide) or _inner(module, wide)
    return _output(module, trace(module, 2, torch.bfloat16))


_X = Op("input", (0,))


def _norm(module: nn.Module) -> Norm | None:
    found = trace(module, 1, torch.bfloat16)
    weight = Op("parameter", ("weight",))
    for plus_one, factor in ((False, weight), (True, Op("add", (1.0, weight)))):
        for name in (name for name, value in vars(module).items() if type(value) is float):
            mean = Op("mean", (Op("square", (_X,)), -1), (("keepdim", True),))
            total = Op("add", tuple(sorted((mean, Op("setting", (name, vars(module)[name]))), key=repr)))
            normed = Op("mul", tuple(sorted((_X, Op("rsqrt", (total,))), key=repr)))
            if found == Op("mul", tuple(sorted((factor, normed), key=repr))):
                return Norm(name, plus_one)
    return None


def _feed_forward(module: nn.Module, found: Any) -> FeedForward | None:
    found, dropouts = _behind_dropout(module, found)
    outer, found = _product(module, found)
    found, more = _behind_dropout(module, found)
    if outer is None or found is None:
        return None
    dropouts += more
    if found.name == "child":
        activation, found = _child(found)
        found, more = _behind_dropout(module, found)
        inner, x = _product(module, found)
        return (
            FeedForward(inner, outer, activation, None, dropouts + more) if inner and x == _X and activation else None
        )
    if found.name != "mul" or not all(isinstance(f, Op) for f in found.args):
        return None
    for first, up in (found.args, found.args[::-1]):
        activation, gate = _child(first)
        if activation is None or gate is None or _linear(module, activation):
            continue
        if gate.name == up.name == "part" and gate.args[1:] == (0, 2) and up.args == (gate.args[0], 1, 2):
            inner, x = _product(module, gate.args[0])
            return FeedForward(inner, outer, activation, "", dropouts) if inner and x == _X else None
        (name, x), (inner, y) = _product(module, gate), _product(module, up)
        if name and inner and x == y == _X:
            return FeedForward(inner, outer, activation, name, dropouts)
    return None


def _normed(module: nn.Module, found: Op) -> Normed | None:
    if found.name != "add" or _X not in found.args:
        return None
    branch, dropouts = _behind_dropout(module, found.args[1 - found.args.index(_X)])
    inner, x = _child(branch)
    norm, x = _child(x)
    if not inner or not norm or x != _X or not isinstance(shape_of(module._modules[inner]), FeedForward):  # type: ignore[arg-type]
        return None
    return Normed(norm, inner, dropouts)


def _inner(module: nn.Module, found: Op) -> Inner | None:
    activation, product = _child(found)
    dense, x = _product(module, product)
    return Inner(dense, activation) if activation and dense and x == _X else None


def _output(module: nn.Module, found: Op | None) -> Output | None:
    norm, total = _child(found)
    if not norm or type(module._modules[norm]) is not nn.LayerNorm or total is None or total.name != "add":
        return None
    residual = Op("input", (1,))
    if residual not in total.args:
        return None
    product, dropouts = _behind_dropout(module, total.args[1 - total.args.index(residual)])
    dense, x = _product(module, product)
    return Output(dense, norm, dropouts) if dense and x == _X else None


def _layer(module: nn.Module) -> Layer | None:
    output, arguments = None, None
    found = trace(module, 1, torch.bfloat16, "feed_forward_chunk")
    if found is not None and found.name == "child" and not found.options and found.args[2:] == (_X,):
        output, arguments = found.args[:2]
    inner, x = _child(arguments)
    if not output or not inner or x != _X or not isinstance(shape_of(module._modules[output]), Output):  # type: ignore[arg-type]
        return None
    first: Any = module._modules[inner]
    return Layer(inner, output) if isinstance(_find(first), Inner) and isinstance(shape_of(first), Inner) else None


def _child(found: Any) -> tuple[Any, Any]:
    """(name, argument) of a child called with one argument; (None, None) for anything else."""
    if isinstance(found, Op) and found.name == "child" and len(found.args) == 2 and not found.options:
        return found.args
    return None, None


def _product(module: nn.Module, found: Any) -> tuple[Any, Any]:
    """(name, argument) of an nn.Linear's call."""
    name, x = _child(found)
    return (name, x) if name and _linear(module, name) else (None, None)


def _linear(module: nn.Module, name: str) -> bool:
    return isinstance(module._modules[name], nn.Linear)


def _behind_dropout(module: nn.Module, found: Any) -> tuple[Any, tuple[str, ...]]:
    """What a dropout layer gets, and its name; without one, `found` itself."""
    name, x = _child(found)
    if name and isinstance(module._modules[name], nn.Dropout | nn.Identity):
        return x, (name,)
    return found, ()


@fused_forward
def norm(module: Any, x: Tensor) -> Any:
    """pyfused.rms_norm"""
    shape = shape_of(module)
    if not isinstance(shape, Norm) or not takes(x, module.weight):
        return original(module, x)
    weight = 1.0 + module.weight if shape.plus_one else module.weight
    return rms_norm(x, weight, eps=getattr(module, shape.eps))


@fused_forward
def feed_forward(module: Any, x: Tensor) -> Any:
    """pyfused.ffn"""
    y = _computed(module, x, None)
    return original(module, x) if y is None else y


@fused_forward
def gated(module: Any, x: Tensor) -> Any:
    """pyfused.gated_ffn"""
    return feed_forward(module, x)


@fused_forward
def normed(module: Any, x: Tensor) -> Any:
    """the norm, then the feed-forward with the residual"""
    shape, children = shape_of(module), module._modules
    if isinstance(shape, Normed) and not any(drops(children[d]) for d in shape.dropouts):
        inner = children[shape.feed_forward]
        if is_fused(inner) and is_bare(inner):
            y = _computed(inner, children[shape.norm](x), x)
            if y is not None:
                return y
    return original(module, x)


@fused_forward
def output(module: Any, x: Tensor, residual: Tensor) -> Any:
    """pyfused.linear with the residual, then the norm"""
    shape, children = shape_of(module), module._modules
    if not isinstance(shape, Output) or not _adds_residual(shape, children, x, residual):
        return original(module, x, residual)
    dense = children[shape.dense]
    return children[shape.norm](linear(x, dense.weight, dense.bias, residual=residual))


@fused_forward
def chunk(module: Any, x: Tensor) -> Any:
    """pyfused.ffn with the residual, then the norm"""
    shape = shape_of(module)
    if isinstance(shape, Layer):
        inner, outer = module._modules[shape.inner], module._modules[shape.output]
        first, last = shape_of(inner), shape_of(outer)
        known = isinstance(first, Inner) and isinstance(last, Output)
        activation = kernel_activation(inner._modules[first.activation]) if known else None
        if activation and is_bare(inner, outer) and is_fused(outer):
            w_in, w_out = inner._modules[first.dense], outer._modules[last.dense]
            if is_plain_linear(x, w_in) and _adds_residual(last, outer._modules, x, x):
                y = ffn(x, w_in.weight, w_in.bias, w_out.weight, w_out.bias, activation=activation, residual=x)
                return outer._modules[last.norm](y)
    return type(module).feed_forward_chunk(module, x)


@fused_forward
def layer(module: Any, *args: Any, **kwargs: Any) -> Any:
    """as it is; its feed-forward is pyfused.ffn with the residual, then the norm"""
    return original(module, *args, **kwargs)


layer.methods = {"feed_forward_chunk": chunk}  # type: ignore[attr-defined]


def _adds_residual(shape: Output, children: Any, x: Tensor, residual: Tensor) -> bool:
    dense = children[shape.dense]
    return (
        x.dtype == residual.dtype
        and not any(drops(children[d]) for d in shape.dropouts)
        and is_plain_linear(x, dense)
        and residual.shape == (*x.shape[:-1], dense.out_features)
    )


def _computed(module: Any, x: Tensor, residual: Tensor | None) -> Tensor | None:
    """None if the kernels cannot compute it: active dropout, replaced layers, other dtypes, biases beside a gate."""
    shape, children = shape_of(module), module._modules
    if not isinstance(shape, FeedForward):
        return None
    activation = kernel_activation(children[shape.activation])
    inner, outer = children[shape.inner], children[shape.outer]
    if activation is None or any(drops(children[d]) for d in shape.dropouts) or not is_plain_linear(x, inner, outer):
        return None
    if residual is not None and residual.dtype != x.dtype:
        return None
    if shape.gate is None:
        return ffn(x, inner.weight, inner.bias, outer.weight, outer.bias, activation=activation, residual=residual)
    gate = children[shape.gate] if shape.gate else inner
    if not is_plain_linear(x, gate) or any(m.bias is not None for m in (inner, outer, gate)):
        return None
    w_gate, w_up = (gate.weight, inner.weight) if shape.gate else inner.weight.chunk(2)
    return gated_ffn(x, w_gate, w_up, outer.weight, activation=activation, residual=residual)


for _function in (norm, feed_forward, gated, normed, output, layer):
    vars(_function)["prepare"] = shape_of
