"""Does GPT-2 equal its two originals run live, in every dtype, and refuse what it cannot do?"""

import copy

import numpy as np
import pytest
import torch
from gpt2_cases import gpt2_arguments, hf_gpt2, like_hf

import pyfused
from pyfused import GPT2Backbone
from pyfused.testing import assert_close

SIZES = {"vocabulary_size": 61, "num_layers": 2, "num_heads": 4, "hidden_dim": 24, "intermediate_dim": 56}


def ids_of(shape, vocabulary=61, seed=0):
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def against_hf(hf, ids, mask, dtype, device, **call):
    """Same weights rounded to dtype: transformers in float64, transformers in dtype, pyfused in dtype."""
    rounded = copy.deepcopy(hf).to(dtype)
    wide = copy.deepcopy(rounded).double()
    with torch.no_grad():
        truth = wide(ids, attention_mask=mask).last_hidden_state
        plain = rounded(ids, attention_mask=mask).last_hidden_state
        actual = like_hf(rounded).to(device)(token_ids=ids, padding_mask=mask, **call)
    assert actual.dtype == dtype
    return actual, plain, truth


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_equals_transformers(dtype, padding, device):
    ids = ids_of((3, 17))
    mask = torch.ones_like(ids)
    if padding == "right":
        mask[1, 9:] = 0
    if padding == "left":
        mask[1, :4], mask[2, :16] = 0, 0
    options = {"activation_function": "gelu", "layer_norm_epsilon": 1e-3, "scale_attn_by_inverse_layer_idx": True}
    for config in ({}, options):
        hf = hf_gpt2(spread=0.2, **config)
        assert_close(*against_hf(hf, ids, mask, dtype, device), f"{dtype} {padding} {config}")


def test_equals_transformers_at_base_size(device):
    hf = hf_gpt2(n_layer=12, n_head=12, n_embd=768, n_inner=None, vocab_size=500, n_positions=128, spread=0.02)
    assert_close(*against_hf(hf, ids_of((1, 96), 500), None, torch.float32, device))


def keras_gpt2(dtype, **sizes):
    import keras_hub

    return keras_hub.models.GPT2Backbone(**sizes, dtype=dtype)


def from_keras(backbone):
    """The state dict of KerasHub's GPT2Backbone under pyfused's names."""

    def array(variable):
        return variable.value.detach().cpu().clone()

    state = {
        "token_embedding.weight": array(backbone.token_embedding.embeddings),
        "position_embedding.weight": array(backbone.position_embedding.position_embeddings),
        "final_norm.weight": array(backbone.layer_norm.gamma),
        "final_norm.bias": array(backbone.layer_norm.beta),
    }
    for i, layer in enumerate(backbone.transformer_layers):
        attention, ours = layer._self_attention_layer, f"layers.{i}."
        norms = {"attention_norm": layer._self_attention_layer_norm, "feed_forward_norm": layer._feedforward_layer_norm}
        for name, norm in norms.items():
            state[f"{ours}{name}.weight"], state[f"{ours}{name}.bias"] = array(norm.gamma), array(norm.beta)
        parts = [attention.query_dense, attention.key_dense, attention.value_dense]
        state[f"{ours}attention.query_key_value.weight"] = torch.cat([array(p.kernel).flatten(1).t() for p in parts])
        state[f"{ours}attention.query_key_value.bias"] = torch.cat([array(p.bias).flatten() for p in parts])
        state[f"{ours}attention.output.weight"] = array(attention.output_dense.kernel).flatten(0, 1).t()
        state[f"{ours}attention.output.bias"] = array(attention.output_dense.bias)
        for name, dense in (
            ("inner", layer._feedforward_intermediate_dense),
            ("outer", layer._feedforward_output_dense),
        ):
            state[f"{ours}feed_forward.{name}.weight"] = array(dense.kernel).t()
            state[f"{ours}feed_forward.{name}.bias"] = array(dense.bias)
    return state


@pytest.mark.parametrize("hidden_dim", [24, 26], ids=["divisible", "not-divisible"])
def test_equals_keras_hub(hidden_dim, device):
    sizes = {**SIZES, "hidden_dim": hidden_dim, "max_sequence_length": 40}
    keras = keras_gpt2("float32", **sizes)
    for weight in keras.weights:
        values = 0.2 * torch.randn(tuple(weight.shape)) + (1.0 if weight.path.endswith("gamma") else 0.0)
        weight.assign(values.numpy())
    wide = keras_gpt2("float64", **sizes)
    for target, weight in zip(wide.weights, keras.weights):
        target.assign(weight)
    ids, mask = ids_of((3, 17)).numpy(), np.ones((3, 17), "int32")
    mask[1, 9:], mask[2, :4] = 0, 0
    inputs = {"token_ids": ids, "padding_mask": mask}
    model = GPT2Backbone(**sizes)
    model.load_state_dict(from_keras(keras))
    with torch.no_grad():
        truth, plain = wide(inputs).double(), keras(inputs)
        assert_close(model.eval().to(device)(inputs), plain, truth)
        logits = model.token_embedding(model(inputs), reverse=True)
        wide_logits = wide.token_embedding(wide(inputs), reverse=True).double()
        assert_close(logits, keras.token_embedding(keras(inputs), reverse=True), wide_logits)


