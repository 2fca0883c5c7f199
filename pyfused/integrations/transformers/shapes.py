"""Which modules of any transformers model are of a usual shape, whatever their class is called? Their traces say (symbols.py).

    norm            weight * x / rms(x), or (1 + weight) * x / rms(x)
    layer norm      weight * (x - mean(x)) / deviation(x) + bias
    dense, gated    outer(act(inner(x)));  outer(act(gate(x)) * up(x)), also with gate and up in one matrix
    normed dense    x + dense(norm(x)), or gated
    summed          dense(x) or gated + residual, both of them given
    output          norm(dense(x) + residual), or the sum alone; MobileBERT's factor and shift count as a norm
    inner           act(dense(x))
    outer           dense(x)
    layer           a method of it, one of CHUNKS, is output(inner(x), x) or output(inner(norm(x)), x)
    in line         among its statements are dense(x), gated or outer(inner(x)), with a residual or without, or
                    output(inner(x), residual)

Dropout may stand behind each product. An activation is a child or a function. Statements say what a layer does in line
(statements.py): the whole of its forward has no trace. shaped.py has the forwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .activations import traced_activation
from .plain_modules import other_linear
from .statements import Run, Source, source_of
from .symbols import Op, either_order, trace


class Function(NamedTuple):
    """An activation that is no child: the kernels' name for it."""

    name: str


class Norm(NamedTuple):
    """eps: the attribute's name. plus_one: whether the factor is 1 + weight."""

    eps: str
    plus_one: bool


class LayerNorm(NamedTuple):
    """eps: the attribute's name."""

    eps: str


class FeedForward(NamedTuple):
    """The children's names. gate: None without one; "" where `inner` holds gate and up, one above the other. A dropout may also
    be the name of an attribute: the probability of torch's function."""

    inner: str
    outer: str
    activation: str | Function
    gate: str | None
    dropouts: tuple[str, ...]


class Normed(NamedTuple):
    """The children's names."""

    norm: str
    feed_forward: str
    dropouts: tuple[str, ...]


class Summed(NamedTuple):
    """A feed-forward, then these dropouts, and the sum with a residual that the module is given."""

    what: FeedForward
    dropouts: tuple[str, ...]


class Output(NamedTuple):
    """The children's names. norm: "" without one."""

    dense: str
    norm: str
    dropouts: tuple[str, ...]


class Inner(NamedTuple):
    """The first half of a feed-forward. It has no forward of its own here."""

    dense: str
    activation: str | Function


class Outer(NamedTuple):
    """The second half of a feed-forward, without the residual. It has no forward of its own here."""

    dense: str
    dropouts: tuple[str, ...]


class Layer(NamedTuple):
    """The names of two children, an Inner and an Output, that are called as output(inner(x), residual), or an Inner and an
    Outer. Where a method does it, that method's name; the residual is x then, and the child `norm`, if there is one, comes
    before `inner`."""

    inner: str
    output: str
    method: str = ""
    norm: str = ""


class Part(NamedTuple):
    """What statements of a forward compute: `what`, then these dropouts, then the sum with a residual if there is one.

    names: the locals that hold the input and the residual. plain: the statements, a function of the module and these.
    """

    run: Run
    names: tuple[str, ...]
    what: FeedForward | Layer
    dropouts: tuple[str, ...]
    plain: Callable[..., Any]


class InLine(NamedTuple):
    """A class's forward, and the parts in it."""

    forward: Callable[..., Any]
    parts: tuple[Part, ...]


CHUNKS = ("feed_forward_chunk", "ff_chunk")
Shape = Norm | LayerNorm | FeedForward | Normed | Summed | Output | Inner | Outer | Layer | InLine
Half = Inner | Outer  # these have no forward of their own here
_shapes: WeakKeyDictionary[type, Shape | None] = WeakKeyDictionary()


def shape_of(module: nn.Module) -> Any:
    """The shape of the module's class, or None. Nor does a trace of torch.compile find one that is not known yet."""
    kind = type(module)
    if kind not in _shapes:
        if torch.compiler.is_compiling():
            return None
        _shapes[kind] = find(module)
    return _shapes[kind]


def find(module: nn.Module) -> Shape | None:
    """The shape that this very module has, with its settings."""
    children, own = module._modules, [p for p in module._parameters.values() if p is not None]
    if not children:
        vectors = len(own) if all(p.dim() == 1 for p in own) else 0
        return _norm(module) if vectors == 1 else _layer_norm(module) if vectors == 2 else None
    for method in CHUNKS:
        if hasattr(type(module), method):
            pair = _pair(module, trace(module, 1, torch.bfloat16, method), method)
            if pair is not None or method == CHUNKS[0]:  # a feed-forward by itself may have the other one
                return pair
    return (None if own or len(children) > 8 else _traced(module)) or _in_line(module)


