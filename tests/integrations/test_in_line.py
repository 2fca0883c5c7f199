"""Is a feed-forward that stands in line among a layer's statements fused where it surely is one, and left alone elsewhere?"""

import copy
import functools
import math
import pickle
import types

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from family_cases import FAMILIES
from fused_pairs import Trio, counted, gradients, vary
from hf_cases import BART, BERT, livened, tokens
from torch import nn

import pyfused
from pyfused.integrations.transformers import shaped, shapes
from pyfused.own_forward import is_fused

IN_LINE = ["BART", "Marian", "Whisper", "OPT"]


class Layer(nn.Module):
    """A layer as transformers may add it tomorrow."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.up = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 16, bias=False)
        self.act, self.norm, self.inside, self.behind = nn.GELU(), nn.LayerNorm(8), 0.0, 0.0

    def forward(self, x, scale=1.0, *, shift=0.0):
        residual = x
        x = self.norm(x) * scale
        x = self.act(self.fc1(x))
        x = F.dropout(x, p=self.inside, training=self.training)
        x = self.fc2(x)
        x = nn.functional.dropout(x, p=self.behind, training=self.training)
        x = residual + x
        if x.dtype == torch.bfloat16:
            x = x.clamp(-0.5, 0.5)
        return x + shift


class Gated(Layer):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False)

    def forward(self, x, times=2):
        for _ in range(times):
            gate = self.act(self.fc1(x))
            x = x + self.fc2(gate * self.up(x))
        return x, times


class InOneBranch(Layer):
    def forward(self, x):
        if x.sum() > 0.0:
            hidden = self.fc1(x)
            hidden = self.act(hidden)
            x = self.fc2(hidden)
        else:
            x = self.norm(x)
        return x


class ReadsTheMiddle(Layer):
    def forward(self, x):
        hidden = self.act(self.fc1(x))
        x = self.fc2(hidden)
        return x * hidden.sum()


class AddsTheMiddle(Layer):
    def __init__(self):
        super().__init__()
        self.fc1 = self.fc2 = nn.Linear(8, 8)

    def forward(self, x):
        x = self.act(self.fc1(x))
        x = self.fc2(x) + x
        return self.norm(x)


class DoublesTheMiddle(Layer):
    def forward(self, x):
        x = self.act(self.fc1(x)) * 2.0
        x = self.fc2(x)
        return self.norm(x)


class DropsByANumber(Layer):
    def forward(self, x):
        x = self.act(self.fc1(x))
        x = F.dropout(x, p=0.5, training=self.training)
        x = self.fc2(x)
        return self.norm(x)


other = types.SimpleNamespace(dropout=lambda x, p, training: x * 3.0)


class DropsByAnotherFunction(Layer):
    def forward(self, x):
        x = self.act(self.fc1(x))
        x = other.dropout(x, p=self.inside, training=self.training)
        x = self.fc2(x)
        return self.norm(x)


def doubled(forward):
    @functools.wraps(forward)
    def call(*args):
        return forward(*args) * 2.0

    return call


class Doubled(Layer):
    @doubled
    def forward(self, x):
        x = self.fc2(self.act(self.fc1(x)))
        return self.norm(x)


def renamed(forward):
    return lambda self, x: forward(self, x) * 2.0


class Replaced(Layer):
    @renamed
    def forward(self, x):
        x = self.fc2(self.act(self.fc1(x)))
        return self.norm(x)


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.act = nn.Linear(8, 16), nn.GELU()

    def forward(self, x):
        return self.act(self.dense(x))


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.dropout = nn.Linear(16, 8), nn.Dropout(0.0)

    def forward(self, x, residual):
        x = self.dropout(self.dense(x))
        return x + residual


class Pair(nn.Module):
    """Two modules, and a residual beside their input."""

    first = Inner

    def __init__(self):
        super().__init__()
        self.norm, self.inner, self.outer = nn.LayerNorm(8), self.first(), Outer()

    def forward(self, x, scale=1.0):
        y = self.norm(x) * scale
        y = self.inner(y)
        y = self.outer(y, x)
        return y


class OuterAlone(Outer):
    def forward(self, x):
        return self.dropout(self.dense(x))


class Halves(Pair):
    """As Swin's kin have it: the second module does not add the residual."""

    def __init__(self):
        super().__init__()
        self.outer = OuterAlone()

    def forward(self, x):
        y = self.norm(x)
        y = self.inner(y)
        y = x + self.outer(y)
        return y


