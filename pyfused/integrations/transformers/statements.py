"""Which statements of a forward compute one value from local names? And how does the forward run with a call in their place?

Source tells, if it compiles to the forward's own bytecode. The class's forward stays. A copy of it has a call in place of the
statements. Everything else in the copy is as it was: attention, caches, branches, float16's clamp. The statements are kept as a
function of their own, for what the kernels cannot compute.
"""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import types
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch.nn.functional as F

from .alike import UNREADABLE
from .symbols import Op, either_order

CALL = "_pyfused"  # the name in the copy
_SEE_ALL_NAMES = {"locals", "vars", "dir", "eval", "exec"}
_LOOPS = (ast.For, ast.AsyncFor, ast.While)


@dataclass(eq=False)
class Run:
    """Statements that follow each other, block[start:stop]. They give the local name `result` the value `op`, and no other
    statement reads the names that they give values beside it.

    `op` is an operation of symbols.py on "input" (a local name). It may hold one more: "drop" (of what, the attribute with the
    probability), torch's function for dropout, while the module trains."""

    block: list[ast.stmt]
    start: int
    stop: int
    result: str
    op: Op


class Source:
    """A function's source, and the functions made of it."""

    def __init__(self, wrappers: list[types.FunctionType], function: types.FunctionType, definition: ast.FunctionDef):
        self._wrappers, self.function, self.definition = wrappers, function, definition
        self.own = function.__code__.co_varnames[0]  # `self`
        self.runs = tuple(_runs(function, definition))
        self._alone: dict[tuple[Run, tuple[str, ...]], Any] = {}

    def with_calls(self, function: Any, calls: list[tuple[Run, tuple[str, ...]]]) -> Any:
        """The forward, in which a call of the function, (number, self, *names), stands for each run."""
        memo: dict[int, Any] = {}
        definition = copy.deepcopy(self.definition, memo)
        for number, (run, names) in reversed(list(enumerate(calls))):  # from below, as places move
            given = [ast.Constant(number), *(ast.Name(name, ast.Load()) for name in (self.own, *names))]
            call = ast.Call(ast.Name(CALL, ast.Load()), given, [])
            assignment = ast.Assign([ast.Name(run.result, ast.Store())], call)
            block = memo[id(run.block)]
            block[run.start : run.stop] = [ast.copy_location(assignment, block[run.start])]
        return self.remade(definition, function)

    def remade(self, definition: ast.FunctionDef, call: Any) -> Any:
        """The forward with another definition, in which CALL is the name of `call`."""
        around = copy.copy(self.definition)
        around.args, around.body = _arguments(CALL), [definition]
        code = _inner(_compiled(around, self.function))
        made = _like(self.function, code, (types.CellType(call),))
        for inner, wrapper in pairwise((self.function, *reversed(self._wrappers))):
            cells: Any = (types.CellType(made) if _holds(cell, inner) else cell for cell in wrapper.__closure__ or ())
            made = _like(wrapper, wrapper.__code__, tuple(cells))
        return made

    def alone(self, run: Run, names: tuple[str, ...]) -> Any:
        """A run as a function of (self, *names)."""
        if (run, names) not in self._alone:
            definition = copy.copy(self.definition)
            once = (f"_{name}" if name in names[:i] else name for i, name in enumerate(names))  # x + f(x) has x twice
            definition.args = _arguments(self.own, *once)
            statements = copy.deepcopy(run.block[run.start : run.stop])
            definition.body = [*statements, ast.Return(ast.Name(run.result, ast.Load()))]
            code = _compiled(definition, self.function)
            self._alone[run, names] = types.FunctionType(code, self.function.__globals__)
        return self._alone[run, names]

    def attribute(self, node: ast.expr) -> str:
        """The attribute of `self` that is read; "" for anything else."""
        return _attribute(node, self.own)

    def called(self, node: ast.expr) -> Any:
        """The global function that is called; None for anything else."""
        return _global(self.function, node.func) if isinstance(node, ast.Call) else None


def _arguments(*names: str) -> ast.arguments:
    return ast.arguments([], [ast.arg(name) for name in names], None, [], [], None, [])


def _holds(cell: types.CellType, function: Any) -> bool:
    try:
        return cell.cell_contents is function
    except ValueError:  # it is empty
        return False


def _like(function: types.FunctionType, code: types.CodeType, closure: tuple[Any, ...]) -> types.FunctionType:
    made = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


_known: WeakKeyDictionary[Any, Source | None] = WeakKeyDictionary()


def source_of(function: Any) -> Source | None:
    """None for a function without source, one with functions inside or around it, one that may look up any local name, and one
    that a decorator replaced, unless the decorator's function holds the replaced one in its closure, as transformers' for
    gradient checkpointing does."""
    if not isinstance(function, types.FunctionType):
        return None
    if function not in _known:
        _known[function] = _read(function)
    return _known[function]


def _read(function: Any) -> Source | None:
    wrappers = []
    while isinstance(function, types.FunctionType) and hasattr(function, "__wrapped__"):
        wrappers.append(function)
        function = function.__wrapped__
        if sum(_holds(cell, function) for cell in wrappers[-1].__closure__ or ()) != 1:
            return None
    if not isinstance(function, types.FunctionType) or function.__closure__:
        return None
    code = function.__code__
    if not _SEE_ALL_NAMES.isdisjoint(code.co_names) or CALL in code.co_names + code.co_varnames:
        return None
    definition = _definition(function)
    return None if definition is None else Source(wrappers, function, definition)


