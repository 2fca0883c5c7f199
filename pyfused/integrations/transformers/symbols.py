"""What does a module's forward compute? It runs once on symbols instead of tensors, which write down what is done to them.

Nothing is computed, and neither the module nor torch is touched: the class's forward gets a stand-in for `self`. Its children
and parameters are symbols too; everything else is the module's own. A forward that looks at the values or sizes of its input
has no trace. Nor has one that asks whether it trains, except for dropout, branches on a setting, draws random numbers, or reads
what it could change. A change of dtype is no operation: a symbol knows its dtype instead.
"""

from __future__ import annotations

import types
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .config import FusedConfig
from .releases import PreTrainedConfig


class Op(NamedTuple):
    """One operation: its name, and its arguments, which are operations, numbers or other plain objects.

    Names: "input" (the place among the arguments), "parameter" (its name), "child" (its name, then its arguments), "setting"
    (the attribute that holds a number, then the number), "part" (of what, which, of how many), "drop" (of what, the attribute
    with the probability: torch's function, while the module trains), else a method of tensors or a function of torch. The
    arguments of "add" and "mul" are sorted.
    """

    name: str
    args: tuple[Any, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()


def either_order(name: str, *args: Any) -> Op:
    """A sum or a product, whose arguments are sorted."""
    return Op(name, tuple(sorted(args, key=repr)))


def trace(module: nn.Module, inputs: int, dtype: torch.dtype, method: str = "forward") -> Op | None:
    """What `method` of the module's class returns, called with this many tensors of the parameters' dtype. None if there is no
    trace, or if the result is no tensor of that dtype."""
    given = [_Symbol(Op("input", (i,)), dtype) for i in range(inputs)]
    try:
        with _SymbolsAlone():
            found = getattr(type(module), method)(_Self(module, dtype), *given)
    except Exception:  # whatever a forward raises when it gets symbols
        return None
    return found.op if isinstance(found, _Symbol) and found.kind == dtype else None


class _Untraceable(Exception):
    """The forward does something to a symbol that a trace cannot hold."""


class _SymbolsAlone(TorchFunctionMode):
    """Refuses calls of torch without a symbol: random numbers, new tensors."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        symbols = any(isinstance(value, _Symbol) for value in (*args, *(kwargs or {}).values()))
        if not symbols and function is not torch.promote_types:
            raise _Untraceable(function)
        return function(*args, **(kwargs or {}))


class _Symbol:
    def __init__(self, op: Op, kind: torch.dtype):
        self.op, self.kind = op, kind

    @property
    def dtype(self) -> torch.dtype:
        return self.kind

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _record(function.__name__, args, kwargs or {})

    def to(self, dtype: Any) -> _Symbol:
        if not isinstance(dtype, torch.dtype):
            raise _Untraceable("to")
        return _Symbol(self.op, dtype)

    def float(self) -> _Symbol:
        return self.to(torch.float32)

    def type_as(self, other: Any) -> _Symbol:
        return self.to(other.dtype)

    def chunk(self, parts: int, dim: int = 0) -> tuple[_Symbol, ...]:
        if dim != -1:
            raise _Untraceable("chunk")
        return tuple(_Symbol(Op("part", (self.op, i, parts)), self.kind) for i in range(parts))

    def __getattr__(self, name: str) -> Any:
        if name not in ("pow", "mean", "rsqrt", "sqrt", "add", "mul", "sub", "div", "square"):
            raise _Untraceable(name)
        return lambda *args, **kwargs: _record(name, (self, *args), kwargs)

    def __add__(self, other: Any) -> Any:
        return _record("add", (self, other), {})

    def __mul__(self, other: Any) -> Any:
        return _record("mul", (self, other), {})

    def __pow__(self, other: Any) -> Any:
        return _record("pow", (self, other), {})

    def __sub__(self, other: Any) -> Any:
        return _record("sub", (self, other), {})

    def __matmul__(self, other: Any) -> Any:
        return _record("matmul", (self, other), {})

    @property
    def T(self) -> Any:
        return _record("T", (self,), {})

    def __truediv__(self, other: Any) -> Any:
        return _record("div", (self, other), {})

    __radd__, __rmul__ = __add__, __mul__

    def _refuse(self, *args: Any) -> Any:
        raise _Untraceable

    __bool__ = __iter__ = __len__ = __index__ = __eq__ = __getitem__ = __setitem__ = _refuse  # type: ignore[assignment]
    __iadd__ = __imul__ = __isub__ = __itruediv__ = __ipow__ = _refuse
    __hash__ = object.__hash__


def _record(name: str, args: Any, kwargs: dict[str, Any]) -> _Symbol:
    symbols = [a for a in (*args, *kwargs.values()) if isinstance(a, _Symbol)]
    kind = symbols[0].kind
    for symbol in symbols[1:]:
        kind = torch.promote_types(kind, symbol.kind)
    plain = tuple(map(_plain, args))
    if name == "dropout":
        return _Symbol(_dropped(plain, **kwargs), kind)
    if kwargs and name in ("square", "pow", "rsqrt", "sqrt", "add", "mul", "sub", "div"):  # alpha, out, exponent
        raise _Untraceable(name)
    if (name, plain[1:]) in (("square", ()), ("pow", (2,))):
        return _Symbol(Op("square", plain[:1]), kind)
    if name == "pow" and plain[1:] == (-0.5,):
        return _Symbol(Op("rsqrt", plain[:1]), kind)
    if name in ("add", "mul"):
        return _Symbol(either_order(name, *plain), kind)
    return _Symbol(Op(name, plain, tuple((k, _plain(v)) for k, v in kwargs.items())), kind)


def _dropped(of: tuple[Any, ...], p: Any, training: Any, inplace: bool) -> Op:
    if len(of) != 1 or not isinstance(p, (_Setting, _Whole)) or not isinstance(training, _Training) or inplace:
        raise _Untraceable("dropout")
    return Op("drop", (*of, p.name))


def _plain(value: Any) -> Any:
    if isinstance(value, _Symbol):
        return value.op
    if isinstance(value, _Whole):
        return int(value)
    return Op("setting", (value.name, value + 0.0)) if isinstance(value, _Setting) else value


class _Setting(float):
    """A number that knows which attribute of the module holds it."""

    def __new__(cls, value: float, name: str) -> _Setting:
        made = super().__new__(cls, value)
        made.name = name
        return made

    name: str

    def _refuse(self, *args: Any) -> Any:
        raise _Untraceable  # it may change later

    __bool__ = __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __hash__ = float.__hash__


class _Whole(int):
    """A whole number that knows its attribute. It may be a size, so it does all that an int does. A dropout may be 0."""

    name: str


class _Training:
    """Whether the module trains, which only torch's function for dropout may ask."""

    def _refuse(self, *args: Any) -> Any:
        raise _Untraceable("training")

    __bool__ = __eq__ = __ne__ = _refuse  # type: ignore[assignment]
    __hash__ = object.__hash__


# What a forward may read of the module itself. It could change other things, such as a list.
_READABLE = (bool, int, float, str, tuple, type(None), torch.dtype, types.FunctionType, types.BuiltinFunctionType)


class _Self:
    """A stand-in for the module. Methods of its class run on the stand-in too."""

    def __init__(self, module: nn.Module, dtype: torch.dtype):
        vars(self).update(_of=module, _dtype=dtype)

    def __getattr__(self, name: str) -> Any:
        module = self._of
        if name in module._parameters:
            return None if module._parameters[name] is None else _Symbol(Op("parameter", (name,)), self._dtype)
        if name in module._modules:
            return None if module._modules[name] is None else _Child(name, self._dtype)
        if name in vars(module):
            value = vars(module)[name]
            if name == "training":
                return _Training()
            if not isinstance(value, (*_READABLE, PreTrainedConfig, FusedConfig)):
                raise _Untraceable(name)
            if type(value) is int:
                whole = _Whole(value)
                whole.name = name
                return whole
            return _Setting(value, name) if type(value) is float else value
        found = getattr(type(module), name)
        return types.MethodType(found, self) if isinstance(found, types.FunctionType) else found

    def __setattr__(self, name: str, value: Any) -> None:
        raise _Untraceable(name)


class _Child:
    def __init__(self, name: str, dtype: torch.dtype):
        self._name, self.weight = name, _Symbol(Op("parameter", (f"{name}.weight",)), dtype)

    def __call__(self, *args: Any, **kwargs: Any) -> _Symbol:
        return _record("child", (self._name, *args), kwargs)