def _traced(module: nn.Module) -> Shape | None:
    wide, half = (trace(module, 1, dtype) for dtype in (torch.float32, torch.bfloat16))
    if wide is not None and wide == half:
        return _feed_forward(module, wide) or _normed(module, wide) or _outer(module, wide) or _inner(module, wide)
    return _with_residual(module, trace(module, 2, torch.bfloat16))


_X, _WEIGHT, _BIAS = Op("input", (0,)), Op("parameter", ("weight",)), Op("parameter", ("bias",))


def _norm(module: nn.Module) -> Norm | None:
    found = trace(module, 1, torch.bfloat16)
    for plus_one, factor in ((False, _WEIGHT), (True, either_order("add", 1.0, _WEIGHT))):
        for name, total in _squares(module, _X):
            if found == either_order("mul", factor, either_order("mul", _X, Op("rsqrt", (total,)))):
                return Norm(name, plus_one)
    return None


def _layer_norm(module: nn.Module) -> LayerNorm | None:
    found = trace(module, 1, torch.bfloat16)
    centred = Op("sub", (_X, _mean(_X)))
    for name, total in _squares(module, centred):
        normed = Op("div", (centred, Op("sqrt", (total,)))), either_order("mul", centred, Op("rsqrt", (total,)))
        if found in [either_order("add", _BIAS, either_order("mul", _WEIGHT, way)) for way in normed]:
            return LayerNorm(name)
    return None


def _mean(x: Op) -> Op:
    return Op("mean", (x, -1), (("keepdim", True),))


def _squares(module: nn.Module, x: Op) -> Iterator[tuple[str, Op]]:
    """(name, mean(x^2) + eps) for each attribute that may be eps."""
    for name in (name for name, value in vars(module).items() if type(value) is float):
        yield name, either_order("add", _mean(Op("square", (x,))), Op("setting", (name, vars(module)[name])))


def _feed_forward(module: nn.Module, found: Any) -> FeedForward | None:
    found, dropouts = _behind_dropout(module, found)
    outer, found = _product(module, found)
    found, more = _behind_dropout(module, found)
    if outer is None or found is None:
        return None
    dropouts += more
    activation, product = _activated(found)
    if activation is not None:
        product, more = _behind_dropout(module, product)
        inner, x = _product(module, product)
        return FeedForward(inner, outer, activation, None, dropouts + more) if inner and x == _X else None
    if found.name != "mul" or not all(isinstance(f, Op) for f in found.args):
        return None
    for first, up in (found.args, found.args[::-1]):
        activation, gate = _activated(first)
        if activation is None or not isinstance(gate, Op):
            continue
        if not isinstance(activation, Function) and _linear(module, activation):
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
    activation, product = _activated(found)
    dense, x = _product(module, product)
    if not isinstance(activation, Function):  # a norm is none
        child = module._modules[activation] if activation else None
        if child is None or next(child.parameters(), None) is not None:
            return None
    return Inner(dense, activation) if dense and x == _X else None


def _outer(module: nn.Module, found: Op) -> Outer | None:
    found, dropouts = _behind_dropout(module, found)
    dense, x = _product(module, found)
    return Outer(dense, dropouts) if dense and x == _X else None


def _with_residual(module: nn.Module, found: Op | None) -> Output | Summed | None:
    norm, total = _child(found) if found is not None and found.name == "child" else ("", found)
    residual = Op("input", (1,))
    if total is None or total.name != "add" or residual not in total.args:
        return None
    if norm and not (_is_layer_norm(module._modules[norm]) or _is_affine(module._modules[norm])):
        return None
    branch, dropouts = _behind_dropout(module, total.args[1 - total.args.index(residual)])
    dense, x = _product(module, branch)
    if dense and x == _X:
        return Output(dense, norm, dropouts)
    what = None if norm else _feed_forward(module, branch)
    return None if what is None else Summed(what, dropouts)


def _is_affine(module: Any) -> bool:
    """Whether this is weight * x + bias, each of them a vector."""
    vectors = [p.dim() for p in module._parameters.values() if p is not None] == [1, 1]
    return vectors and trace(module, 1, torch.bfloat16) == either_order("add", _BIAS, either_order("mul", _WEIGHT, _X))


def _is_layer_norm(module: Any) -> bool:
    return type(module) is nn.LayerNorm or isinstance(shape_of(module), LayerNorm)


def _is_norm(module: Any) -> bool:
    return _is_layer_norm(module) or isinstance(shape_of(module), Norm)