def test_a_query_that_sees_no_key_gets_zeros(device):
    model = GPT2Backbone(**{**SIZES, "num_layers": 1}).to(device).eval()
    ids, mask = ids_of((2, 5)), torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]])
    out = model(token_ids=ids, padding_mask=mask, return_attentions=True, return_hidden_states=True)
    dead = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool, device=device)
    assert out.attentions[0].transpose(1, 2)[dead].abs().max() == 0
    layer = model.layers[0]
    with torch.no_grad():  # attention gives zeros, and its output projection's bias is zero here
        x = out.hidden_states[0]
        alone = model.final_norm(x + layer.feed_forward(layer.feed_forward_norm(x)))
    torch.testing.assert_close(out.last_hidden_state[dead], alone[dead])
    assert not torch.isnan(out.last_hidden_state).any()


def test_left_padding_leaves_what_a_text_gives(device):
    model = GPT2Backbone(**SIZES).to(device).eval()
    ids = ids_of((1, 6))
    padded = torch.cat([ids_of((1, 3), seed=1), ids], 1)
    mask = torch.tensor([[0] * 3 + [1] * 6])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        alone = model(token_ids=ids, padding_mask=None)
        beside = model(token_ids=padded, padding_mask=mask, position_ids=positions)[:, 3:]
        twice = {"token_ids": padded.expand(2, -1), "padding_mask": mask.expand(2, -1)}
        both = model(twice, position_ids=positions)[:, 3:]  # (1, S) for all rows
    torch.testing.assert_close(alone, beside)
    torch.testing.assert_close(alone.expand_as(both), both)
    with torch.no_grad():
        shifted = model(token_ids=padded, padding_mask=mask)[:, 3:]
    assert (alone - shifted).abs().max() > 1e-3  # as in both originals, positions count from the padding unless given


@pytest.mark.parametrize(
    "kind", [np.int64, np.int32, np.uint16, np.bool_, np.float32, torch.int8, torch.float16], ids=str
)
def test_any_dtype_of_mask_and_ids(kind, device):
    model = GPT2Backbone(**SIZES).to(device).eval()
    ids, mask = ids_of((2, 7)), torch.ones(2, 7)
    mask[1, 5:] = 0
    expected = model(token_ids=ids, padding_mask=mask)
    cast = mask.to(kind) if isinstance(kind, torch.dtype) else mask.numpy().astype(kind)
    if kind in (np.float32, torch.float16):
        cast[1, 6] = 0.4  # Keras casts to int32
        token_ids = ids
    elif kind is np.bool_:
        token_ids = ids.numpy()
    else:
        token_ids = ids.to(kind) if isinstance(kind, torch.dtype) else ids.numpy().astype(kind)
    assert torch.equal(model({"token_ids": token_ids, "padding_mask": cast}), expected)


def test_a_mask_of_ones_is_no_mask(device):
    model = GPT2Backbone(**SIZES).to(device).eval()
    ids = ids_of((2, 7))
    assert torch.equal(
        model(token_ids=ids, padding_mask=None), model({"token_ids": ids.numpy()}, padding_mask=np.ones((2, 7)))
    )


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
def test_empty(shape, device):
    model = GPT2Backbone(**SIZES).to(device)
    out = model(token_ids=torch.zeros(shape, dtype=torch.int64), padding_mask=np.zeros(shape))
    assert out.shape == (*shape, 24)


def test_config_round_trip():
    model = GPT2Backbone(
        **SIZES, dropout=0.2, dtype="bfloat16", activation="relu", attention_dropout=0.0, tie_embedding_weights=False,
        name="small", trainable=False, cross_attention=True,
    )  # fmt: skip
    again = GPT2Backbone.from_config(model.get_config())
    assert again.get_config() == model.get_config()
    assert {k: (v.shape, v.dtype) for k, v in again.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in model.state_dict().items()
    }
    assert again.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in again.parameters())
    assert again.name == "small"
    assert model.to(torch.float32).get_config()["dtype"] == "float32"


