"""Does attn_implementation="pyfused" compute what "eager" does, for every kind of mask, cache and layer?"""

import pytest
import torch
import transformers as hf
from hf_cases import (
    DECODERS,
    ENCODERS,
    MODELS,
    build,
    check_against_eager,
    livened,
    padding,
    tokens,
    with_implementation,
)
from torch.nn import functional as F

import pyfused
from pyfused import notices as fused_notices
from pyfused.integrations.transformers import attend, make_mask, masks, support


@pytest.fixture
def notices(monkeypatch):
    """Forgets the notices given, as in a new process."""
    monkeypatch.setattr(fused_notices, "_said", set())


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("name", ENCODERS + DECODERS)
def test_padding(name, side, calls):
    mask = padding(2, 9, side)
    check_against_eager(build(name), {"input_ids": tokens(2, 9), "attention_mask": mask}, live=mask.bool())
    assert len(calls) == 2
    dense = [c["attn_bias"] for c in calls]
    if not name.startswith("mistral") or dense[0] is None:
        assert dense == [None, None]
        assert all(
            c["is_causal"] == (name in DECODERS) and (c["padding_mask"] is None) == (side is None) for c in calls
        )


def test_padding_keeps_its_structure_in_inference_mode(calls):
    model = with_implementation(build("gpt2"), "pyfused")
    with torch.inference_mode():
        model(input_ids=tokens(2, 9), attention_mask=padding(2, 9, "left"))
    assert [c["attn_bias"] for c in calls] == [None, None]


@pytest.mark.parametrize("kind", ["bool", "float", "float, other dtype", "a head's own"])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_four_dimensional_masks(name, kind):
    visible = torch.rand(2, 4 if kind.startswith("a head") else 1, 7, 7) > 0.5
    visible |= torch.eye(7, dtype=torch.bool)
    added = torch.where(visible, 0.0, torch.finfo(torch.float32).min)
    given = {"float": added, "float, other dtype": added.double()}.get(kind, visible)
    inputs = {"input_ids": tokens(2, 7)}
    eager = {**inputs, "attention_mask": added}
    check_against_eager(build(name), {**inputs, "attention_mask": given}, eager_inputs=eager)


def test_masks_of_integers_are_refused():
    query = torch.randn(2, 4, 5, 8)
    with pytest.raises(TypeError, match=r"attention_mask is torch.int64"):
        masks.read_mask(torch.ones(2, 1, 5, 5, dtype=torch.int64), query, query)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_packed_texts(name):
    inputs = {"input_ids": tokens(1, 9), "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2]])}
    actual = check_against_eager(build(name), {**inputs, "use_cache": False})
    ends = torch.tensor([0, 4, 6, 9], dtype=torch.int32)
    packed = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 4, "max_length_k": 4}
    model = build(name)
    expected = with_implementation(model, "eager")(**inputs, use_cache=False)[0]
    torch.testing.assert_close(with_implementation(model, "pyfused")(**inputs, **packed)[0], expected)
    assert actual.shape == expected.shape


def cached(new_cache):
    """Three calls on one cache: a prompt, several tokens more, one more."""

    def call(model, inputs):
        ids, mask, cache, out = inputs["input_ids"], inputs.get("attention_mask"), new_cache(model), []
        for begin, end in ((0, 5), (5, 8), (8, 9)):
            seen = None if mask is None else mask[:, :end]
            out.append(model(ids[:, begin:end], attention_mask=seen, past_key_values=cache, use_cache=True)[0])
        return torch.cat(out, 1)

    return call


@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_caches(kind, name, side, calls):
    if kind == "dynamic":
        call = cached(lambda model: hf.DynamicCache(config=model.config))
    else:
        call = cached(lambda model: hf.StaticCache(config=model.config, max_cache_len=12))
    mask = padding(2, 9, side)
    inputs = {"input_ids": tokens(2, 9)} | ({} if side is None else {"attention_mask": mask})
    check_against_eager(build(name), inputs, live=mask.bool(), call=call)
    if name in ("gpt2", "llama"):
        assert all(c["attn_bias"] is None for c in calls)


def test_encoder_decoder_and_its_cache():
    def call(model, inputs):
        inputs = dict(inputs)
        decoder_ids, cache, out = inputs.pop("decoder_input_ids"), None, []
        for begin, end in ((0, 4), (4, 6), (6, 7)):
            done = model(**inputs, decoder_input_ids=decoder_ids[:, begin:end], past_key_values=cache, use_cache=True)
            cache = done.past_key_values
            out.append(done[0])
        assert isinstance(cache, hf.EncoderDecoderCache)
        return torch.cat(out, 1)

    for name in ("bart", "t5"):
        inputs = {
            "input_ids": tokens(2, 6),
            "attention_mask": padding(2, 6, "right"),
            "decoder_input_ids": tokens(2, 7),
        }
        check_against_eager(build(name), inputs, call=call)
        check_against_eager(build(name), inputs)


