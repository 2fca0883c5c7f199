"""Can T5Attention, FeedForward, GatedFeedForward and FourierMixing replace transformers' modules? Compares configs, state
dicts, values, gradients and caches, alone and inside transformers' own T5."""

import copy

import draws
import pytest
import torch
from torch import nn
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    FNetConfig,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.fnet.modeling_fnet import FNetBasicFourierTransform
from transformers.models.t5 import modeling_t5

import pyfused.nn
from pyfused import RelativeBias, relative_bias
from pyfused.testing import assert_close

B, S, SK = 2, 7, 5


def config(implementation="sdpa", **options):
    sizes = {"d_model": 24, "d_kv": 5, "num_heads": 4, "d_ff": 40, "num_layers": 2, "vocab_size": 50}
    buckets = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 9}
    made = T5Config(**sizes, **buckets, **{"dropout_rate": 0.0, "decoder_start_token_id": 0, **options})
    made._attn_implementation = implementation
    return made


def twin(mine, theirs):
    """Both modules with the same new weights, and theirs in float64."""
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(0.0, 0.3)
    mine.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(mine.state_dict(), strict=True)
    return mine, theirs, copy.deepcopy(theirs).double()


def attentions(implementation="eager", table=True, is_decoder=False, **options):
    made = config(implementation, is_decoder=is_decoder)
    kinds = (pyfused.nn.T5Attention, modeling_t5.T5Attention)
    return twin(*(kind(made, has_relative_attention_bias=table, layer_idx=0, **options) for kind in kinds))


def compare(twins, run):
    """Judges values and all gradients of run(module, leaf, convert) -> output on a random (B, S, 24), by the tolerance rule."""
    draws.check_modules(twins, [torch.empty(B, S, 24)], lambda module, leaves, convert: run(module, *leaves, convert))


def additive(mask):
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


PADDING = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 0, 1, 1, 1, 1, 1]], dtype=torch.bool)[:, None, None]
CAUSAL = torch.ones(S, S, dtype=torch.bool).tril()


@pytest.mark.parametrize("is_decoder", [False, True])
@pytest.mark.parametrize("mask", ["none", "padding", "causal and padding", "float", "float by head"])
@pytest.mark.parametrize("bias", ["own table", "no table", "dense", "table of the first layer"])
def test_self_attention(bias, mask, is_decoder):
    implementation = "sdpa" if mask in ("none", "padding", "causal and padding") else "eager"
    twins = attentions(implementation, bias == "own table", is_decoder, is_causal=is_decoder)
    table = torch.randn(8, 4)
    given = {
        "none": None, "padding": PADDING, "causal and padding": PADDING & CAUSAL, "float": additive(PADDING & CAUSAL),
        "float by head": torch.randn(B, 4, S, S),
    }[mask]  # fmt: skip
    dense = relative_bias(table.double(), S, S, bidirectional=not is_decoder, max_distance=9)

    def run(module, leaf, convert):
        position_bias = None
        if bias == "dense":
            position_bias = dense.to(leaf.dtype)
        elif bias == "table of the first layer":
            ours = isinstance(module, pyfused.nn.T5Attention)
            position_bias = RelativeBias(table, not is_decoder, 9) if ours else dense.to(leaf.dtype)
        out, after, _ = module(leaf, mask=convert(given), position_bias=position_bias)
        if isinstance(module, pyfused.nn.T5Attention):
            if bias == "own table":
                assert isinstance(after, RelativeBias)
                assert after.table is module.relative_attention_bias.weight
            else:
                assert after is position_bias
        return out

    compare(twins, run)


@pytest.mark.parametrize("mask", [None, torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()[:, None, None]])
def test_cross_attention(mask):
    memory = torch.randn(B, SK, 24)

    def run(module, leaf, convert):
        return module(leaf, mask=mask, key_value_states=convert(memory))[0]

    compare(attentions("sdpa", False, True), run)


@pytest.mark.parametrize("kind", ["dynamic", "static", "encoder-decoder"])
def test_caches(kind):
    """A prompt, then tokens one by one: outputs and cache equal transformers'."""
    mine, theirs, _ = attentions("sdpa", True, True, is_causal=True)
    x = torch.randn(B, S, 24)
    steps, outs, caches = [3, 1, 1, 2], [], []
    for module in (mine, theirs):
        cache = {
            "dynamic": DynamicCache,
            "static": lambda module=module: StaticCache(config=module.config, max_cache_len=10),
            "encoder-decoder": lambda: EncoderDecoderCache(DynamicCache(), DynamicCache()),
        }[kind]()
        parts, start = [], 0
        for length in steps:
            end = start + length
            seen = torch.arange(10 if kind == "static" else end) <= torch.arange(start, end)[:, None]
            mask = seen[None, None].expand(B, 1, -1, -1)
            with torch.no_grad():
                parts.append(module(x[:, start:end], mask=mask, past_key_values=cache)[0])
            start = end
        outs.append(torch.cat(parts, 1))
        caches.append(cache.self_attention_cache if kind == "encoder-decoder" else cache)
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(caches[0].layers[0].keys, caches[1].layers[0].keys)


