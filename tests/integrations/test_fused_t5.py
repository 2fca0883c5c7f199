"""Does transformers' T5 compute the same after fuse_, with every head, cache, mask and dtype?"""

import copy

import pytest
import torch
from fused_pairs import (
    Trio,
    check_changed_child,
    check_dropout,
    check_resized,
    counted,
    gradients,
    padded,
    rows,
)

import pyfused
from pyfused.own_forward import is_fused
from pyfused.testing.tolerance import assert_close

transformers = pytest.importorskip("transformers")
from pyfused.integrations.transformers import attention as attention_interface  # noqa: E402
from pyfused.integrations.transformers import shaped, t5_tables  # noqa: E402
from pyfused.integrations.transformers import t5 as t5_integration  # noqa: E402

SIZES = {
    "vocab_size": 61, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "dropout_rate": 0.0,
    "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
LAYERS = {"T5LayerNorm", "T5DenseGatedActDense", "T5LayerFF", "T5Attention", "T5LayerSelfAttention", "T5Stack"}


def t5(head="T5Model", **options):
    model = getattr(transformers, head)(transformers.T5Config(**{**SIZES, **options}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "relative_attention_bias" in name:
                parameter.mul_(5)  # to the scores' size
    return model


def inputs(side="right", decoder_side="right"):
    ids, mask = padded(3, 13, 61, side)
    decoder_ids, decoder_mask = padded(3, 9, 61, decoder_side, seed=1)
    return {
        "input_ids": ids, "attention_mask": mask,
        "decoder_input_ids": decoder_ids, "decoder_attention_mask": decoder_mask,
    }  # fmt: skip


def test_report():
    trio = Trio(t5())
    assert {entry.kind for entry in trio.report.replaced} >= {*LAYERS, "T5LayerCrossAttention"}
    assert trio.report.left == ()
    for model, name in ((trio.fused, "pyfused"), (trio.plain, "sdpa")):
        layers = [m for m in model.modules() if isinstance(m, t5_integration.modeling_t5.T5Attention)]
        assert {layer.config._attn_implementation for layer in layers} == {name}


@pytest.mark.parametrize("head", ["T5Model", "T5ForConditionalGeneration", "T5ForQuestionAnswering"])
def test_encoder_decoder_heads(head):
    outputs = Trio(t5(head)).check(**inputs(), output_hidden_states=True)
    assert sum(name.startswith("encoder_hidden_states") for name in outputs) == 4
    assert sum(name.startswith("decoder_hidden_states") for name in outputs) == 3
    assert sum(name.startswith("past_key_values") for name in outputs) == 8


@pytest.mark.parametrize("head", ["T5EncoderModel", "T5ForTokenClassification", "T5ForSequenceClassification"])
def test_encoder_heads(head):
    given = {name: t for name, t in inputs().items() if "decoder" not in name}
    if head == "T5ForSequenceClassification":
        given["input_ids"][:, 3] = 1  # each text has one end-of-sequence token
    Trio(t5(head)).check(**given, output_hidden_states=True)


def test_loss_from_labels():
    given = {name: t for name, t in inputs().items() if "decoder" not in name}
    Trio(t5("T5ForConditionalGeneration")).check(**given, labels=torch.randint(2, 61, (3, 9)))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_padding_and_dtypes(side, dtype):
    """Only rows that see a token have a meaning; the encoder's padding rows see tokens."""
    trio, given = Trio(t5(), dtype), inputs(side, side)
    trio.check(live=given["decoder_attention_mask"], **given, use_cache=False)


@pytest.mark.parametrize("activation", ["relu", "gated-silu", "gated-relu", "gelu", "mish"])
def test_activations(activation):
    trio = Trio(t5(feed_forward_proj=activation))
    trio.check(**inputs())
    left = {"T5DenseActDense", "T5LayerFF"} if activation == "mish" else set()
    assert {entry.kind for entry in trio.report.left} == left


def test_float16_with_wo_in_float32(tmp_path):
    """from_pretrained gives `wo` another dtype than its input."""
    t5().save_pretrained(tmp_path)
    plain = transformers.T5Model.from_pretrained(tmp_path, dtype=torch.float16).eval()
    assert plain.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32
    trio = Trio(plain, None)
    trio.check(live=inputs()["decoder_attention_mask"], **inputs(), use_cache=False)


def test_embeddings_and_tuples():
    trio, given = Trio(t5()), inputs()
    trio.check(inputs_embeds=torch.randn(3, 13, 24), decoder_inputs_embeds=torch.randn(3, 9, 24))
    trio.check(encoder_outputs=(torch.randn(3, 13, 24),), decoder_input_ids=given["decoder_input_ids"])
    assert isinstance(trio.fused(**given, return_dict=False), tuple)


def test_attentions():
    """Compares with the plain model's eager attentions."""
    trio = Trio(t5(attn_implementation="eager"))
    given = inputs()
    outputs = trio.check(**given, output_attentions=True)
    kinds = ("encoder_attentions", "decoder_attentions", "cross_attentions")
    assert [sum(name.startswith(kind) for name in outputs) for kind in kinds] == [3, 2, 2]
    trio.check(**given)  # now with the hooks in place


def test_what_runs(monkeypatch):
    """Neither stack makes a bias tensor; the kernels compute everything."""
    trio = Trio(t5())
    counts, attended = counted(monkeypatch, shaped, "ffn", "gated_ffn", "rms_norm"), []
    projected = counted(monkeypatch, t5_tables, "linear")
    dense = counted(monkeypatch, pyfused.nn.t5, "relative_bias")
    attention = attention_interface.attention
    monkeypatch.setattr(
        attention_interface, "attention", lambda *args, **kwargs: attended.append(kwargs) or attention(*args, **kwargs)
    )
    trio.fused(**inputs())
    assert counts | projected == {"ffn": 0, "gated_ffn": 5, "linear": 7, "rms_norm": 14}
    assert dense == {"relative_bias": 0}
    assert all(call["attn_bias"] is None for call in attended)
    tables = [call["relative_bias"] for call in attended]
    encoder, decoder = (stack.block[0].layer[0].SelfAttention for stack in (trio.fused.encoder, trio.fused.decoder))
    assert [t.table is encoder.relative_attention_bias.weight for t in tables[:3]] == [True] * 3
    assert [t and t.table is decoder.relative_attention_bias.weight for t in tables[3:]] == [True, None] * 2
    assert [t.bidirectional for t in tables if t] == [True] * 3 + [False] * 2


def cache_of(kind):
    config = transformers.T5Config(**SIZES)
    if kind == "dynamic":
        return transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())
    own = transformers.StaticCache(config, max_cache_len=16)
    return transformers.EncoderDecoderCache(own, transformers.DynamicCache())


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_caches(kind, side):
    """A prompt, three tokens at once, then one: each equals the plain model with its cache."""
    trio, given = Trio(t5()), inputs(decoder_side=side)
    caches, mask = [cache_of(kind) for _ in range(3)], given["decoder_attention_mask"]
    encoded = {"input_ids": given["input_ids"], "attention_mask": given["attention_mask"]}
    for begin, end in ((0, 5), (5, 8), (8, 9)):
        with torch.no_grad():
            outputs = [
                model(
                    **encoded,
                    decoder_input_ids=given["decoder_input_ids"][:, begin:end],
                    decoder_attention_mask=mask[:, :end],
                    past_key_values=cache,
                ).last_hidden_state
                for model, cache in zip(trio.models, caches)
            ]
        assert_close(*(rows(output, mask[:, begin:end]) for output in outputs), f"tokens {begin} to {end - 1}")
        assert caches[0].get_seq_length() == end


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "top_k": 20},
        {"num_beams": 3, "num_return_sequences": 2},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"do_sample": True, "num_beams": 2},
    ],
    ids=["greedy", "sampled", "beams", "static", "no cache", "sampled beams"],
)
def test_generate(options):
    """In float64 no rounding decides between two tokens; tests above compare float32 values."""
    trio = Trio(t5("T5ForConditionalGeneration"), torch.float64)
    given = {name: t for name, t in inputs("left").items() if "decoder" not in name}
    tokens = []
    for model in (trio.fused, trio.plain):
        torch.manual_seed(0)
        tokens.append(model.generate(**given, max_new_tokens=12, min_new_tokens=6, **options))
    assert torch.equal(*tokens)