@pytest.mark.parametrize("name", ["bert", "gpt2", "mistral, window 4", "bart"])
def test_attentions(name, notices):
    model = build(name)
    inputs = {"input_ids": tokens(2, 6), "attention_mask": padding(2, 6, "left")}
    plain = with_implementation(model, "eager")(**inputs, output_attentions=True)
    with pytest.warns(fused_notices.FallbackWarning, match="output_attentions"):
        actual = with_implementation(model, "pyfused")(**inputs, output_attentions=True)
    names = [n for n in plain if "attentions" in n and plain[n]]
    assert names
    live = inputs["attention_mask"].bool()
    for n in names:
        assert len(actual[n]) == len(plain[n]) == 2
        for a, p in zip(actual[n], plain[n]):
            rows = live if n != "cross_attentions" and not n.startswith("decoder") else slice(None)
            torch.testing.assert_close(a.transpose(1, 2)[rows], p.transpose(1, 2)[rows])
    torch.testing.assert_close(actual[0][live], model(**inputs)[0][live])


def layer(**attributes):
    module = torch.nn.Module()
    module.__dict__.update({"is_causal": False, **attributes})
    return module


def test_dropout_acts_on_the_probabilities():
    query, key = torch.randn(8, 4, 32, 8), torch.randn(8, 4, 64, 8)
    value = torch.ones_like(key).requires_grad_()
    out, _ = attend(layer(), query, key, value, None, dropout=0.25)
    assert out.std() > 0.01
    assert abs(out.mean().item() - 1.0) < 0.01  # 8192 sums of 64 probabilities
    out.sum().backward()
    assert value.grad.isfinite().all()
    assert not attend(layer(), query, key, value, None, dropout=1.0)[0].any()
    model = with_implementation(livened(MODELS["gpt2"](attn_pdrop=0.5)), "pyfused")
    ids = tokens(1, 6)
    assert torch.equal(model(ids)[0], model(ids)[0])
    model.train()
    assert not torch.equal(model(ids)[0], model(ids)[0])


@pytest.mark.parametrize("per_layer", [False, True])
def test_head_mask(per_layer):
    model = build("gpt2")
    keep = (
        torch.tensor([[1.0, 0.0, 1.0, 0.5], [0.0, 1.0, 1.0, 1.0]]) if per_layer else torch.tensor([1.0, 0.0, 1.0, 0.5])
    )
    ids = tokens(2, 6)
    actual = with_implementation(model, "pyfused")(ids, head_mask=keep)[0]
    with pytest.warns(fused_notices.FallbackWarning) if not fused_notices._said else torch.no_grad():
        weights = model(ids, head_mask=keep, output_attentions=True)
    assert not weights.attentions[0][:, 0 if per_layer and keep[0, 0] == 0 else 1].any()
    with torch.no_grad():  # masking a head scales its rows of the next projection
        for index, block in enumerate(model.h):
            rows = (keep[index] if per_layer else keep).repeat_interleave(8)
            block.attn.c_proj.weight.mul_(rows[:, None])
    expected = model(ids)[0]
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(weights[0], expected)


@pytest.mark.parametrize("keys_too", [True, False])
def test_head_sizes_the_kernels_do_not_have(keys_too, notices):
    query, key = (torch.randn(2, h, 5, 264 if keys_too else 16) for h in (4, 2))
    value = torch.randn(2, 2, 5, 264 if keys_too else 8)
    visible = (torch.rand(2, 1, 5, 5) > 0.5) | torch.eye(5, dtype=torch.bool)
    with pytest.warns(fused_notices.FallbackWarning, match="head sizes"):
        out, _ = attend(layer(num_key_value_groups=2), query, key, value, visible)
    wide_key, wide_value = (t.repeat_interleave(2, 1) for t in (key, value))
    expected = F.scaled_dot_product_attention(query, wide_key, wide_value, visible)
    torch.testing.assert_close(out, expected.transpose(1, 2))


@pytest.mark.parametrize("side", [None, "right"])
def test_upcast_attention(side, notices):
    """Uses GPT-2's own function, which transformers itself bypasses unless the name is "eager"."""
    model = build("gpt2", reorder_and_upcast_attn=True, scale_attn_by_inverse_layer_idx=True).bfloat16()
    mask = padding(2, 6, side)
    inputs = {"input_ids": tokens(2, 6), "attention_mask": mask}
    expected = with_implementation(model, "eager")(**inputs)[0]
    with pytest.warns(fused_notices.FallbackWarning, match="reorder_and_upcast_attn"):
        actual = with_implementation(model, "pyfused")(**inputs)[0]
    assert torch.equal(actual[mask.bool()], expected[mask.bool()])


