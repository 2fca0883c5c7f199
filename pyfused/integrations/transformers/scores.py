"""Which statements of a forward compute attention by hand? And how does the forward run with a call in their place?

By hand is softmax(scale * query key^T + biases) value, written with products and a softmax. All else stays in a copy of the
forward: projections, rotations, caches, biases, what follows. In the copy the name of the scores holds what is added to them,
and the names of the probabilities hold None: who wants those calls the class's own forward.
"""

from __future__ import annotations

import ast
import copy
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .statements import CALL, Source

# Methods that give the same numbers in another shape or dtype.
_RESHAPES = {"view", "reshape", "contiguous", "float", "to", "type_as"}
_LAST_TWO = {True: ({-1, -2}, {1, 2}), False: ({-1, -2}, {2, 3})}  # by ByHand.flat


@dataclass
class ByHand:
    """A forward that computes attention by hand.

    definition: with calls of CALL's functions in place of the statements. dropout: the attribute of `self` with the dropout of
    the probabilities, a module or a number; "" without one. absent: the attributes that must be None. flat: whether heads and
    batch are one dimension of query, key and value.
    """

    definition: Any
    dropout: str = ""
    absent: list[str] = field(default_factory=list)
    flat: bool = False


def by_hand(source: Source) -> ByHand | None:
    """None for a forward whose statements do anything that is not known here."""
    for number in range(len(source.definition.body)):
        reader = _Reader(source)
        try:
            if reader.read(number):
                return reader.found
        except _Unknown:
            continue
    return None


class _Unknown(Exception):
    """A statement does something else with the scores or the probabilities."""


