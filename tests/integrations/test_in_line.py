"""Is a feed-forward that stands in line among a layer's statements fused where it surely is one, and left alone elsewhere?"""

import copy
import functools
import types

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from family_cases import FAMILIES
from fused_pairs import Trio, check_same_in_training, counted, gradients
from hf_cases import BART, livened, tokens
from torch import nn

import pyfused
from pyfused.integrations.transformers import shaped

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


FUSED = [Layer, Gated, InOneBranch, Doubled]
LEFT = [ReadsTheMiddle, AddsTheMiddle, DoublesTheMiddle, DropsByANumber, DropsByAnotherFunction, Replaced]


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
        check_same_in_training(fused, plain, x, **options)
    assert calls == {"ffn": {Layer: 2, Doubled: 2, InOneBranch: 1}.get(kind, 0), "gated_ffn": 4 if kind is Gated else 0}


def test_dropout_in_training(pair, monkeypatch):
    """Dropout behind the second product leaves the products fused. Inside, it does not."""
    plain, fused, _ = pair(Layer)
    calls = counted(monkeypatch, shaped, "ffn")
    for inside, behind, count in ((0.0, 0.5, 1), (0.5, 0.0, 0), (0.5, 0.5, 0), (0.0, 0.0, 1)):
        before = calls["ffn"]
        for module in (fused, plain):
            module.inside, module.behind = inside, behind
        check_same_in_training(fused, plain, torch.ones(5, 8))
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