def test_biases_of_positions():
    """T5's bias, from its table or dense; cross-attention's zeros are no bias."""
    query, key, value = (torch.randn(2, 4, n, 8) for n in (3, 7, 7))
    bias = pyfused.RelativeBias(torch.randn(32, 4), False)
    dense = pyfused.relative_bias(bias.table, 3, 7, bidirectional=False, query_offset=4)
    mask = make_mask(batch_size=2, q_length=3, kv_length=7, q_offset=4, attention_mask=padding(2, 7, "left").bool())
    expected = F.scaled_dot_product_attention(query, key, value, dense.masked_fill(~mask, -torch.inf), scale=1.0)
    for given in ({"relative_bias": bias}, {"position_bias": dense}):
        out, _ = attend(layer(), query, key, value, mask, scaling=1.0, **given)
        torch.testing.assert_close(out, expected.transpose(1, 2))
        out, weights = attend(layer(), query, key, value, mask, scaling=1.0, output_attentions=True, **given)
        torch.testing.assert_close(out, expected.transpose(1, 2))
        assert weights.shape == (2, 4, 3, 7)


def test_zero_bias_is_dropped(calls):
    query, zeros = torch.randn(1, 2, 3, 8), torch.zeros(1, 2, 3, 3)
    attend(layer(), query, query, query, None, position_bias=zeros)
    zeros[0, 0, 0, 0] = 1.0
    attend(layer(), query, query, query, None, position_bias=zeros)
    assert [c["attn_bias"] is None for c in calls] == [True, False]