class _Reader:
    """Reads the statements from the product of query and key to that of probabilities and value.

    A node of the syntax tree may be of any kind here, so its type is Any.
    """

    def __init__(self, source: Source):
        self.source, self.found = source, ByHand(source.definition)
        self.scores = self.query = ""
        self.vectors: Any = ()  # queries and keys
        self.first: Any = None  # what the product itself is added to
        self.scales: list[tuple[ast.operator, Any]] = []
        self.names: set[str] = set()  # that the scores have had
        self.probabilities: set[str] = set()
        self.least: set[str] = set()  # that hold the least number
        self.added = False

    def read(self, number: int) -> bool:
        """Whether the body's statement of this number makes the scores. The definition is the copy's then."""
        self.scores = _target(self.found.definition.body[number])
        if not self.scores or not self._begins(self.found.definition.body[number].value):
            return False
        self.found.definition = copy.deepcopy(self.source.definition)
        body = self.found.definition.body
        first, rest = body[number], body[number + 1 :]
        self._begins(first.value)
        self.names = {self.scores}
        given = _name(self.source.own), _name(self.query), ast.Constant(self.found.flat)
        made = [_assign(self.scores, _call(CALL, "begin", *given))]
        made += [] if self.first is None else [self._plus(self.first, ast.Add())]
        while rest and not self.probabilities:
            made += self._before(rest.pop(0))
        while rest and not self._ends(rest[0]):
            made += self._between(rest.pop(0))
        if not rest:
            raise _Unknown
        last = rest.pop(0)
        gone = (self.probabilities | self.names) - {_target(last)}
        if not gone <= set(self.source.function.__code__.co_varnames[1:]):  # a global name
            raise _Unknown
        _check_handed_on(rest, gone)
        made += [last, *(_assign(name, ast.Constant(None)) for name in sorted(gone))]
        body[number:] = [new if hasattr(new, "lineno") else ast.copy_location(new, first) for new in made] + rest
        return True

    def _begins(self, node: Any) -> bool:
        """Whether this is query key^T, times or over something."""
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult | ast.Div) and self._begins(node.left):
            self.scales.append((node.op, node.right))
            return True
        if _is_method(node, "baddbmm"):
            return self._begins_with_sum(node)
        query, key, flat = self._product(node)
        self.scales = []
        if isinstance(key, ast.BinOp) and isinstance(key.op, ast.Div):
            self.scales, key = [(key.op, key.right)], key.left
        if not _is_method(key, "transpose") or not self._vectors(key.func.value) or not self._vectors(query):
            return False
        self.query, self.vectors, self.found.flat = self._vectors(query), (query, key.func.value), flat
        return set(map(_number, key.args)) in _LAST_TWO[flat]

    def _vectors(self, node: Any) -> str:
        """The name of queries or keys, as they are or with F.normalize, which leaves their shape; "" for other nodes."""
        if self.source.called(node) is F.normalize and len(node.args) == 1:
            node = node.args[0]
        return node.id if isinstance(node, ast.Name) else ""

    def _begins_with_sum(self, node: Any) -> bool:
        """Whether this is bias.baddbmm(batch1=query, batch2=key, beta=, alpha=), of a key that is transposed already."""
        given = {k.arg: k.value for k in node.keywords}
        query, key = given.get("batch1"), given.get("batch2")
        if given.keys() != {"batch1", "batch2", "beta", "alpha"} or node.args:
            return False
        if not isinstance(query, ast.Name) or not isinstance(key, ast.Name):
            return False
        turned = ast.Call(ast.Attribute(key, "transpose", ast.Load()), [ast.Constant(-1), ast.Constant(-2)], [])
        self.query, self.vectors, self.found.flat = query.id, (query, turned), True
        self.scales = [(ast.Mult(), given["alpha"])]
        self.first = ast.BinOp(node.func.value, ast.Mult(), given["beta"])
        return True

    def _product(self, node: Any) -> tuple[Any, Any, bool]:
        """(left, right, whether both have three dimensions); (None, None, False) if this is no product."""
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
            return node.left, node.right, False
        function = self.source.called(node)
        if function not in (torch.matmul, torch.bmm) or len(node.args) != 2 or node.keywords:
            return None, None, False
        return node.args[0], node.args[1], function is torch.bmm

    def _before(self, statement: Any, inside: bool = False) -> list[Any]:
        """The statement in the copy, before the softmax."""
        statement = _AsTheQueries(self.scores, self.query).visit(statement)
        if not _mentions(statement, self.names):
            return self._kept(statement)
        if isinstance(statement, ast.If):
            return self._branches(statement)
        if isinstance(statement, ast.AugAssign) and _same(statement.target, {self.scores}):
            return [self._plus(statement.value, statement.op)]
        if isinstance(statement, ast.Expr) and _is_method(statement.value, "masked_fill_"):
            return [self._filled(statement.value)]
        name, value = _target(statement), getattr(statement, "value", None)
        if name and not inside and self._is_softmax(value):
            self.probabilities = {name}
            return []
        if name == self.scores:
            return [] if _same(value, {name}) else self._changed(value, inside)
        if not name or inside or not _same(value, {self.scores}):
            raise _Unknown
        old, self.scores = self.scores, name
        self.names.add(name)
        return [_assign(name, _name(old))]

    def _kept(self, statement: Any) -> list[Any]:
        """The statement as it is, if it gives none of the names that the call reads another value."""
        read = (*self.vectors, *(by for _, by in self.scales))
        names = {n.id for node in read for n in ast.walk(node) if isinstance(n, ast.Name)}
        names |= self.names | self.probabilities
        inside = (n for n in ast.walk(statement) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load))
        changed = {n.id for n in inside}
        if changed & names:
            raise _Unknown
        least = {_target(statement)} if _target(statement) and self._is_least(statement.value) else set()
        self.least = self.least - changed | least
        return [statement]

    def _changed(self, value: Any, inside: bool) -> list[Any]:
        """What stands for scores = value."""
        if isinstance(value, ast.BinOp):
            left, right = _same(value.left, {self.scores}), _same(value.right, {self.scores})
            if left and isinstance(value.op, ast.Mult | ast.Div):
                if inside or _mentions(value.right, self.names):
                    raise _Unknown
                self.scales.append((value.op, value.right))
                by = ast.BinOp(ast.Constant(1.0), value.op, value.right)
                return [_assign(self.scores, _call(self.scores, "scaled", by))] if self.added else []
            if left or right:
                return [self._plus(value.right if left else value.left, value.op)]
        if self.source.called(value) is not torch.max:
            return [self._filled(value)]
        if len(value.args) != 2 or not _same(value.args[0], {self.scores}) or not self._is_least(value.args[1]):
            raise _Unknown
        return [_assign(self.scores, _call(self.scores, "clamped"))]

    def _plus(self, value: Any, operator: Any) -> Any:
        if not isinstance(operator, ast.Add) or _mentions(value, self.names):
            raise _Unknown
        self.added = True
        return _assign(self.scores, _call(self.scores, "plus", value))

    def _filled(self, value: Any) -> Any:
        """scores.masked_fill(hidden, the least number), or torch.where(visible, scores, the least number)"""
        if _is_method(value, "masked_fill", "masked_fill_") and len(value.args) == 2:
            scores, (hidden, least) = value.func.value, value.args
        elif self.source.called(value) is torch.where and len(value.args) == 3 and not value.keywords:
            visible, scores, least = value.args
            hidden = _call(visible, "logical_not")
        else:
            raise _Unknown
        if not _same(scores, {self.scores}) or not self._is_least(least) or _mentions(hidden, self.names):
            raise _Unknown
        self.added = True
        return _assign(self.scores, _call(self.scores, "filled", hidden))

    def _is_least(self, node: Any) -> bool:
        """Whether this is a dtype's least number, or a tensor of it."""
        if isinstance(node, ast.Name):
            return node.id in self.least
        if self.source.called(node) is torch.tensor and {k.arg for k in node.keywords} <= {"dtype", "device"}:
            return len(node.args) == 1 and self._is_least(node.args[0])
        text = ast.unparse(node)
        return text.startswith(("torch.finfo(", "torch.full((), torch.finfo(")) and ").min" in text

    def _branches(self, statement: Any) -> list[Any]:
        blocks: tuple[Any, Any] = (statement.body, statement.orelse)
        if [type(inner) for inner in statement.body] == [ast.Raise] and not statement.orelse:
            return []  # a check of the scores' shape
        names = {_target(block[0]) if len(block) == 1 and self._is_softmax(block[0].value) else "" for block in blocks}
        if len(names) == 1 and "" not in names:  # two softmaxes, by the dtype
            self.probabilities = names
            return []
        if _mentions(statement.test, self.names):
            raise _Unknown
        try:
            first, second = ([new for inner in block for new in self._before(inner, True)] for block in blocks)
        except _Unknown:
            return self._left_out(statement)
        return [ast.copy_location(ast.If(statement.test, first or [ast.Pass()], second), statement)]

    def _left_out(self, statement: Any) -> list[Any]:
        """Leaves out what happens only if an attribute is not None."""
        test = statement.test
        if not isinstance(test, ast.Compare) or not isinstance(test.ops[0], ast.IsNot) or statement.orelse:
            raise _Unknown
        name = self.source.attribute(test.left)
        if not name or not _is_none(test.comparators[0]):
            raise _Unknown
        self.found.absent.append(name)
        return []

    def _is_softmax(self, node: Any) -> bool:
        node = _bare(node)
        made: Any = getattr(node, "func", None)
        if self.source.called(made) is nn.Softmax and len(node.args) == 1 and not node.keywords:
            options, dims = made.keywords, made.args  # nn.Softmax(dim=-1)(scores)
        elif self.source.called(node) in (F.softmax, torch.softmax):
            options, dims = node.keywords, node.args[1:]
        else:
            return False
        dims = [*dims, *(k.value for k in options if k.arg == "dim")]
        known = {k.arg for k in options} <= {"dim", "dtype"} and list(map(_number, dims)) == [-1]
        return known and _same(node.args[0], {self.scores})

    def _between(self, statement: Any) -> list[Any]:
        """The statement in the copy, between the softmax and the product with the values."""
        if not _mentions(statement, self.probabilities | self.names):
            return self._kept(statement)
        if isinstance(statement, ast.If):
            names, inside = set(self.probabilities), [*statement.body, *statement.orelse]
            inner: Any
            for inner in inside:
                if not _target(inner) or not (_is_none(inner.value) or _same(inner.value, names)):
                    return self._left_out(statement)
                names.add(_target(inner))
            self.probabilities = names
            return []
        name = _target(statement)
        if not name or not (_same(statement.value, self.probabilities) or self._is_dropout(statement.value)):
            raise _Unknown
        self.probabilities.add(name)
        return []

    def _is_dropout(self, node: Any) -> bool:
        if self.found.dropout or not isinstance(node, ast.Call) or len(node.args) != 1:
            return False
        options = {k.arg: self.source.attribute(k.value) for k in node.keywords}
        if self.source.called(node) is F.dropout and options.keys() == {"p", "training"}:
            self.found.dropout = options["p"] if options["training"] == "training" else ""
        elif not options:
            self.found.dropout = self.source.attribute(node.func)
        return bool(self.found.dropout) and _same(node.args[0], self.probabilities)

    def _ends(self, statement: Any) -> bool:
        """Whether the statement has the product of probabilities and values. It has the call then."""
        for node in ast.walk(statement) if _target(statement) else ():
            for place, inner in ast.iter_fields(node):
                left, value, flat = self._product(inner)
                if isinstance(value, ast.Name) and _same(left, self.probabilities) and flat == self.found.flat:
                    setattr(node, place, ast.Constant(None))
                    if _mentions(statement.value, self.probabilities | self.names):
                        raise _Unknown
                    given = *self.vectors, value, _name(self.scores), self._scale(), ast.Constant(self.found.dropout)
                    call = _call(CALL, "end", _name(self.source.own), *given)
                    setattr(node, place, ast.copy_location(call, inner))
                    return True
        return False

    def _scale(self) -> Any:
        scale: Any = ast.Constant(1.0)
        for operator, by in self.scales:
            scale = ast.BinOp(scale, operator, by)
        return scale