def _pair(module: nn.Module, found: Op | None, method: str = "") -> Layer | None:
    if found is None or found.name != "child" or found.options or found.args[2:] not in ((_X,), ()):
        return None
    output, arguments = found.args[:2]
    inner, x = _child(arguments)
    norm, of = _child(x) if method else ("", None)
    if norm and of == _X and _is_norm(module._modules[norm]):
        x = _X
    else:
        norm = ""
    if not inner or x != _X:
        return None
    first, last = (module._modules[name] for name in (inner, output))
    wanted: Any = Output if found.args[2:] else Outer
    shapes: Any = find(first), shape_of(first), shape_of(last)  # type: ignore[arg-type]
    known = isinstance(shapes[0], Inner) and isinstance(shapes[1], Inner) and isinstance(shapes[2], wanted)
    return Layer(inner, output, method, norm) if known else None


def _in_line(module: nn.Module) -> InLine | None:
    forward: Any = type(module).forward
    source = source_of(forward) if len(module._modules) > 1 else None
    if source is None:
        return None
    parts: list[Part] = []
    for run in source.runs:
        if not parts or run.block is not parts[-1].run.block or run.start >= parts[-1].run.stop:
            part = _part(module, source, run)
            parts += [] if part is None else [part]
    return InLine(forward, tuple(parts)) if parts else None


def _part(module: nn.Module, source: Source, run: Run) -> Part | None:
    called = {op.args[0] for op in _operations(run.op) if op.name == "child"}
    if any(module._modules.get(name) is None for name in called):
        return None
    if run.op.name == "child" and len(run.op.args) == 3 and not run.op.options:
        return _part_of_pair(module, source, run)
    sides = (run.op.args, run.op.args[::-1]) if run.op.name == "add" else ((None, run.op),)
    for residual, branch in sides:
        added = residual.args if isinstance(residual, Op) and residual.name == "input" else ()
        names = {op.args[0] for op in _operations(branch) if op.name == "input"}
        if len(names) != 1 or bool(added) != (run.op.name == "add"):
            continue
        found, dropouts = _behind_dropout(module, _renamed(branch, *names))
        what = _feed_forward(module, found) or _pair(module, found)
        if what is not None:
            given = (*names, *added)
            return Part(run, given, what, dropouts, source.alone(run, given))
    return None


def _part_of_pair(module: nn.Module, source: Source, run: Run) -> Part | None:
    """output(inner(x), residual)"""
    output, branch, residual = run.op.args
    names = {op.args[0] for op in _operations(branch) if op.name == "input"}
    if len(names) != 1 or not isinstance(residual, Op) or residual.name != "input":
        return None
    what = _pair(module, Op("child", (output, _renamed(branch, *names), _X)))
    given = tuple(dict.fromkeys((*names, *residual.args)))
    return None if what is None else Part(run, given, what, (), source.alone(run, given))


def _operations(op: Any) -> Iterator[Op]:
    if isinstance(op, Op):
        yield op
        for arg in op.args:
            yield from _operations(arg)


def _renamed(op: Any, name: str) -> Any:
    """The operation with the first argument in place of a local name."""
    if not isinstance(op, Op):
        return op
    if op == Op("input", (name,)):
        return _X
    args = [_renamed(arg, name) for arg in op.args]
    return either_order(op.name, *args) if op.name in ("add", "mul") else Op(op.name, tuple(args), op.options)


def _child(found: Any) -> tuple[Any, Any]:
    """(name, argument) of a child called with one argument; (None, None) for anything else."""
    if isinstance(found, Op) and found.name == "child" and len(found.args) == 2 and not found.options:
        return found.args
    return None, None


def _activated(found: Any) -> tuple[Any, Any]:
    """(activation, argument) of a child or a function that may be one; (None, None) for anything else."""
    name, x = traced_activation(found)
    return (Function(name), x) if name else _child(found)


def _product(module: nn.Module, found: Any) -> tuple[Any, Any]:
    """(name, argument) of an nn.Linear's call."""
    name, x = _child(found)
    return (name, x) if name and _linear(module, name) else (None, None)


def _linear(module: nn.Module, name: str) -> bool:
    child = module._modules[name]
    if not isinstance(child, nn.Linear):
        return False
    other_linear(child)  # a process that loads a pickle looks here too
    return True


def _behind_dropout(module: nn.Module, found: Any) -> tuple[Any, tuple[str, ...]]:
    """What a dropout gets, and its name; without one, `found` itself."""
    name, x = _child(found)
    if isinstance(found, Op) and found.name == "drop" and type(vars(module).get(found.args[1])) in (int, float):
        return found.args[0], (found.args[1],)
    if name and isinstance(module._modules[name], nn.Dropout | nn.Identity):
        return x, (name,)
    return found, ()