def test_untied_reverse_embedding(device):
    model = GPT2Backbone(**SIZES, tie_embedding_weights=False).to(device)
    hidden = torch.randn(2, 3, 24, device=device)
    expected = hidden @ model.token_embedding.reverse_weight.t()
    torch.testing.assert_close(model.token_embedding(hidden, reverse=True), expected)
    assert (expected - hidden @ model.token_embedding.weight.t()).abs().max() > 1e-3


def test_parameter_names_and_initial_weights():
    model = GPT2Backbone(**{**SIZES, "num_layers": 8, "hidden_dim": 128}, cross_attention=True)
    names = set(dict(model.named_parameters()))
    assert {"token_embedding.weight", "position_embedding.weight", "final_norm.weight", "final_norm.bias"} < names
    layer = {n.removeprefix("layers.7.") for n in names if n.startswith("layers.7.")}
    modules = [
        "attention_norm",
        "attention.query_key_value",
        "attention.output",
        "feed_forward_norm",
        "feed_forward.inner",
    ]
    modules += ["feed_forward.outer", "cross_attention_norm"]
    modules += [f"cross_attention.{part}" for part in ("query", "key_value", "output")]
    assert layer == {f"{m}.{kind}" for m in modules for kind in ("weight", "bias")}
    assert abs(model.layers[3].attention.query_key_value.weight.std().item() / 0.02 - 1) < 0.03
    assert abs(model.layers[3].feed_forward.outer.weight.std().item() / (0.02 / 16**0.5) - 1) < 0.05
    assert model.layers[3].attention.output.bias.abs().max() == 0
    assert (model.final_norm.weight == 1).all()


GOOD = {"token_ids": torch.zeros(2, 5, dtype=torch.int64), "padding_mask": None}
CROSS = {"encoder_hidden_states": torch.zeros(2, 3, 24), "padding_mask": None}


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"token_ids": None}, ValueError, "token_ids is missing"),
        ({"segment_ids": 1}, ValueError, "unknown key 'segment_ids'"),
        ({"token_ids": [[1, 2]]}, TypeError, "token_ids is a list"),
        ({"token_ids": torch.zeros(2, 5)}, TypeError, "token_ids is float32"),
        ({"token_ids": np.array([["a"]])}, TypeError, "token_ids is a numpy array"),
        ({"token_ids": torch.zeros(5, dtype=torch.int64)}, ValueError, r"token_ids has shape \(5,\)"),
        ({"token_ids": torch.full((2, 5), 61)}, IndexError, "token_ids holds 61; it takes 0 to 60"),
        ({"token_ids": torch.full((2, 5), -1)}, IndexError, "token_ids holds -1"),
        ({"token_ids": torch.zeros(2, 41, dtype=torch.int64)}, ValueError, "length 41; it takes at most max_sequence"),
        ({"padding_mask": torch.ones(2, 4)}, ValueError, r"padding_mask has shape \(2, 4\).*\(B, Sk\) = \(2, 5\)"),
        ({"padding_mask": 1}, TypeError, "padding_mask is a int"),
        ({"token_type_ids": torch.full((2, 5), 61)}, IndexError, "token_type_ids holds 61"),
        ({"token_type_ids": torch.zeros(2, 4, dtype=torch.int64)}, ValueError, "token_type_ids has shape"),
        ({"position_ids": torch.full((2, 5), 40)}, IndexError, "position_ids holds 40; it takes 0 to 39"),
        ({"inputs_embeds": torch.zeros(2, 5, 24)}, ValueError, "inputs_embeds is given beside token_ids"),
        ({"inputs_embeds": torch.zeros(2, 5, 8), "token_ids": None}, ValueError, "inputs_embeds has shape"),
        ({"inputs_embeds": torch.zeros(2, 5, 24).int(), "token_ids": None}, TypeError, "inputs_embeds is int32"),
        ({"attention_mask": torch.ones(2, 5)}, ValueError, r"attention_mask has shape \(2, 5\).*padding_mask"),
        ({"attention_mask": torch.ones(2, 1, 5, 5).long()}, TypeError, "attention_mask is int64"),
        ({"packed": True}, ValueError, "packed=True needs position_ids"),
        ({"encoder_hidden_states": torch.zeros(2, 3, 24)}, ValueError, "without cross-attention"),
        ({"cache": "yes"}, TypeError, "cache is a str"),
    ],
)
def test_bad_input_is_refused_by_name(change, error, message, device):
    model = GPT2Backbone(**SIZES, max_sequence_length=40).to(device)
    with pytest.raises(error, match=message):
        model({**GOOD, **change})


