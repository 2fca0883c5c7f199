"""Does transformers' ALBERT compute the same after fuse_, with every head, option and dtype?"""

import pytest
import torch
from fused_pairs import (
    Trio,
    check_changed_child,
    check_dropout,
    check_resized,
    counted,
    padded,
)

import pyfused
from pyfused.own_forward import is_fused

transformers = pytest.importorskip("transformers")
from pyfused.integrations.transformers import albert as albert_integration  # noqa: E402

SIZES = {
    "vocab_size": 61, "embedding_size": 12, "hidden_size": 24, "num_hidden_layers": 4, "num_hidden_groups": 2,
    "inner_group_num": 2, "num_attention_heads": 4, "intermediate_size": 40, "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout_prob": 0.0,
    "initializer_range": 0.3,
}  # fmt: skip
HEADS = [
    "AlbertModel", "AlbertForPreTraining", "AlbertForMaskedLM", "AlbertForSequenceClassification",
    "AlbertForTokenClassification", "AlbertForQuestionAnswering", "AlbertForMultipleChoice",
]  # fmt: skip


def albert(head="AlbertModel", **options):
    return getattr(transformers, head)(transformers.AlbertConfig(**{**SIZES, **options}))


def inputs(side="right"):
    ids, mask = padded(3, 13, 61, side)
    return {"input_ids": ids, "attention_mask": mask}


def test_report():
    trio = Trio(albert())
    assert {entry.kind for entry in trio.report.replaced} >= {"AlbertAttention", "AlbertLayer", "LayerNorm"}
    assert trio.report.left == ()
    for model, name in ((trio.fused, "pyfused"), (trio.plain, "sdpa")):
        layers = [m for m in model.modules() if isinstance(m, albert_integration.modeling_albert.AlbertAttention)]
        assert {layer.config._attn_implementation for layer in layers} == {name}


@pytest.mark.parametrize("head", HEADS)
def test_heads(head):
    given = inputs()
    given["token_type_ids"] = torch.randint(0, 2, given["input_ids"].shape)
    if head == "AlbertForMultipleChoice":
        given = {name: t[None] for name, t in given.items()}
    outputs = Trio(albert(head)).check(**given, output_hidden_states=True)
    assert sum(name.startswith("hidden_states") for name in outputs) == 9


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_padding_and_dtypes(side, dtype):
    given = inputs(side)
    Trio(albert(), dtype).check(live=given["attention_mask"], **given)


def test_no_mask_embeddings_positions_and_tuples():
    trio = Trio(albert())
    trio.check(input_ids=inputs()["input_ids"])
    trio.check(inputs_embeds=torch.randn(2, 7, 12), position_ids=torch.arange(7).flip(0)[None])
    trio.check(input_ids=torch.ones(2, 1, dtype=torch.long))
    assert isinstance(trio.fused(torch.ones(2, 3, dtype=torch.long), return_dict=False), tuple)


def test_attentions():
    """Compares with the plain model's eager attentions."""
    trio = Trio(albert(attn_implementation="eager"))
    outputs = trio.check(**inputs(), output_attentions=True, output_hidden_states=True)
    assert sum(name.startswith("attentions") for name in outputs) == 8
    trio.check(**inputs())  # now with the hooks in place


def test_what_runs(monkeypatch):
    """Four layers with two inner layers each."""
    trio, counts = Trio(albert()), counted(monkeypatch, albert_integration, "ffn", "linear")
    trio.fused(**inputs())
    assert counts == {"ffn": 8, "linear": 8}


@pytest.mark.parametrize("activation", ["gelu", "relu", "mish"])
def test_activations(activation):
    trio = Trio(albert(hidden_act=activation))
    trio.check(**inputs())
    assert {entry.kind for entry in trio.report.left} == ({"AlbertLayer"} if activation == "mish" else set())


@pytest.mark.parametrize("chunk", [1, 4])
def test_chunked_feed_forward(chunk):
    ids, mask = padded(2, 12, 61)
    Trio(albert(chunk_size_feed_forward=chunk)).check(input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize(
    "place", ["ffn", "ffn_output", "activation", "attention.dense", "attention.query", "attention"]
)
def test_children_replaced_or_hooked_later(place):
    check_changed_child(Trio(albert()), lambda m: m.encoder.albert_layer_groups[1].albert_layers[0], place, **inputs())


def test_another_attention_implementation_later():
    trio = Trio(albert())
    trio.fused.set_attn_implementation("eager")
    trio.check(**inputs())


def test_gradients():
    trio, given = Trio(albert("AlbertForMaskedLM")), inputs()
    weights = torch.randn(3, 13, 61) * given["attention_mask"][..., None]
    loss = lambda output: (output.logits * weights.to(output.logits.dtype)).sum()  # noqa: E731
    assert len(trio.check_gradients(loss, **given)) > 30


def test_autocast():
    Trio(albert()).check_autocast(**inputs())


def test_dropout():
    options = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "num_hidden_layers": 2}
    check_dropout(Trio(albert(**options)), input_ids=torch.randint(2, 61, (1, 9)).repeat(512, 1))


def test_filter_unfuse_and_files(tmp_path):
    given = inputs()
    trio = Trio(albert(), filter_fn=lambda name, module: "albert_layers.1" not in name)
    group = trio.fused.encoder.albert_layer_groups[0].albert_layers
    assert [any(is_fused(m) for m in layer.modules()) for layer in group] == [True, False]
    trio.check(**given)
    trio.fused.save_pretrained(tmp_path)
    again = transformers.AlbertModel.from_pretrained(tmp_path)
    assert torch.equal(again(**given).last_hidden_state, trio.plain(**given).last_hidden_state)
    assert torch.equal(pyfused.unfuse_(trio.fused)(**given).last_hidden_state, trio.plain(**given).last_hidden_state)


def test_resized_embeddings():
    check_resized(Trio(albert("AlbertForMaskedLM")), 70, input_ids=inputs()["input_ids"] + 8)