def test_a_table_that_is_handed_on_where_the_cache_has_room():
    """Given a table, the kernel would match the last key with the last query, so it gets the dense bias."""
    mine, theirs, _ = attentions("sdpa", False, True)
    x, table, outs = torch.randn(B, 3, 24), torch.randn(8, 4), []
    dense = relative_bias(table, 3, 10, bidirectional=False, max_distance=9)
    mask = (torch.arange(10) <= torch.arange(3)[:, None])[None, None].expand(B, 1, -1, -1)
    for module, bias in ((mine, RelativeBias(table, False, 9)), (theirs, dense)):
        cache = StaticCache(config=module.config, max_cache_len=10)
        outs.append(module(x, mask=mask, position_bias=bias, past_key_values=cache)[0])
    torch.testing.assert_close(*outs)


def test_a_cached_encoder_is_projected_once():
    mine, theirs, _ = attentions("sdpa", False, True)
    x, memory, outs = torch.randn(B, 1, 24), torch.randn(B, SK, 24), []
    for module in (mine, theirs):
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        module(x, key_value_states=memory, past_key_values=cache)
        outs.append(module(2 * x, key_value_states=torch.zeros_like(memory), past_key_values=cache)[0])
    torch.testing.assert_close(*outs)


def test_inside_autocast():
    """Errors against float64 match transformers' under the same autocast; the table stays float32."""
    mine, theirs, wide = attentions("sdpa", True, False)
    x = torch.randn(B, S, 24)
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual, plain = (m(x, mask=PADDING)[0] for m in (mine, theirs))
        assert_close(actual, plain, wide(x.double(), mask=PADDING)[0])


def test_probabilities_on_request():
    mine, theirs, _ = attentions("eager", True, False)
    x = torch.randn(B, S, 24)
    assert mine(x)[2] is None
    weights = mine(x, mask=PADDING, output_attentions=True)[2]
    torch.testing.assert_close(weights, theirs(x, mask=additive(PADDING))[2])


def test_dropout_of_the_probabilities():
    """The mean over many draws equals the result without dropout."""
    mine, _, _ = attentions("sdpa", True, False)
    x = torch.randn(1, S, 24).expand(2000, -1, -1)
    expected = mine(x[:1])[0]
    mine.dropout = 0.3
    out = mine.train()(x)[0]
    assert ((out.mean(0) - expected[0]).abs() < 6 * out.std(0) / 2000**0.5).all()
    torch.testing.assert_close(mine.eval()(x[:1])[0], expected)


def test_what_it_does_not_know_is_refused():
    mine, _, _ = attentions()
    x = torch.randn(B, S, 24)
    with pytest.raises(TypeError, match="cu_seq_lens_q"):
        mine(x, cu_seq_lens_q=torch.tensor([0, S]))
    with pytest.raises(ValueError, match=r"mask has shape \(2, 7\)"):
        mine(x, mask=torch.ones(B, S))
    assert torch.equal(mine(x, use_cache=True)[0], mine(x)[0])