class Written(Inner):
    """ESM's gelu."""

    def forward(self, x):
        x = self.dense(x)
        return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


class Called(Inner):
    def forward(self, x):
        return F.gelu(self.dense(x), approximate="tanh")


class CalledPlainly(Inner):
    def forward(self, x):
        return F.silu(self.dense(x))


class AlmostWritten(Inner):
    def forward(self, x):
        x = self.dense(x)
        return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(3.0)))


class OfTwo(Inner):
    def forward(self, x):
        return self.dense(x) * 0.5 * (1.0 + torch.erf(self.dense(x + 1.0) / math.sqrt(2.0)))


class BehindNorm(Pair):
    """As ESM and Megatron-BERT have it."""

    def forward(self, x):
        return self.feed_forward_chunk(x)

    def feed_forward_chunk(self, x):
        return self.outer(self.inner(self.norm(x)), x)


FUSED = [Layer, Gated, InOneBranch, Doubled]
LEFT = [ReadsTheMiddle, AddsTheMiddle, DoublesTheMiddle, DropsByANumber, DropsByAnotherFunction, Replaced]


@pytest.fixture
def pair(monkeypatch):
    """A function of a class: two such modules as if of transformers, plain and fused, and the report."""

    def make(kind):
        monkeypatch.setattr(kind.forward, "__module__", "transformers.models.tomorrow.modeling_tomorrow")
        plain = vary(kind())
        fused = copy.deepcopy(plain)
        pooler = hf.models.bert.modeling_bert.BertPooler(hf.BertConfig(**{**BERT, "hidden_size": 8}))
        return plain, fused, pyfused.fuse_(nn.Sequential(fused, pooler))  # with the pooler the library is in use

    return make


def same(fused, plain, *args, **options):
    """Checks that both give the same in training, with the same random numbers."""
    outputs = []
    for module in (fused.train(), plain.train()):
        torch.manual_seed(0)
        outputs.append(module(*args, **options))
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("kind", [*FUSED, *LEFT])
def test_layers_of_tomorrow(kind, pair, monkeypatch):
    plain, fused, report = pair(kind)
    calls = counted(monkeypatch, shaped, "ffn", "gated_ffn")
    notes = {entry.name: entry.note for entry in (*report.replaced, *report.left)}
    operator = "gated_ffn" if kind is Gated else "ffn"
    in_line = f"as it is; the feed-forward in it is pyfused.{operator}"
    assert notes["0"] == (in_line if kind in FUSED else "of no shape that fuse_ knows")
    options = {"scale": 0.5, "shift": 2.0} if kind is Layer else {}
    for x in (torch.rand(3, 8), -torch.rand(2, 3, 8)):
        same(fused, plain, x, **options)
    assert calls == {"ffn": {Layer: 2, Doubled: 2, InOneBranch: 1}.get(kind, 0), "gated_ffn": 4 if kind is Gated else 0}


def test_dropout_in_training(pair, monkeypatch):
    """Dropout behind the second product leaves the products fused. Inside, it does not."""
    plain, fused, _ = pair(Layer)
    calls = counted(monkeypatch, shaped, "ffn")
    for inside, behind, count in ((0.0, 0.5, 1), (0.5, 0.0, 0), (0.5, 0.5, 0), (0.0, 0.0, 1)):
        before = calls["ffn"]
        for module in (fused, plain):
            module.inside, module.behind = inside, behind
        same(fused, plain, torch.ones(5, 8))
        assert calls["ffn"] - before == count