def test_more_bad_input(device):
    model = GPT2Backbone(**SIZES, max_sequence_length=40).to(device)
    with pytest.raises(ValueError, match="padding_mask is missing"):
        model(token_ids=GOOD["token_ids"])
    with pytest.raises(TypeError, match="inputs is a Tensor"):
        model(GOOD["token_ids"])
    with pytest.raises(ValueError, match="token_ids is given in the dict and as a keyword"):
        model(GOOD, token_ids=GOOD["token_ids"])
    with pytest.raises(ValueError, match="packed=True takes neither"):
        model(GOOD, packed=True, position_ids=GOOD["token_ids"], attention_mask=torch.ones(2, 1, 5, 5))
    with pytest.raises(ValueError, match="cache has 3 rows"):
        model(GOOD, cache=model.new_cache(3, 8))
    with pytest.raises(ValueError, match="room for 4; it cannot take 5 more"):
        model(GOOD, cache=model.new_cache(2, 4))
    other = GPT2Backbone(**{**SIZES, "num_heads": 2}).to(device)
    with pytest.raises(ValueError, match="cache is for"):
        model(GOOD, cache=other.new_cache(2, 8))
    with pytest.raises(ValueError, match="batch_size is 0"):
        model.new_cache(0)
    cross = GPT2Backbone(**SIZES, cross_attention=True).to(device)
    with pytest.raises(ValueError, match="encoder_padding_mask is given without"):
        cross(GOOD, encoder_padding_mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match="encoder_padding_mask has shape"):
        cross({**GOOD, **CROSS}, encoder_padding_mask=torch.ones(2, 4))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"num_layers": 0}, ValueError, "num_layers is 0"),
        ({"hidden_dim": 24.0}, TypeError, "hidden_dim is 24.0"),
        ({"num_heads": 25}, ValueError, "num_heads is 25 and hidden_dim 24"),
        ({"hidden_dim": 2048}, ValueError, "hidden_dim // num_heads"),
        ({"max_sequence_length": None}, TypeError, "max_sequence_length is None"),
        ({"dropout": 1.0}, ValueError, "dropout is 1.0"),
        ({"attention_dropout": "a"}, TypeError, "attention_dropout is 'a'"),
        ({"activation": "swiglu"}, ValueError, "activation='swiglu'"),
        ({"layer_norm_epsilon": -1.0}, ValueError, "layer_norm_epsilon is -1.0"),
        ({"scale_attention": 1}, TypeError, "scale_attention is 1"),
        ({"dtype": "int8"}, ValueError, "dtype is 'int8'"),
        ({"head_mask": 1}, TypeError, "unknown argument 'head_mask'"),
    ],
)
def test_bad_arguments_are_refused_by_name(change, error, message):
    with pytest.raises(error, match=message):
        GPT2Backbone(**{**SIZES, **change})


def test_a_cache_carries_no_gradient(device):
    model = GPT2Backbone(**SIZES).to(device)
    assert model(GOOD).requires_grad
    assert not model(GOOD, cache=model.new_cache(2, 5)).requires_grad


def test_dropout_sites(device):
    """In training each rate alone changes the output, repeatably for a seed; in evaluation none does."""
    for site in ("embedding_dropout", "attention_dropout", "residual_dropout"):
        model = GPT2Backbone(**SIZES, dropout=0.0, **{site: 0.5}).to(device)
        expected = model.eval()(GOOD)
        torch.manual_seed(7)
        first = model.train()(GOOD)
        torch.manual_seed(7)
        assert torch.equal(model(GOOD), first), site
        assert not torch.equal(model(GOOD), first), site
        assert not torch.equal(expected, first), site
        assert torch.equal(model.eval()(GOOD), expected), site


def test_training_follows_transformers(device):
    """Ten steps of SGD without dropout: the losses meet the tolerance rule against transformers in float64."""
    hf = hf_gpt2(spread=0.1, resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0).train()
    data = ids_of((4, 12)).expand(10, -1, -1)
    mine = GPT2Backbone(**gpt2_arguments(hf.config.to_dict())).train()
    mine.load_state_dict(like_hf(hf).state_dict())
    mine = mine.to(device)

    def losses(model, hidden_of, head_of):
        optimiser = torch.optim.SGD(model.parameters(), lr=0.2)
        out = []
        for ids in data:
            logits = head_of(hidden_of(ids[:, :-1]))
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten().to(logits.device))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            out.append(loss.detach())
        return torch.stack(out)

    def of_hf(model):
        return losses(model, lambda ids: model(ids).last_hidden_state, lambda h: h @ model.wte.weight.t())

    truth, plain = of_hf(copy.deepcopy(hf).double()), of_hf(copy.deepcopy(hf))
    actual = losses(
        mine, lambda ids: mine(token_ids=ids, padding_mask=None), lambda h: mine.token_embedding(h, reverse=True)
    )
    assert truth[-1] < 0.9 * truth[0]
    assert_close(actual, plain, truth)


def test_it_is_exported():
    assert pyfused.GPT2Backbone is GPT2Backbone
