"""Does fuse_ leave statements in line alone where a copy without them would compute something else, and code it cannot read?"""

import copy
import functools
import inspect
import tokenize

import pytest
import torch
import transformers as hf
from family_cases import FAMILIES
from hf_cases import T5, livened, tokens
from torch import nn

import pyfused
from pyfused.integrations.transformers import alike, config, statements
from pyfused.own_forward import is_fused


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.act, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8)


class TheNextRoundReadsTheMiddle(Layer):
    def forward(self, x):
        for _ in range(2):
            x = self.act(self.fc1(x))
            y = self.fc2(x)
        return y


class AWhileLoopReadsTheMiddle(Layer):
    def forward(self, x, times=2):
        while times:
            if times:
                x = self.act(self.fc1(x))
                y = self.fc2(x)
            times -= 1
        return y


class AddsToTheMiddle(Layer):
    def forward(self, x):
        hidden = self.act(self.fc1(x))
        x = self.fc2(hidden)
        hidden += 1.0
        return self.norm(x)


class LooksUpLocalNames(Layer):
    def forward(self, x):
        hidden = self.act(self.fc1(x))
        y = self.fc2(hidden)
        return y + locals()["hidden"]


class KeepsTheMiddle(Layer):
    def forward(self, x):
        global kept
        kept = self.act(self.fc1(x))
        x = self.fc2(kept)
        return self.norm(x)


class HasOurName(Layer):
    def forward(self, x, _pyfused=3.0):
        x = self.fc2(self.act(self.fc1(x)))
        return self.norm(x) * _pyfused


class LoopsOverANewMiddle(Layer):
    def forward(self, x):
        for _ in range(2):
            hidden = self.act(self.fc1(x))
            x = self.fc2(hidden)
        return self.norm(x)


def wrapped(around):
    """The forward of a class, in `around`(it), in a function that transformers' decorators could have made."""

    def decorate(forward):
        inner = around(forward)

        @functools.wraps(inner)
        def call(*args):
            return inner(*args)

        return call

    return decorate


class Callable:
    def __init__(self, forward):
        functools.update_wrapper(self, forward)

    def __call__(self, *args):
        return self.__wrapped__(*args)


def beside_an_empty_cell(forward):
    @functools.wraps(forward)
    def call(*args):
        return forward(*args) if args else never

    if not callable(forward):
        never = None
    return call


class InAPartial(Layer):
    @wrapped(lambda forward: functools.update_wrapper(functools.partial(forward), forward))
    def forward(self, x):
        x = self.fc2(self.act(self.fc1(x)))
        return self.norm(x)


class InAnObject(Layer):
    @wrapped(Callable)
    def forward(self, x):
        x = self.fc2(self.act(self.fc1(x)))
        return self.norm(x)


class BesideAnEmptyCell(Layer):
    @beside_an_empty_cell
    def forward(self, x):
        x = self.fc2(self.act(self.fc1(x)))
        return self.norm(x)


LEFT = [TheNextRoundReadsTheMiddle, AWhileLoopReadsTheMiddle, AddsToTheMiddle, LooksUpLocalNames, KeepsTheMiddle]
LEFT += [HasOurName, InAPartial, InAnObject]


@pytest.mark.parametrize("kind", [*LEFT, LoopsOverANewMiddle, BesideAnEmptyCell])
def test_statements_that_a_copy_needs(kind, pair):
    plain, fused, _ = pair(kind)
    assert is_fused(fused) == (kind not in LEFT)
    x = torch.randn(3, 8)
    torch.testing.assert_close(fused(x), plain(x))
    assert kind is not KeepsTheMiddle or torch.equal(kept, plain.act(plain.fc1(x)))


def test_a_file_that_changed_since(monkeypatch):
    """Python finds other lines than the function's: here the beginning of a text without end."""
    monkeypatch.setattr(inspect, "getsourcelines", lambda function: tokenize_one('    def f(self):\n        """'))
    statements._known.pop(LoopsOverANewMiddle.forward, None)
    assert statements.source_of(LoopsOverANewMiddle.forward) is None
    del statements._known[LoopsOverANewMiddle.forward]


def tokenize_one(text):
    lines = iter(text.splitlines(keepends=True))
    return list(tokenize.generate_tokens(lambda: next(lines, ""))), 1


def test_a_program_without_sources(monkeypatch):
    """As PyInstaller makes them: fuse_ says what it cannot compare."""

    def none(*args):
        raise OSError("could not get source code")

    models = [livened(hf.MT5Model(hf.MT5Config(**T5))), livened(hf.T5Model(hf.T5Config(**T5)))]
    caches = [alike._reason, config._source_of_class]
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setattr(inspect, "getsource", none)
    try:
        for plain in models:
            fused, ids = copy.deepcopy(plain), tokens(2, 7)
            report = pyfused.fuse_(fused)
            assert any("source" in entry.note and "cannot be read" in entry.note for entry in report.left)
            with torch.no_grad():
                states = [model(input_ids=ids, decoder_input_ids=ids)[0] for model in (fused, plain)]
            torch.testing.assert_close(*states, rtol=1e-4, atol=1e-4)
    finally:
        for cache in caches:
            cache.cache_clear()


CHILDREN = {
    "BART": ["activation_fn"],
    "BERT": ["intermediate_act_fn", "dropout"],
    "Llama": ["act_fn"],
    "GPT-NeoX": ["act"],
}


@pytest.mark.parametrize("family", CHILDREN)
def test_a_function_in_a_childs_place(family):
    """A module that became a plain function after fuse_: the class's own statements call it."""
    torch.manual_seed(0)
    build, inputs = FAMILIES[family]
    plain, given = livened(build()), inputs()
    fused = copy.deepcopy(plain)
    pyfused.fuse_(fused)
    changed = 0
    for module in (*plain.modules(), *fused.modules()):
        for name in () if "query" in module._modules else CHILDREN[family]:  # BERT reads that dropout.p
            if name in module._modules:
                delattr(module, name)
                setattr(module, name, torch.tanh)
                changed += 1
    assert changed
    for training in (False, True):
        torch.testing.assert_close(fused.train(training)(**given)[0], plain.train(training)(**given)[0])