def test_changes_after_fusing_count(pair, monkeypatch):
    plain, fused, _ = pair(Layer)
    x, seen = torch.randn(3, 8), []
    for name in ("fc1", "act", "fc2"):
        handle = fused._modules[name].register_forward_hook(lambda *_: seen.append(1))
        torch.testing.assert_close(fused(x), plain(x))
        assert seen.pop() == 1
        handle.remove()
    for module in (plain, fused):
        module.act = nn.Sigmoid()
    torch.testing.assert_close(fused(x), plain(x))
    torch.testing.assert_close(
        fused(x.bfloat16().float(), torch.ones(2, 1, 1)), plain(x.bfloat16().float(), torch.ones(2, 1, 1))
    )
    monkeypatch.setattr(Layer, "forward", lambda self, x: x * 3.0)
    assert torch.equal(fused(x), x * 3.0)


def test_a_pair_with_a_residual_beside_its_input(pair, monkeypatch):
    for part in (Inner, Outer):
        monkeypatch.setattr(part.forward, "__module__", "transformers.models.tomorrow.modeling_tomorrow")
    plain, fused, report = pair(Pair)
    calls = counted(monkeypatch, shaped, "ffn", "linear")
    notes = {entry.name: entry.note for entry in report.replaced}
    assert notes["0"] == "as it is; the feed-forward in it is pyfused.ffn"
    assert notes["0.outer"] == "pyfused.linear with the residual"

    def check(ffn, linear):
        before = dict(calls)
        same(fused, plain, torch.linspace(-2.0, 2.0, 24).view(3, 8), scale=0.5)
        assert {name: count - before[name] for name, count in calls.items()} == {"ffn": ffn, "linear": linear}

    check(1, 0)
    handle = fused.inner.register_forward_hook(lambda module, args, out: None)
    check(0, 1)
    handle.remove()
    for module in (plain, fused):
        module.outer.dropout.p = 0.5
    check(0, 0)
    for module in (plain, fused):
        module.outer.dropout.p, module.inner = 0.0, nn.Sequential(nn.Linear(8, 16), nn.Tanh())
    plain.inner.load_state_dict(fused.inner.state_dict())
    check(0, 1)


@pytest.mark.parametrize("kind", [Halves, BehindNorm])
@pytest.mark.parametrize("inner", [Inner, Written, Called, CalledPlainly])
def test_halves(kind, inner, pair, monkeypatch):
    """Without the sum in the second one, behind a norm, with a function as the activation."""
    for part in (inner, Outer, OuterAlone):
        monkeypatch.setattr(part.forward, "__module__", "transformers.models.tomorrow.modeling_tomorrow")
    plain, fused, report = pair(type("Tomorrow", (kind,), {"first": inner}))
    assert any(entry.name == "0" and "pyfused.ffn" in entry.note for entry in report.replaced)
    calls, seen = counted(monkeypatch, shaped, "ffn"), []

    def check(count):
        before = calls["ffn"]
        same(fused, plain, torch.linspace(-2.0, 2.0, 24).view(3, 8))
        assert calls["ffn"] - before == count

    check(1)
    for name in ("norm", "inner", "outer", "outer.dropout", "inner.dense"):
        handles = [m.get_submodule(name).register_forward_hook(lambda *_: seen.append(1)) for m in (fused, plain)]
        check(name == "norm")
        assert len(seen) == 2
        seen.clear()
        for handle in handles:
            handle.remove()
    for module in (plain, fused):
        module.outer.dropout.p = 0.5
    check(0)
    for module in (plain, fused):
        module.outer.dropout.p = 0.0
        module.norm = module.norm.double()
        module.norm.register_forward_pre_hook(lambda module, args: (args[0].double(),))
        module.norm.register_forward_hook(lambda module, args, out: out.float())
    check(1)