Q, K = torch.ones(2, 4, 3, 8), torch.ones(2, 4, 7, 8)
REFUSED = {
    "softcap": ((Q, Q), {"softcap": 30.0}),
    "s_aux": ((Q, Q), {"s_aux": torch.ones(4)}),
    "cache": ((Q, Q), {"cache": object()}),
    "indices": ((Q, Q), {"indices": torch.ones(2, 3, 2)}),
    "sliding_window is 4": ((Q, K), {"sliding_window": 4}),
    r"head_mask has shape \(5,\)": ((Q, Q), {"head_mask": torch.ones(5)}),
    "does not know which layer": ((Q, Q), {"head_mask": torch.ones(3, 4)}),
    "cu_seq_lens_k go together": ((Q[:1], Q[:1]), {"cu_seq_lens_q": torch.tensor([0, 3])}),
    "3 queries and 7 keys": ((Q, K), {"is_causal": True}),
    "packed differently": (
        (Q[:1], K[:1]),
        {"cu_seq_lens_q": torch.tensor([0, 3]), "cu_seq_lens_k": torch.tensor([0, 7])},
    ),
    "7 queries and 3 keys": ((K, Q), {"is_causal": True}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused_by_name(message):
    (query, key), more = REFUSED[message]
    with pytest.raises(ValueError, match=message):
        attend(layer(), query, key, key, None, **more)


def test_models_with_soft_caps_and_sinks_are_refused():
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_implementation": "pyfused", "pad_token_id": 0}
    with pytest.raises(ValueError, match="softcap"):
        hf.Gemma2Model(hf.Gemma2Config(**sizes))(tokens(1, 4))
    with pytest.raises(ValueError, match="s_aux"):
        hf.GptOssModel(hf.GptOssConfig(**sizes, num_local_experts=2))(tokens(1, 4))


OWN_ATTENTION = {
    "bloom": lambda **more: hf.BloomModel(hf.BloomConfig(hidden_size=32, n_layer=1, n_head=4, **more)),
    "mpt": lambda **more: hf.MptModel(hf.MptConfig(d_model=32, n_layers=1, n_heads=4, max_seq_len=40, **more)),
    "xglm": lambda **more: hf.XGLMModel(hf.XGLMConfig(d_model=32, num_layers=1, attention_heads=4, ffn_dim=48, **more)),
}


@pytest.mark.parametrize("name", OWN_ATTENTION)
def test_models_without_the_interface_are_refused(name):
    model = OWN_ATTENTION[name](vocab_size=50, attn_implementation="pyfused").eval()
    with pytest.raises(ValueError, match=f"does not suit model type '{name}'"):
        model(tokens(1, 4))
    assert model.set_attn_implementation("eager") is None
    report = pyfused.fuse_(OWN_ATTENTION[name](vocab_size=50))
    assert "attention code of its own" not in str(report)  # fuse_ finds their attention in their source


def test_models_with_the_interface_in_some_layers_only_are_refused():
    assert "GitSelfAttention" in support.reason_against(hf.GitModel)
    assert "InformerProbSparseAttention" in support.reason_against(hf.InformerModel)
    assert not support.reason_against(hf.SwitchTransformersModel)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_compiles_whole(name, monkeypatch):
    monkeypatch.setattr(support, "_reasons", {})  # looked up inside the trace
    monkeypatch.setattr(support, "_vouched", {})
    torch._dynamo.reset()
    model = with_implementation(build(name), "pyfused")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    for mask in (None, padding(2, 7, "right")):
        inputs = {"input_ids": tokens(2, 7), "attention_mask": mask}
        torch.testing.assert_close(compiled(**inputs)[0], model(**inputs)[0])


def test_compiled_decoding_on_a_static_cache():
    torch._dynamo.reset()
    model = with_implementation(build("llama"), "pyfused")
    ids, steps = tokens(2, 6), []
    for step in (model, torch.compile(model, fullgraph=True, backend="eager")):
        cache = hf.StaticCache(config=model.config, max_cache_len=8)
        model(ids[:, :4], past_key_values=cache)
        steps.append([step(ids[:, i : i + 1], past_key_values=cache)[0] for i in (4, 5)])
    torch.testing.assert_close(steps[1], steps[0])


def test_the_name_is_not_saved(tmp_path):
    model = hf.GPT2Model.from_pretrained(_saved(tmp_path / "a"), attn_implementation="pyfused")
    assert model.config._attn_implementation == "pyfused"
    assert "pyfused" not in (_saved(tmp_path / "b", model) / "config.json").read_text()


def _saved(path, model=None):
    (model or build("gpt2")).save_pretrained(path)
    return path


def masks_of(causal, queries, keys, real, room=0):
    """(B, 1, Tq, Sk) bool: padding, causality aligned at the last key, and a static cache's room behind the keys."""
    mask = real[:, None, None].expand(-1, 1, queries, -1)
    if causal:
        mask = mask & torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    return torch.cat([mask, torch.zeros(*mask.shape[:3], room, dtype=torch.bool)], -1)


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize(
    "causal, queries, keys, room", [(False, 5, 7, 0), (True, 6, 6, 0), (True, 3, 6, 0), (True, 3, 6, 4)]
)
def test_masks_are_recognised(causal, queries, keys, room, side):
    """Recognises bool masks from any source, and eager's float masks if every query sees some key."""
    real = torch.ones(2, keys, dtype=torch.bool) if side is None else padding(2, keys, side).bool()
    mask = masks_of(causal, queries, keys, real, room)
    query, key = torch.randn(2, 4, queries, 8), torch.randn(2, 4, keys + room, 8)
    floats = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    dead = not mask.any(-1).all()
    for given in (mask, floats):
        seen = masks.read_mask(given, query, key)
        if given is floats and dead:
            assert seen.attn_bias is floats
            continue
        if room and side == "right":  # the mask does not show which keys are the queries' own
            assert torch.equal(seen.attn_bias == 0, mask)
            continue
        assert seen.is_causal == causal
        assert seen.attn_bias is None
        assert seen.keys == (keys if causal else None)
        assert (seen.padding_mask is None) == (side is None)
        if side is not None:
            assert torch.equal(seen.padding_mask, real)


def test_other_masks_are_dense():
    query = torch.randn(2, 4, 6, 8)
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    windowed, holed, upper = causal.triu(-2), causal.clone(), causal.T
    holed[4, 2] = False
    per_head = causal.expand(2, 4, 6, 6)
    for mask in (windowed, holed, upper):
        assert masks.read_mask(mask.expand(2, 1, 6, 6), query, query).attn_bias is not None
    assert masks.read_mask(per_head, query, query).attn_bias is not None
    learned = torch.zeros(2, 1, 6, 6, requires_grad=True)
    assert masks.read_mask(learned, query, query).attn_bias is learned
    with torch.inference_mode():
        mask = causal.expand(2, 1, 6, 6).clone()
        assert masks.read_mask(mask, query, query).is_causal
    with pytest.raises(ValueError, match="attention_mask has shape \\(2, 6\\)"):
        masks.read_mask(torch.ones(2, 6, dtype=torch.bool), query, query)


def test_an_old_transformers_is_refused(monkeypatch):
    import importlib
    import sys

    from pyfused.integrations import transformers as integration

    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.56.2")  # `hf` may be another module
    with pytest.raises(ImportError, match=r"transformers 4\.57 and later; this is 4\.56\.2"):
        importlib.reload(integration)
