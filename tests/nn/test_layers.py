"""Do the modules replace torch.nn's? The same state dicts, values by the tolerance rule, and the residual."""

import copy

import pytest
import torch
from torch import nn

import pyfused
from pyfused import relative_bias
from pyfused.nn import (
    CAUSAL,
    CrossAttention,
    GatedMlp,
    KVCache,
    LayerNorm,
    Linear,
    Mlp,
    RelativeSelfAttention,
    ReversibleEmbedding,
    RMSNorm,
    SelfAttention,
    Visibility,
)
from pyfused.testing import assert_close


def both(mine, theirs, *inputs):
    """mine in float32, theirs in float32 and float64, with the same weights."""
    mine.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        plain = theirs(*inputs)
        truth = theirs.double()(*(t.double() for t in inputs))
        theirs.float()
        return mine(*inputs), plain, truth


def check_residual(mine, theirs, x):
    residual = torch.randn_like(x)
    y, total = mine(x, residual)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(y, theirs(x + residual))
    with pytest.raises(ValueError, match="residual has shape"):
        mine(x, residual[:1])
    with pytest.raises((ValueError, TypeError), match="has shape"):
        mine(x[..., :-1])


@pytest.mark.parametrize("options", [{}, {"elementwise_affine": False}, {"bias": False}], ids=str)
@pytest.mark.parametrize("shape", [24, (4, 6)])
@pytest.mark.parametrize("kind", [LayerNorm, RMSNorm])
def test_norms(kind, shape, options):
    if kind is RMSNorm and "bias" in options:
        return  # it has none
    theirs, mine = (made(shape, 1e-3, **options) for made in (getattr(nn, kind.__name__), kind))
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(3, 5, *((shape,) if isinstance(shape, int) else shape))
    assert_close(*both(mine, theirs, x))
    check_residual(mine, theirs, x)


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rms_norm_without_eps(dtype, autocast):
    """The numbers are so small that the epsilon decides: torch takes the epsilon of the dtype it computes in."""
    theirs = nn.RMSNorm(64, dtype=dtype)
    mine, fused = RMSNorm(64, dtype=dtype), copy.deepcopy(theirs)
    pyfused.fuse_(fused)
    x = (1e-4 * torch.randn(3, 64)).to(dtype)
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    truth = x.double() * (x.double().square().mean(-1, keepdim=True) + eps).rsqrt()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain = theirs(x)
        for module in (mine, fused):
            assert_close(module(x), plain, truth)


@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias):
    mine, theirs = Linear(24, 40, bias), nn.Linear(24, 40, bias)
    x, residual = torch.randn(3, 5, 24), torch.randn(3, 5, 40)
    assert_close(*both(mine, theirs, x))
    torch.testing.assert_close(mine(x, residual), theirs(x) + residual)


FEED_FORWARDS = {
    Mlp: {"inner.weight": (56, 24), "inner.bias": (56,), "outer.weight": (24, 56), "outer.bias": (24,)},
    GatedMlp: {"gate.weight": (56, 24), "up.weight": (56, 24), "outer.weight": (24, 56)},
}


@pytest.mark.parametrize(
    "activation, function",
    [("gelu_new", nn.GELU("tanh")), ("gelu", nn.GELU()), ("relu", nn.ReLU()), ("silu", nn.SiLU()), ("tanh", nn.Tanh())],
)
@pytest.mark.parametrize("kind", FEED_FORWARDS)
def test_feed_forward(kind, activation, function):
    mine = kind(24, 56, activation)
    assert {k: tuple(v.shape) for k, v in mine.state_dict().items()} == FEED_FORWARDS[kind]

    def plain(x):
        held = {name: t.to(x.dtype) for name, t in mine.state_dict().items()}
        if kind is GatedMlp:
            hidden = function(x @ held["gate.weight"].t()) * (x @ held["up.weight"].t())
            return hidden @ held["outer.weight"].t()
        hidden = function(nn.functional.linear(x, held["inner.weight"], held["inner.bias"]))
        return nn.functional.linear(hidden, held["outer.weight"], held["outer.bias"])

    x, residual = torch.randn(3, 5, 24), torch.randn(3, 5, 24)
    with torch.no_grad():
        assert_close(mine(x), plain(x), plain(x.double()))
        torch.testing.assert_close(mine(x, residual), plain(x) + residual)
    with pytest.raises(ValueError, match="activation='swiglu'"):
        kind(24, 56, "swiglu")