def _definition(function: types.FunctionType) -> ast.FunctionDef | None:
    """Without decorators, annotations and default values."""
    try:
        lines, first = inspect.getsourcelines(function)
        tree: Any = ast.parse("".join(["if 1:\n", *lines]))  # a method is indented
    except UNREADABLE:
        return None
    definition = tree.body[0].body[0]
    if not isinstance(definition, ast.FunctionDef) or not function.__code__.co_argcount:
        return None
    inner = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    if any(isinstance(node, inner) for statement in definition.body for node in ast.walk(statement)):
        return None
    ast.increment_lineno(definition, first - 2)
    definition.decorator_list, definition.returns = [], None
    for node in ast.walk(definition.args):
        if isinstance(node, ast.arg):
            node.annotation = None
    definition.args.defaults, definition.args.kw_defaults = [], [None for _ in definition.args.kwonlyargs]
    return definition if _meaning(_compiled(definition, function)) == _meaning(function.__code__) else None


def _compiled(definition: ast.FunctionDef, function: types.FunctionType) -> types.CodeType:
    """As if it stood in the function's file. Python compiles `module.function()` in another way where it sees the import."""
    code, known = function.__code__, function.__globals__
    imports = [ast.Import([ast.alias(name)]) for name in code.co_names if isinstance(known.get(name), types.ModuleType)]
    module = ast.fix_missing_locations(ast.Module([*imports, definition], []))
    return _inner(compile(module, code.co_filename, "exec", dont_inherit=True))


def _inner(code: types.CodeType) -> types.CodeType:
    return next(c for c in code.co_consts if isinstance(c, types.CodeType))


def _meaning(code: types.CodeType) -> tuple[Any, ...]:
    """What a code object does, whatever its lines' numbers."""
    values = [_meaning(c) if isinstance(c, types.CodeType) else repr(c) for c in code.co_consts]
    return code.co_code, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars, values


def _runs(function: types.FunctionType, definition: ast.FunctionDef) -> Iterator[Run]:
    """All runs, by their first statements; of those with one first statement the longest comes first."""
    uses = _uses([definition])
    looped = {id(inner) for node in ast.walk(definition) if isinstance(node, _LOOPS) for inner in ast.walk(node)}
    for node in ast.walk(definition):
        for block in (getattr(node, field, None) for field in ("body", "orelse", "finalbody")):
            if isinstance(block, list):
                for start in range(len(block)):
                    yield from reversed(list(_runs_from(function, block, start, uses, id(block[start]) in looped)))


def _runs_from(
    function: types.FunctionType, block: list[Any], start: int, uses: Counter[str], looped: bool
) -> Iterator[Run]:
    values: dict[str, Op] = {}
    given: set[str] = set()  # names read before they get a value here; a loop may have given it the last time round
    for stop in range(start + 1, len(block) + 1):
        statement = block[stop - 1]
        if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
            return
        target, op = statement.targets[0], _value(function, statement.value, values)
        if not isinstance(target, ast.Name) or op is None or target.id not in function.__code__.co_varnames[1:]:
            return
        if not values and op.name == "input":  # it only gives another name
            return
        given |= _uses([statement.value]).keys() - values.keys()
        values[target.id] = op
        inside = _uses(block[start:stop])
        lost = values.keys() - {target.id}  # they get no value in the copy
        if all(uses[name] == inside[name] for name in lost) and not (looped and lost & given):
            yield Run(block, start, stop, target.id, op)


def _uses(nodes: list[Any]) -> Counter[str]:
    """How often each name is read or deleted. `x += y` reads x."""
    inside = [n for node in nodes for n in ast.walk(node)]
    changed = [n.target for n in inside if isinstance(n, ast.AugAssign)]
    names = [n for n in inside if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Store)]
    return Counter(n.id for n in (*names, *changed) if isinstance(n, ast.Name))


def _value(function: types.FunctionType, node: ast.expr, values: dict[str, Op]) -> Op | None:
    """What an expression of local names, calls of children, sums, products and dropout computes. None for others."""
    own, *names = function.__code__.co_varnames
    if isinstance(node, ast.Name):
        return values.get(node.id) or (Op("input", (node.id,)) if node.id in names else None)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Mult):
        sides = [_value(function, side, values) for side in (node.left, node.right)]
        name = "add" if isinstance(node.op, ast.Add) else "mul"
        return None if None in sides else either_order(name, *sides)
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return None
    given = [_value(function, argument, values) for argument in node.args]
    if not given or None in given:
        return None
    if not node.keywords:
        child = _attribute(node.func, own)
        return Op("child", (child, *given)) if child else None
    options = {k.arg: _attribute(k.value, own) for k in node.keywords}
    if len(given) != 1 or options.keys() != {"p", "training"} or options["training"] != "training" or not options["p"]:
        return None
    return Op("drop", (given[0], options["p"])) if _global(function, node.func) is F.dropout else None


def _attribute(node: ast.expr, own: str) -> str:
    """The attribute of `self` that is read; "" for anything else."""
    known = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == own
    return cast(ast.Attribute, node).attr if known else ""


def _global(function: types.FunctionType, node: ast.expr) -> Any:
    """The value of a dotted name that begins with a global one; None for others."""
    first, *names = ast.unparse(node).split(".")
    if first in function.__code__.co_varnames:
        return None
    return functools.reduce(lambda value, name: getattr(value, name, None), names, function.__globals__.get(first))
