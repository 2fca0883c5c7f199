"""Does FNet mix whole texts, of any length and in every dtype, as its originals do, and refuse what it cannot do?"""

import copy

import numpy as np
import pytest
import torch
from backbone_cases import (
    call_of,
    check_outputs,
    hf_fnet,
    hf_outputs,
    inputs_of,
    like_hf,
    outputs_of,
    reference_outputs,
)

import pyfused
from pyfused import FNetBackbone
from pyfused.testing import assert_close

SIZES = {"vocabulary_size": 61, "num_layers": 2, "hidden_dim": 24, "intermediate_dim": 56, "max_sequence_length": 40}


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 40])
def test_texts_of_any_length_equal_transformers(length, device):
    check_outputs(hf_fnet(), inputs_of("fnet", length=length), device)


@torch.no_grad()
def test_positions_segments_and_embeddings_given(device):
    hf, inputs = hf_fnet(), inputs_of("fnet")
    truth_model = copy.deepcopy(hf).double()
    mine = like_hf(hf).to(device)
    positions = torch.randint(40, (3, 17), generator=torch.Generator().manual_seed(1))
    embeds = hf.embeddings.word_embeddings(inputs["input_ids"])
    ids = {"input_ids": inputs["input_ids"]}
    given = [inputs | {"position_ids": p} for p in (positions, positions[:1])]
    for change in (ids, *given, {"inputs_embeds": embeds}):
        exact = {k: v.double() if v.is_floating_point() else v for k, v in change.items()}
        truth, plain = hf_outputs(truth_model, exact), hf_outputs(hf, change)
        for name, value in outputs_of(mine, call_of("fnet", change)).items():
            assert_close(value, [plain[name]], truth[name], f"{list(change)} {name}")


def test_tpu_option_of_transformers_is_the_same_transform():
    """With it, transformers multiplies by Fourier matrices and takes texts of one length only."""
    pytest.importorskip("scipy")
    plain = hf_fnet()
    theirs = hf_fnet(use_tpu_fourier_optimizations=True, tpu_short_seq_length=17)
    inputs = inputs_of("fnet")
    with torch.no_grad():
        actual, expected = outputs_of(like_hf(plain), call_of("fnet", inputs)), hf_outputs(theirs, inputs)
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_each_backend_in_16_bits(dtype, each_backend, device):
    rounded = hf_fnet().to(dtype)
    inputs = inputs_of("fnet")
    exact = like_hf(rounded, torch.float64)
    with pyfused.backend("reference"):
        truth = outputs_of(exact, call_of("fnet", inputs))
    mine = like_hf(rounded).to(device)
    actual, reference = outputs_of(mine, call_of("fnet", inputs)), reference_outputs(mine, call_of("fnet", inputs))
    for name, value in actual.items():
        assert value.dtype == dtype
        assert_close(value, [reference[name]], truth[name], f"{dtype} {name}")


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
def test_empty(shape, device):
    model = FNetBackbone(**SIZES).to(device).eval()
    out = model(token_ids=torch.zeros(shape, dtype=torch.int64), segment_ids=None, return_hidden_states=True)
    assert out["sequence_output"].shape == (*shape, 24)
    assert out["pooled_output"].shape == (shape[0], 24)
    assert not out["pooled_output"].any()


def test_rows_do_not_mix(device):
    model = FNetBackbone(**SIZES).to(device).eval()
    call = call_of("fnet", inputs_of("fnet"))
    together = model(call)["sequence_output"]
    for row in range(3):
        alone = model({name: value[row : row + 1] for name, value in call.items()})["sequence_output"]
        torch.testing.assert_close(alone, together[row : row + 1])


def test_numpy_and_any_integers(device):
    model = FNetBackbone(**SIZES).to(device).eval()
    call = call_of("fnet", inputs_of("fnet"))
    expected = model(call)["pooled_output"]
    for kind in (np.int32, np.uint8, torch.int16):
        made = {k: v.to(kind) if isinstance(kind, torch.dtype) else v.numpy().astype(kind) for k, v in call.items()}
        assert torch.equal(model(made, padding_mask=None)["pooled_output"], expected)


def test_logits_are_the_token_embedding_reversed(device):
    model = FNetBackbone(**SIZES).to(device)
    hidden = torch.randn(2, 3, 24, device=device)
    torch.testing.assert_close(model.logits(hidden), hidden @ model.token_embedding.weight.t())


def test_without_a_pooler(device):
    whole = FNetBackbone(**SIZES).to(device).eval()
    bare = FNetBackbone(**SIZES, pooler=False).to(device).eval()
    state = whole.state_dict()
    assert state.keys() - bare.state_dict().keys() == {"pooler.weight", "pooler.bias"}
    bare.load_state_dict({name: tensor for name, tensor in state.items() if not name.startswith("pooler.")})
    call = call_of("fnet", inputs_of("fnet"))
    out = bare(call)
    assert list(out) == ["sequence_output"]
    assert torch.equal(out["sequence_output"], whole(call)["sequence_output"])


GOOD = {"token_ids": torch.zeros(2, 5, dtype=torch.int64), "segment_ids": torch.zeros(2, 5, dtype=torch.int64)}


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"padding_mask": torch.ones(2, 5)}, ValueError, "padding_mask is given; FNet mixes every position into every"),
        ({"segment_ids": torch.full((2, 5), 4)}, IndexError, "segment_ids holds 4; it takes 0 to 3"),
        ({"segment_ids": torch.zeros(2, 4).long()}, ValueError, r"segment_ids has shape \(2, 4\)"),
        ({"position_ids": torch.full((2, 5), 40)}, IndexError, "position_ids holds 40; it takes 0 to 39"),
        ({"token_ids": torch.zeros(2, 41).long(), "segment_ids": None}, ValueError, "length 41.*sequence_length = 40"),
    ],
)
def test_bad_input_is_refused_by_name(change, error, message, device):
    model = FNetBackbone(**SIZES).to(device)
    with pytest.raises(error, match=message):
        model({**GOOD, **change})


def test_more_bad_input(device):
    model = FNetBackbone(**SIZES).to(device)
    with pytest.raises(
        ValueError, match=r"segment_ids is missing; it takes \(B, S\) integers, or None where all are 0"
    ):
        model(token_ids=GOOD["token_ids"])
    with pytest.raises(TypeError, match="FNetBackbone"):
        pyfused.Generator(model)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"num_segments": 1.5}, TypeError, "num_segments is 1.5"),
        ({"activation": None}, ValueError, "activation is None"),
        ({"pooler": None}, TypeError, "pooler is None"),
        ({"num_heads": 5}, TypeError, "unknown argument 'num_heads'"),
    ],
)
def test_bad_configurations_are_refused_by_name(change, error, message):
    with pytest.raises(error, match=message):
        FNetBackbone(**{**SIZES, **change})