@pytest.mark.parametrize("kind", [Mlp, GatedMlp])
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "quick_gelu", "silu", "tanh"])
def test_dropout_inside_a_feed_forward_network(kind, activation, monkeypatch):
    """Training drops values after the activation; if it drops nothing, the result is the operator's."""
    mine, x, residual = kind(24, 56, activation, dropout=0.5), torch.randn(30, 24), torch.randn(30, 24)
    expected = mine.eval()(x, residual)
    dropped = mine.train()(x, residual)
    assert not torch.equal(dropped, mine(x, residual))
    shapes = []
    monkeypatch.setattr(nn.functional, "dropout", lambda y, p: shapes.append((tuple(y.shape), p)) or y)
    torch.testing.assert_close(mine(x, residual), expected)
    assert shapes == [((30, 56), 0.5)]


class Adapted(nn.Module):
    """As LoRA's layers: beside the layer that it holds it adds something, and it shows the weight and bias of that layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.adapter = layer, nn.Linear(layer.in_features, layer.out_features)

    def forward(self, x):
        return self.layer(x) + self.adapter(x)

    weight, bias = property(lambda self: self.layer.weight), property(lambda self: self.layer.bias)


@pytest.mark.parametrize("how", ["replaced", "hooked"])
@pytest.mark.parametrize("place", ["gate", "up", "inner", "outer"])
@pytest.mark.parametrize("kind", [Mlp, GatedMlp])
def test_a_layer_of_a_feed_forward_network_that_was_changed(kind, place, how):
    """It is called: its weight is not all that it computes."""
    changed = kind(24, 56, "relu")
    if not hasattr(changed, place):
        pytest.skip(f"a {kind.__name__} has no {place}")
    layer, x, residual = getattr(changed, place), torch.randn(3, 24), torch.randn(3, 24)
    adapted = Adapted(layer)
    merged = copy.deepcopy(changed)
    with torch.no_grad():
        for name in ("weight", "bias"):
            if getattr(layer, name) is not None:
                getattr(getattr(merged, place), name).add_(getattr(adapted.adapter, name))
    if layer.bias is None:
        adapted.adapter.bias = None
    if how == "replaced":
        setattr(changed, place, adapted)
    else:
        layer.register_forward_hook(lambda module, given, found: found + adapted.adapter(given[0]))
    for more in ((), (residual,)):
        torch.testing.assert_close(changed(x, *more), merged(x, *more))
    changed(x).sum().backward()
    assert adapted.adapter.weight.grad is not None
    for module in (changed, merged, adapted):
        module.half()
    found, expected = (module(x.half(), residual, wide=True) for module in (changed, merged))
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


def test_reversible_embedding():
    mine, theirs = ReversibleEmbedding(11, 6), nn.Embedding(11, 6)
    mine.load_state_dict(theirs.state_dict())
    ids, hidden = torch.tensor([[1, 10], [0, 3]]), torch.randn(2, 3, 6)
    assert torch.equal(mine(ids), theirs(ids))
    torch.testing.assert_close(mine(hidden, reverse=True), hidden @ theirs.weight.t())
    untied = ReversibleEmbedding(11, 6, tie_weights=False)
    assert {k: tuple(v.shape) for k, v in untied.state_dict().items()} == {"weight": (11, 6), "reverse_weight": (11, 6)}


@pytest.mark.parametrize("head_size", [None, 5])
def test_self_attention_is_torchs(head_size):
    mine = SelfAttention(24, 4, head_size, scale=0.3)
    d = mine.head_size
    assert mine.query_key_value.weight.shape == (3 * 4 * d, 24)
    assert mine.output.weight.shape == (24, 4 * d)
    x = torch.randn(2, 7, 24)
    probabilities = []
    out = mine(x, CAUSAL, probabilities=probabilities)
    q, k, v = (t.unflatten(-1, (4, d)).transpose(1, 2) for t in mine.query_key_value(x).chunk(3, -1))
    expected = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
    torch.testing.assert_close(out, mine.output(expected.transpose(1, 2).flatten(2)))
    torch.testing.assert_close((probabilities[0] @ v), expected)


def test_t5_attention_adds_its_table_or_the_one_it_is_handed():
    first = RelativeSelfAttention(24, 4, 5, bidirectional=True, num_buckets=8, max_distance=9)
    second = RelativeSelfAttention(24, 4, 5, bidirectional=True)
    names = {"query_key_value.weight", "output.weight"}
    assert set(dict(second.named_parameters())) == names
    assert set(dict(first.named_parameters())) == names | {"relative_bias"}
    assert second.position_bias() is None
    table = first.position_bias()
    bias = relative_bias(table.table, 7, 7, bidirectional=True, max_distance=9)
    x = torch.randn(2, 7, 24)
    for mine, visible in ((first, Visibility()), (second, Visibility(relative_bias=table))):
        q, k, v = (t.unflatten(-1, (4, 5)).transpose(1, 2) for t in mine.query_key_value(x).chunk(3, -1))
        expected = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        probabilities = []
        torch.testing.assert_close(
            mine(x, visible, probabilities=probabilities), mine.output(expected.transpose(1, 2).flatten(2))
        )
        torch.testing.assert_close(probabilities[0] @ v, expected)
    with pytest.raises(ValueError, match="max_distance is 2"):
        RelativeSelfAttention(24, 4, bidirectional=True, num_buckets=8, max_distance=2)


def test_cross_attention_is_torchs():
    mine = CrossAttention(24, 4)
    x, memory = torch.randn(2, 7, 24), torch.randn(2, 3, 24)
    out = mine(x, mine.project(memory))
    q = mine.query(x).unflatten(-1, (4, 6)).transpose(1, 2)
    k, v = (t.unflatten(-1, (4, 6)).transpose(1, 2) for t in mine.key_value(memory).chunk(2, -1))
    expected = nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(out, mine.output(expected.transpose(1, 2).flatten(2)))


def test_kv_cache_writes_where_it_should():
    cache = KVCache(1, 2, 3, 8, 4, dtype=torch.float32, device="cpu")
    first, second = torch.randn(2, 5, 2, 3, 4), torch.randn(2, 1, 2, 3, 4)
    key, value = cache.append(0, first)
    assert torch.equal(key, first[:, :, 0].transpose(1, 2))
    assert torch.equal(value, first[:, :, 1].transpose(1, 2))
    cache.length = 5
    cache.at_positions(torch.tensor([2, 5]), 6)
    key, value = cache.append(0, second)
    assert key.shape == (2, 3, 6, 4)
    for row, place in ((0, 2), (1, 5)):
        assert torch.equal(key[row, :, place], second[row, 0, 0])
        assert torch.equal(value[row, :, place], second[row, 0, 1])
    assert torch.equal(key[0, :, 3:5], first[0, 3:5, 0].transpose(0, 1))
    cache.select(torch.tensor([1]))
    cache.positions = None
    cache.length = 6
    assert cache.batch_size == 1
    assert torch.equal(cache.keys(0)[0, :, 5], second[1, 0, 0])
    assert torch.equal(cache.values(0)[0, :, :5], first[1, :, 1].transpose(0, 1))
