"""Do modules take a batch of 0 and a length of 0? torch.nn drop-ins do as torch.nn. Other modules give empty results, or their
results without any key, and zero gradients."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import pyfused
from pyfused.nn import (
    CrossAttention,
    Embedding,
    FeedForward,
    FourierMixing,
    GatedFeedForward,
    GatedMlp,
    KVCache,
    LayerNorm,
    Linear,
    Mlp,
    MultiheadAttention,
    RelativeSelfAttention,
    ReversibleEmbedding,
    RMSNorm,
    SelfAttention,
    T5Attention,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
)
from pyfused.nn.packing import packing_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [(0, 4), (3, 0), (0, 0)]
WIDTH, HEADS = 32, 4
each_size = pytest.mark.parametrize(("b", "s"), SIZES)


def new(*shape):
    return torch.randn(shape, device=DEVICE, requires_grad=True)


def run(module, *inputs, **options):
    """The result, and the gradients of inputs and parameters by name; zeros for unused ones."""
    module.zero_grad()
    inputs = [t.detach().requires_grad_() if t.is_floating_point() else t for t in inputs]
    y = module(*inputs, **options)
    y = y[0] if isinstance(y, tuple) else y
    y.sum().backward()
    leaves = {str(i): t for i, t in enumerate(inputs) if t.is_floating_point()} | dict(module.named_parameters())
    return y.detach(), {n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in leaves.items()}


def t5_attention():
    sizes = {"d_model": WIDTH, "d_kv": 8, "num_heads": HEADS, "dropout_rate": 0.0, "is_decoder": False}
    buckets = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20}
    return T5Attention(SimpleNamespace(**sizes, **buckets), has_relative_attention_bias=True)


ALONE = {
    "SelfAttention": lambda: SelfAttention(WIDTH, HEADS),
    "RelativeSelfAttention": lambda: RelativeSelfAttention(
        WIDTH, HEADS, bidirectional=True, num_buckets=8, max_distance=20
    ),
    "T5Attention": t5_attention,
    "Mlp": lambda: Mlp(WIDTH, 64),
    "GatedMlp": lambda: GatedMlp(WIDTH, 64, dropout=0.1),
    "FeedForward": lambda: FeedForward(WIDTH, 64, dropout=0.1),
    "GatedFeedForward": lambda: GatedFeedForward(WIDTH, 64),
    "FourierMixing": FourierMixing,
    "Embedding": lambda: Embedding(10, WIDTH),
    "ReversibleEmbedding": lambda: ReversibleEmbedding(10, WIDTH),
}


@each_size
@pytest.mark.parametrize("name", ALONE)
def test_empty_results_and_zero_gradients(name, b, s):
    if name == "FourierMixing" and s == 0:
        pytest.skip("torch.fft refuses a length of 0, and so does fourier_mix")
    module = ALONE[name]().to(DEVICE)
    x = torch.zeros(b, s, dtype=torch.int64, device=DEVICE) if "Embedding" in name else new(b, s, WIDTH)
    y, gradients = run(module, x)
    assert y.shape == (b, s, WIDTH)
    assert all((g == 0).all() for g in gradients.values())


@pytest.mark.parametrize("memory", [0, 5])
@pytest.mark.parametrize(("b", "s"), [*SIZES, (3, 4)])
def test_cross_attention(b, s, memory):
    """Without memory it gives its output projection of zeros."""
    module = CrossAttention(WIDTH, HEADS).to(DEVICE)
    x, seen = new(b, s, WIDTH), new(b, memory, WIDTH)
    y = module(x, module.project(seen))
    assert y.shape == x.shape
    y.sum().backward()
    if memory == 0:
        torch.testing.assert_close(y, module.output.bias.expand_as(y))
    if memory == 0 or 0 in (b, s):
        assert not x.grad.any()
        assert not seen.grad.any()


PAIRS = {
    "LayerNorm": (nn.LayerNorm, LayerNorm, (WIDTH,), {}),
    "RMSNorm": (nn.RMSNorm, RMSNorm, (WIDTH, 1e-5), {}),
    "LayerNorm of no features": (nn.LayerNorm, LayerNorm, (0,), {}),
    "RMSNorm of no features": (nn.RMSNorm, RMSNorm, (0, 1e-5), {}),
    "Linear": (nn.Linear, Linear, (WIDTH, 8), {}),
    "MultiheadAttention": (nn.MultiheadAttention, MultiheadAttention, (WIDTH, HEADS), {"batch_first": True}),
    "MultiheadAttention length first": (nn.MultiheadAttention, MultiheadAttention, (WIDTH, HEADS), {}),
    "TransformerEncoderLayer": (
        nn.TransformerEncoderLayer, TransformerEncoderLayer, (WIDTH, HEADS, 64, 0.0), {"batch_first": True}),
    "TransformerDecoderLayer": (
        nn.TransformerDecoderLayer, TransformerDecoderLayer, (WIDTH, HEADS, 64, 0.0), {"batch_first": True}),
}  # fmt: skip


@each_size
@pytest.mark.parametrize("name", PAIRS)
def test_as_torch_nn(name, b, s):
    """Both the drop-ins and torch's own modules after fuse_."""
    theirs, ours, arguments, options = PAIRS[name]
    module = theirs(*arguments, **options).to(DEVICE)
    width = 0 if "no features" in name else WIDTH
    calls = [([new(b, s, width)], {})]
    if theirs is nn.MultiheadAttention:
        x = new(b, s, width) if options else new(s, b, width)
        calls = [([x, x, x], {"need_weights": need}) for need in (True, False)]
        if options:
            calls.append(([new(b, 3, width), x, x], {"need_weights": False}))
    if theirs is nn.TransformerDecoderLayer:
        calls = [([new(b, 3, width), new(b, s, width)], {}), ([new(b, s, width), new(b, 3, width)], {})]
    drop_in = ours(*arguments, **options).to(DEVICE)
    drop_in.load_state_dict(module.state_dict())
    fused = nn.Sequential(copy.deepcopy(module))
    assert pyfused.fuse_(fused) or theirs is nn.Linear
    fused = fused[0]
    for inputs, keywords in calls:
        expected, expected_gradients = run(module, *inputs, **keywords)
        for candidate in (drop_in, fused):
            found, gradients = run(candidate, *inputs, **keywords)
            torch.testing.assert_close(found, expected)
            for key, value in expected_gradients.items():
                torch.testing.assert_close(gradients[key], value, msg=lambda text, key=key: f"{key}: {text}")


@each_size
def test_fused_transformer_encoder(b, s):
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, 0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).to(DEVICE)
    x, padding = new(b, s, WIDTH), torch.zeros(b, s, dtype=torch.bool, device=DEVICE)
    for training in (True, False):
        model.train(training)
        expected, _ = run(model, x)
        pyfused.fuse_(model)
        torch.testing.assert_close(run(model, x)[0], expected)
        assert run(model, x, src_key_padding_mask=padding)[0].shape == x.shape
        pyfused.unfuse_(model)


def test_a_cache_of_no_rows_and_no_new_tokens():
    cache = KVCache(1, 0, HEADS, 6, 8, dtype=torch.float32, device=DEVICE)
    key, value = cache.append(0, new(0, 3, 2, HEADS, 8).detach())
    assert key.shape == value.shape == (0, HEADS, 3, 8)
    cache = KVCache(1, 2, HEADS, 6, 8, dtype=torch.float32, device=DEVICE)
    key, value = cache.append(0, new(2, 0, 2, HEADS, 8).detach())
    assert key.shape == value.shape == (2, HEADS, 0, 8)


@each_size
def test_nothing_to_pack(b, s):
    assert packing_of(torch.ones(b, s, dtype=torch.bool, device=DEVICE)) is None
