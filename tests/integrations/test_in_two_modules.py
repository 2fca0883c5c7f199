"""Is a feed-forward fused whose two products stand in two modules of a layer, with the residual beside them or behind?"""

import math

import pytest
import torch
import torch.nn.functional as F
from fused_pairs import check_same_in_training, counted
from torch import nn

from pyfused.integrations.transformers import shaped


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


def test_a_pair_with_a_residual_beside_its_input(pair, monkeypatch):
    plain, fused, report = pair(Pair, Inner, Outer)
    calls = counted(monkeypatch, shaped, "ffn", "linear")
    notes = {entry.name: entry.note for entry in report.replaced}
    assert notes["0"] == "as it is; the feed-forward in it is pyfused.ffn"
    assert notes["0.outer"] == "pyfused.linear with the residual"

    def check(ffn, linear):
        before = dict(calls)
        check_same_in_training(fused, plain, torch.linspace(-2.0, 2.0, 24).view(3, 8), scale=0.5)
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
    plain, fused, report = pair(type("Tomorrow", (kind,), {"first": inner}), inner, Outer, OuterAlone)
    assert any(entry.name == "0" and "pyfused.ffn" in entry.note for entry in report.replaced)
    calls, seen = counted(monkeypatch, shaped, "ffn"), []

    def check(count):
        before = calls["ffn"]
        check_same_in_training(fused, plain, torch.linspace(-2.0, 2.0, 24).view(3, 8))
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
def test_almost_halves_are_named(inner, pair):
    plain, fused, report = pair(type("Tomorrow", (BehindNorm,), {"first": inner}), inner)
    assert [entry.note for entry in report.left if entry.name == "0"] == ["of no shape that fuse_ knows"]
    x = torch.randn(3, 8)
    torch.testing.assert_close(fused(x), plain(x))
