"""Is transformers' SqueezeBERT right on pyfused, whatever its groups, and does it keep its own code where it must?"""

import pytest
import torch
import transformers as hf
from by_hand_cases import text
from fused_pairs import Trio, counted
from hf_cases import BERT, livened
from torch import nn

import pyfused
from pyfused.integrations.transformers import squeezebert

GROUPS = [
    {},
    {"output_groups": 2},
    {"intermediate_groups": 1, "output_groups": 1, "q_groups": 2, "post_attention_groups": 4},
]


def squeezebert_model(**options):
    torch.manual_seed(0)
    return livened(hf.SqueezeBertModel(hf.SqueezeBertConfig(**{**BERT, "embedding_size": 32, **options})))


@pytest.fixture
def used(monkeypatch):
    """How often each operator ran."""
    return counted(monkeypatch, squeezebert, "attend", "linear", "ffn")


@pytest.mark.parametrize("groups", GROUPS)
def test_values_and_gradients(groups, used):
    """Padding on both sides."""
    trio, inputs = Trio(squeezebert_model(**groups)), text()
    live = inputs["attention_mask"]
    trio.check(live=live, **inputs)
    assert all(used.values()) or "output_groups" in groups
    trio.check_gradients(lambda output: (output[0] * live[..., None]).square().mean(), **inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    inputs = text()
    Trio(squeezebert_model(), dtype=dtype).check(live=inputs["attention_mask"], **inputs)


def test_autocast():
    """A bias of the keys changes no probability: its gradient is rounding alone."""
    model = squeezebert_model()
    for layer in model.encoder.layers:
        layer.attention.key.bias.requires_grad_(False)
    Trio(model).check_autocast(input_ids=text()["input_ids"])


def test_hidden_states_and_attentions():
    """Its attentions are scores before the softmax, of its own code."""
    trio, ids = Trio(squeezebert_model()), text()["input_ids"]
    assert any("attentions" in name for name in trio.check(input_ids=ids, output_attentions=True))
    trio.check(input_ids=ids, output_hidden_states=True)


def test_dropout(used):
    """Attention keeps its kernel in training; the rest of the layer runs in the class's own code then."""
    trio, inputs = Trio(squeezebert_model(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)), text()
    trio.fused.train()(**inputs)
    assert used == {"attend": 2, "linear": 2 * 3 * 4, "ffn": 0}
    for one in trio.models:
        one.train()
        for module in one.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    trio.check(live=inputs["attention_mask"], **inputs)


PLACES = (
    "attention",
    "attention.key",
    "attention.softmax",
    "attention.dropout",
    "post_attention.conv1d",
    "intermediate.act",
)
PLACES += ("output", "output.layernorm")


@pytest.mark.parametrize("place", PLACES)
def test_a_hook_on_a_child_runs(place):
    model, inputs, seen = squeezebert_model(), text(), []
    expected = model(**inputs)[0]
    pyfused.fuse_(model)
    model.encoder.layers[1].get_submodule(place).register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(model(**inputs)[0], expected, rtol=1e-3, atol=1e-4)
    assert seen == [1]


def test_a_replaced_child_counts():
    """A convolution of three words, and one of a subclass."""
    trio, inputs = Trio(squeezebert_model()), text()
    torch.manual_seed(0)
    wide = nn.Conv1d(32, 32, 3, padding=1)
    for one in trio.models:
        one.encoder.layers[0].attention.value = nn.Conv1d(32, 32, 3, padding=1).to(one.dtype)
        one.encoder.layers[0].attention.value.load_state_dict(wide.state_dict())
        one.encoder.layers[1].output.dropout = nn.Identity()
    trio.check(live=inputs["attention_mask"], **inputs)


def test_compiled():
    model, inputs = squeezebert_model(), text()
    pyfused.fuse_(model)
    expected = model(**inputs)[0]
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(**inputs)[0], expected)