def _check_handed_on(statements: list[Any], names: set[str]) -> None:
    """These names may only be places of a tuple."""
    inside = [node for statement in statements for node in ast.walk(statement)]
    handed = {id(place) for node in inside if isinstance(node, ast.Tuple) for place in node.elts}
    if any(isinstance(node, ast.Name) and node.id in names and id(node) not in handed for node in inside):
        raise _Unknown


class _AsTheQueries(ast.NodeTransformer):
    """The scores' dtype and device are the queries'. What is expanded as the scores broadcasts anyway."""

    def __init__(self, scores: str, query: str):
        self.scores, self.query = {scores}, query

    def visit_Attribute(self, node: Any) -> Any:
        self.generic_visit(node)
        if node.attr in ("dtype", "device") and _same(node.value, self.scores):
            node.value = ast.copy_location(_name(self.query), node.value)
        return node

    def visit_Call(self, node: Any) -> Any:
        self.generic_visit(node)
        return node.func.value if _is_method(node, "expand_as") and _same(node.args[0], self.scores) else node


def _target(statement: Any) -> str:
    """The local name that a plain assignment gives a value; "" for other statements."""
    plain = isinstance(statement, ast.Assign) and len(statement.targets) == 1
    return statement.targets[0].id if plain and isinstance(statement.targets[0], ast.Name) else ""


def _mentions(node: Any, names: set[str]) -> bool:
    return any(isinstance(inner, ast.Name) and inner.id in names for inner in ast.walk(node))


def _bare(node: Any) -> Any:
    """What is reshaped, or changes its dtype."""
    while _is_method(node, *_RESHAPES):
        node = node.func.value
    return node


def _same(node: Any, names: set[str]) -> bool:
    """Whether this is one of the names, in another shape or dtype."""
    node = _bare(node)
    return isinstance(node, ast.Name) and node.id in names


def _is_method(node: Any, *names: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in names


def _is_none(node: Any) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _number(node: Any) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None


def _name(name: str) -> Any:
    return ast.Name(name, ast.Load())


def _call(of: Any, function: str, *arguments: Any) -> Any:
    """of.function(*arguments); `of` is a name or a node."""
    return ast.Call(ast.Attribute(_name(of) if isinstance(of, str) else of, function, ast.Load()), list(arguments), [])


def _assign(name: str, value: Any) -> Any:
    return ast.Assign([ast.Name(name, ast.Store())], value)
