"""Does ALBERT share its layers, read its inputs and hide padding as its originals do, and refuse what it cannot do?"""

import pytest
import torch
from backbone_cases import call_of, hf_albert, ids_of, inputs_of, like_hf

from pyfused import AlbertBackbone, Generator

SIZES = {"vocabulary_size": 61, "num_layers": 4, "num_heads": 4, "embedding_dim": 10, "hidden_dim": 24}
SIZES |= {"intermediate_dim": 56, "num_groups": 2, "num_inner_repetitions": 2, "max_sequence_length": 33}


@torch.no_grad()
def test_layers_of_groups():
    """Each application's group follows transformers' rule; compares with its own model's attentions."""
    for layers, groups in ((5, 2), (7, 3), (4, 4), (6, 1), (2, 3), (12, 7)):
        config = {"num_hidden_layers": layers, "num_hidden_groups": groups, "inner_group_num": 1}
        hf = hf_albert(torch.float64, attention="eager", **config)
        mine = like_hf(hf)
        out = mine(call_of("albert", inputs_of("albert")), return_attentions=True)
        theirs = hf(**inputs_of("albert"), output_attentions=True).attentions
        assert len(out["attentions"]) == layers
        for a, b in zip(out["attentions"], theirs):
            torch.testing.assert_close(a, b)


def test_other_inputs(device):
    model = AlbertBackbone(**SIZES).to(device).eval()
    call = call_of("albert", inputs_of("albert", padding="left"))
    with torch.no_grad():
        whole = model(call)["sequence_output"]
        positions = torch.arange(17).expand(3, -1)
        for given in (positions, positions[:1]):
            assert torch.equal(model(call, position_ids=given)["sequence_output"], whole)
        moved = model(call, position_ids=positions + 3)["sequence_output"]
        assert not torch.allclose(moved, whole)
        embeds = model.token_embedding(call.pop("token_ids").to(device))
        assert torch.equal(model(call, inputs_embeds=embeds)["sequence_output"], whole)
        zeros = torch.zeros(3, 17, dtype=torch.int64)
        first = model(call | {"segment_ids": zeros}, inputs_embeds=embeds)["sequence_output"]
        none = model(call | {"segment_ids": None}, inputs_embeds=embeds)["sequence_output"]
        torch.testing.assert_close(first, none)
        assert not torch.allclose(none, whole)


def test_padding_changes_no_real_row(device):
    model = AlbertBackbone(**SIZES).to(device).eval()
    ids = ids_of((1, 6))
    with torch.no_grad():
        alone = model(token_ids=ids, segment_ids=None, padding_mask=None)["sequence_output"]
        for left, right in ((3, 0), (0, 3), (2, 2)):
            padded = torch.cat([ids_of((1, left), seed=3), ids, ids_of((1, right), seed=4)], 1)
            mask = torch.tensor([[0] * left + [1] * 6 + [0] * right])
            places = (torch.arange(left + 6 + right) - left).clamp(0, 5)[None]
            call = {"token_ids": padded, "segment_ids": None, "padding_mask": mask, "position_ids": places}
            torch.testing.assert_close(model(call)["sequence_output"][:, left : left + 6], alone)


def test_wholly_padded_rows_are_finite(device):
    model = AlbertBackbone(**SIZES).to(device)
    call = call_of("albert", inputs_of("albert", 2, 5)) | {"padding_mask": torch.tensor([[0] * 5, [1] * 5])}
    out = model(call, return_attentions=True)
    assert torch.isfinite(out["sequence_output"]).all()
    assert all(found[0].abs().max() == 0 for found in out["attentions"])
    out["sequence_output"].sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_empty(device):
    model = AlbertBackbone(**SIZES).to(device).eval()
    empty = {"token_ids": torch.zeros(0, 5, dtype=torch.int64), "segment_ids": None, "padding_mask": None}
    out = model(empty)
    assert (out["sequence_output"].shape, out["pooled_output"].shape) == ((0, 5, 24), (0, 24))
    none = empty | {"token_ids": torch.zeros(2, 0, dtype=torch.int64)}
    with pytest.raises(ValueError, match="token_ids has length 0; with a pooler it takes at least 1"):
        model(none)
    assert AlbertBackbone(**SIZES, pooler=False).to(device)(none)["sequence_output"].shape == (2, 0, 24)


GOOD = {"token_ids": torch.zeros(2, 5, dtype=torch.int64), "segment_ids": None, "padding_mask": None}


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"segment_ids": torch.full((2, 5), 2)}, IndexError, "segment_ids holds 2; it takes 0 to 1"),
        ({"segment_ids": torch.zeros(2, 4).long()}, ValueError, r"segment_ids has shape \(2, 4\)"),
        ({"padding_mask": torch.ones(2, 4)}, ValueError, r"padding_mask has shape \(2, 4\).*\(B, S\) = \(2, 5\)"),
        ({"padding_mask": 1}, TypeError, "padding_mask is an int"),
        ({"position_ids": torch.full((2, 5), 33)}, IndexError, "position_ids holds 33; it takes 0 to 32"),
        ({"token_ids": torch.zeros(2, 34).long()}, ValueError, "length 34; it takes at most max_sequence_length = 33"),
    ],
)
def test_bad_input_is_refused_by_name(change, error, message, device):
    model = AlbertBackbone(**SIZES).to(device)
    with pytest.raises(error, match=message):
        model({**GOOD, **change})


def test_more_bad_input(device):
    model = AlbertBackbone(**SIZES).to(device)
    with pytest.raises(TypeError, match=r"AlbertBackbone gives hidden states; the head .* is no part of it"):
        model.logits(torch.zeros(2, 5, 24))
    with pytest.raises(TypeError, match="model is an AlbertBackbone; it takes a GPT2Backbone or a T5Backbone"):
        Generator(model)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"num_groups": 1.5}, TypeError, "num_groups is 1.5"),
        ({"num_inner_repetitions": 0}, ValueError, "num_inner_repetitions is 0"),
        ({"embedding_dim": True}, TypeError, "embedding_dim is True"),
        ({"num_heads": 25}, ValueError, "num_heads is 25 and hidden_dim 24"),
        ({"num_segments": 0}, ValueError, "num_segments is 0"),
        ({"attention_dropout": -0.1}, ValueError, "attention_dropout is -0.1"),
        ({"feed_forward_dropout": "no"}, TypeError, "feed_forward_dropout is 'no'"),
        ({"pooler": 1}, TypeError, "pooler is 1; it takes True or False"),
    ],
)
def test_bad_configurations_are_refused_by_name(change, error, message):
    with pytest.raises(error, match=message):
        AlbertBackbone(**{**SIZES, **change})