@pytest.mark.parametrize("inner", [AlmostWritten, OfTwo])
def test_almost_halves_are_named(inner, pair, monkeypatch):
    monkeypatch.setattr(inner.forward, "__module__", "transformers.models.tomorrow.modeling_tomorrow")
    plain, fused, report = pair(type("Tomorrow", (BehindNorm,), {"first": inner}))
    assert [entry.note for entry in report.left if entry.name == "0"] == ["of no shape that fuse_ knows"]
    x = torch.randn(3, 8)
    torch.testing.assert_close(fused(x), plain(x))


def test_the_clamp_of_half_precision_stays(pair):
    _, fused, _ = pair(Layer)
    y = fused.bfloat16()(torch.full((3, 8), 9.0, dtype=torch.bfloat16))
    assert torch.equal(y, torch.full_like(y, 0.5))


def test_nothing_is_left_on_a_layer(pair):
    plain, fused, _ = pair(Layer)
    assert set(vars(fused)) == set(vars(plain))
    assert "_pyfused" not in globals()
    _, forward = shaped._in_line[Layer]
    assert forward.__code__.co_filename == __file__  # tracebacks show the class's own lines
    pyfused.unfuse_(fused)
    assert type(fused.__dict__) is dict


@functools.cache
def model(name):
    torch.manual_seed(0)
    return livened(FAMILIES[name][0]())


@pytest.mark.parametrize("name", IN_LINE)
def test_gradients(name):
    torch.manual_seed(1)
    trio = Trio(copy.deepcopy(model(name)))
    inputs = FAMILIES[name][1]()
    trio.check_gradients(lambda output: output[0].square().mean(), **inputs)

    def loss(of):
        return of(**inputs)[0].square().mean()

    kept = gradients(trio.fused, loss, reentrant=False)
    trio.fused.zero_grad()
    loss(trio.fused).backward()
    for name, parameter in trio.fused.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(kept[name], parameter.grad)


@pytest.mark.parametrize("name", ["BART", "Whisper"])
def test_half_precision(name):
    Trio(copy.deepcopy(model(name)), dtype=torch.float16).check(**FAMILIES[name][1]())


def test_fine_tuning_with_dropout():
    """The same random numbers: the losses of a few steps are those of the plain model."""
    config = hf.BartConfig(**{**BART, "dropout": 0.2, "activation_dropout": 0.2})
    torch.manual_seed(0)
    plain = hf.BartForConditionalGeneration(config).train()
    fused = copy.deepcopy(plain)
    pyfused.fuse_(fused)
    ids, losses = tokens(2, 9), []
    for trained in (fused, plain):
        torch.manual_seed(0)
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            loss = trained(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    torch.testing.assert_close(losses[:3], losses[3:])


GENERATING = {
    "BART": (hf.BartForConditionalGeneration, tokens),
    "Marian": (hf.MarianMTModel, tokens),
    "Whisper": (hf.WhisperForConditionalGeneration, lambda *_: torch.randn(2, 80, 40)),
    "OPT": (hf.OPTForCausalLM, tokens),
}


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", IN_LINE)
def test_generate(name, beams):
    torch.manual_seed(3)
    kind, inputs = GENERATING[name]
    plain = livened(kind(model(name).config))
    fused, given = copy.deepcopy(plain), inputs(2, 9)
    pyfused.fuse_(fused)
    options = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False}
    assert torch.equal(fused.generate(given, **options), plain.generate(given, **options))


def test_copies_pickles_and_checkpoints(tmp_path):
    fused = copy.deepcopy(model("OPT"))
    names = list(fused.state_dict())
    pyfused.fuse_(fused)
    inputs = FAMILIES["OPT"][1]()
    expected = fused(**inputs)[0]
    for clone in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        shapes._shapes.clear()  # as in a new process
        assert is_fused(clone.decoder.layers[0])
        assert torch.equal(clone(**inputs)[0], expected)
    fused.save_pretrained(tmp_path)
    loaded = hf.OPTModel.from_pretrained(tmp_path).eval()
    assert list(loaded.state_dict()) == names
    torch.testing.assert_close(loaded(**inputs)[0], expected)