class Block(t5_integration.modeling_t5.T5Block):
    """Stands for the block subclasses that FSDP makes."""


PLACES = [
    "layer.0.SelfAttention.q", "layer.0.SelfAttention.o", "layer.1.EncDecAttention.v", "layer.1.EncDecAttention.o",
    "layer.2.DenseReluDense.wi_1", "layer.2.DenseReluDense.wo", "layer.2.DenseReluDense.act", "layer.2.DenseReluDense",
    "layer.0.SelfAttention", "layer.1.dropout", "layer.0.SelfAttention.relative_attention_bias", "layer.1",
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_children_replaced_or_hooked_later(place):
    check_changed_child(Trio(t5()), lambda m: m.decoder.block[0], place, **inputs())


@pytest.mark.parametrize("left", ["block.1.layer.0.SelfAttention", "block.0.layer.0.SelfAttention", "layer.0", "stack"])
def test_a_stack_that_is_fused_in_part_has_the_tensor(left, monkeypatch):
    if left == "stack":
        trio = Trio(t5())
        for model in trio.models:
            model.encoder.block[1].__class__ = Block
    else:
        trio = Trio(t5(), filter_fn=lambda name, module: not name.endswith(left))
    attention, biases = attention_interface.attention, []
    monkeypatch.setattr(
        attention_interface,
        "attention",
        lambda *args, **kwargs: biases.append(kwargs["attn_bias"]) or attention(*args, **kwargs),
    )
    trio.check(**inputs())
    assert any(bias is not None for bias in biases) == (left != "layer.0")
    loss = lambda output: output.last_hidden_state.square().mean()  # noqa: E731
    assert any("relative_attention_bias" in name for name in trio.check_gradients(loss, **inputs()))


def test_another_attention_implementation_later():
    trio = Trio(t5())
    for name in ("eager", "sdpa", "pyfused"):
        trio.fused.set_attn_implementation(name)
        trio.check(**inputs())
    trio.fused.decoder.block[1].layer[0].SelfAttention.config = trio.plain.decoder.config
    trio.check(**inputs())


@pytest.mark.parametrize("gated", [True, False])
def test_gradients_and_checkpointing(gated):
    """Includes the gradients of the bias tables, which every layer reads."""
    trio, given = Trio(t5("T5ForConditionalGeneration", feed_forward_proj="gated-gelu" if gated else "relu")), inputs()
    weights = torch.randn(3, 9, 61) * given["decoder_attention_mask"][..., None]
    loss = lambda output: (output.logits * weights.to(output.logits.dtype)).sum()  # noqa: E731
    expected = trio.check_gradients(loss, **given)
    assert sum("relative_attention_bias" in name for name in expected) == 2
    for reentrant in (True, False):
        checkpointed = gradients(trio.fused, lambda model: loss(model(**given, use_cache=False)), reentrant)
        for name in expected:
            torch.testing.assert_close(checkpointed[name], expected[name], msg=name)


def test_autocast():
    Trio(t5()).check_autocast(**inputs(), use_cache=False)


def test_dropout():
    x = {name: torch.randint(2, 61, (1, 7)).repeat(512, 1) for name in ("input_ids", "decoder_input_ids")}
    check_dropout(Trio(t5(dropout_rate=0.1, num_layers=1, num_decoder_layers=1)), **x)


def test_unfuse_copies_and_files(tmp_path):
    trio, given = Trio(t5()), inputs()
    before = trio.plain(**given).last_hidden_state
    trio.fused.save_pretrained(tmp_path)
    assert torch.equal(transformers.T5Model.from_pretrained(tmp_path)(**given).last_hidden_state, before)
    twin = copy.deepcopy(trio.fused)
    assert torch.equal(twin(**given).last_hidden_state, trio.fused(**given).last_hidden_state)
    assert torch.equal(pyfused.unfuse_(trio.fused)(**given).last_hidden_state, before)
    assert is_fused(twin.encoder.block[0].layer[0].SelfAttention)


def test_resized_embeddings():
    given = {name: inputs()[name] + 8 for name in ("input_ids", "decoder_input_ids")}
    check_resized(Trio(t5("T5ForConditionalGeneration")), 70, **given)