@pytest.mark.parametrize("act", ["relu", "gelu_new", "silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("gated", [False, True])
def test_feed_forward(gated, act):
    made = config(dense_act_fn=act)
    made.dense_act_fn = act
    name, theirs = ("GatedFeedForward", "T5DenseGatedActDense") if gated else ("FeedForward", "T5DenseActDense")
    twins = twin(getattr(pyfused.nn, name)(made), getattr(modeling_t5, theirs)(made))
    compare(twins, lambda module, leaf, convert: module(leaf))
    ours = twins[0]
    compare(twins, lambda module, leaf, convert: module(leaf, leaf) if module is ours else module(leaf) + leaf)


@pytest.mark.parametrize("name", ["FeedForward", "GatedFeedForward"])
def test_feed_forward_by_hand(name):
    kind = getattr(pyfused.nn, name)
    mine, plain = kind(24, 40), getattr(pyfused.nn, "Mlp" if name == "FeedForward" else "GatedMlp")(24, 40)
    names = {"wi": "inner", "wi_0": "gate", "wi_1": "up", "wo": "outer"}
    plain.load_state_dict({names[k.split(".")[0]] + "." + k.split(".")[1]: v for k, v in mine.state_dict().items()})
    x = torch.randn(B, 24)
    assert torch.equal(mine(x), plain(x))
    with pytest.raises(TypeError, match="config is an int"):
        kind(24)
    with pytest.raises(TypeError, match=r"dropout is 0\.1 beside a config"):
        kind(config(), dropout=0.1)
    with pytest.raises(ValueError, match="activation='swiglu'"):
        kind(24, 40, "swiglu")


@pytest.mark.parametrize("name", ["FeedForward", "GatedFeedForward"])
def test_wo_may_stay_in_float32(name):
    """transformers keeps it so in a float16 model."""
    mine = getattr(pyfused.nn, name)(config())
    theirs = getattr(modeling_t5, "T5DenseActDense" if name == "FeedForward" else "T5DenseGatedActDense")(config())
    mine, theirs, _ = twin(mine, theirs)
    for module in (mine, theirs):
        module.bfloat16().wo.float()
    wide = copy.deepcopy(theirs).double()

    def once():
        x = torch.randn(B, S, 24).bfloat16()
        found = mine(x)
        assert found.dtype == torch.float32
        return {"output": (found, theirs(x), wide(x.double()))}

    draws.check(once)


@pytest.mark.parametrize("name", ["FeedForward", "GatedFeedForward"])
def test_dropout_inside_a_feed_forward_network(name):
    mine = getattr(pyfused.nn, name)(config(dropout_rate=0.3))
    x = torch.randn(1, 24).expand(2000, -1)
    out, expected = mine.train()(x), mine.eval()(x[:1])
    assert ((out.mean(0) - expected[0]).abs() < 6 * out.std(0) / 2000**0.5).all()


def test_fourier_mixing():
    x = torch.randn(B, S, 24)
    mine, theirs = pyfused.nn.FourierMixing(FNetConfig()), FNetBasicFourierTransform(FNetConfig())
    assert mine.state_dict() == theirs.state_dict()
    assert_close(mine(x), theirs(x)[0], theirs(x.double())[0])
    with pytest.raises(ValueError, match="use_tpu_fourier_optimizations"):
        pyfused.nn.FourierMixing(FNetConfig(use_tpu_fourier_optimizations=True))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_inside_transformers_own_t5(implementation, gated):
    """Replaces each counterpart by hand; the model's outputs, gradients and generated tokens do not change."""
    made = config(implementation, feed_forward_proj="gated-gelu" if gated else "relu")
    theirs = T5ForConditionalGeneration._from_config(made, attn_implementation=implementation).eval()
    mine = copy.deepcopy(theirs)
    for module in list(mine.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, modeling_t5.T5Attention):
                table = child.has_relative_attention_bias
                ours = pyfused.nn.T5Attention(child.config, table, child.layer_idx, child.is_causal)
            elif isinstance(child, (modeling_t5.T5DenseActDense, modeling_t5.T5DenseGatedActDense)):
                ours = (pyfused.nn.GatedFeedForward if gated else pyfused.nn.FeedForward)(made)
            else:
                continue
            setattr(module, name, ours.eval())
    mine.load_state_dict(theirs.state_dict(), strict=True)
    ids = torch.randint(1, 50, (B, S))
    inputs = {"input_ids": ids, "attention_mask": PADDING[:, 0, 0].long(), "labels": torch.randint(1, 50, (B, SK))}
    losses = [m(**inputs).loss for m in (mine, theirs)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for (name, p), q in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
    again = {name: p.grad for name, p in mine.named_parameters()}
    mine.zero_grad()
    mine.gradient_checkpointing_enable()
    mine.train()(**inputs).loss.backward()  # no dropout; a RelativeBias goes through the checkpoints
    for name, p in mine.named_parameters():
        torch.testing.assert_close(p.grad, again[name], msg=name)
    mine.gradient_checkpointing_disable()
    mine.eval()
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 2}
    # In float64 no rounding decides between two tokens.
    tokens = [m.double().generate(ids, attention_mask=inputs["attention_mask"], **options) for m in (mine, theirs)]
    assert torch.equal(*tokens)


def test_compiles_without_a_break():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (pyfused.nn.T5Attention(config(), table) for table in (True, False))
            self.feed_forward, self.gated = pyfused.nn.FeedForward(config()), pyfused.nn.GatedFeedForward(config())
            self.mix = pyfused.nn.FourierMixing()

        def forward(self, x, mask):
            y, bias, _ = self.first(x, mask=mask)
            y = y + self.second(y, mask=mask, position_bias=bias)[0]
            return self.mix(self.gated(self.feed_forward(y)))

    block = Block()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (S, S + 4):
            x, mask = torch.randn(B, length, 24, requires_grad=True), torch.ones(B, 1, 1, length, dtype=torch.bool)
            outs = [m(x, mask) for m in (block, compiled)]
            torch.testing.assert_close(*outs)
            grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in outs]
            torch.testing.assert_close(*grads)
