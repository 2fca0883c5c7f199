"""Does ALBERT equal its two originals run live, in every dtype, train as it should, and refuse what it cannot do?"""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from albert_cases import (
    albert_state,
    call_of,
    hf_albert,
    like_hf,
    outputs_of,
    reference_outputs,
)

import pyfused
from pyfused import AlbertBackbone, Generator
from pyfused.testing import assert_close

SIZES = {"vocabulary_size": 61, "num_layers": 4, "num_heads": 4, "embedding_dim": 10, "hidden_dim": 24}
SIZES |= {"intermediate_dim": 56, "num_groups": 2, "num_inner_repetitions": 2, "max_sequence_length": 33}


def ids_of(shape, limit=61, seed=0):
    return torch.randint(limit, shape, generator=torch.Generator().manual_seed(seed))


def inputs_of(rows=3, length=17, padding="none", limit=61):
    """Inputs by transformers' names."""
    inputs = {"input_ids": ids_of((rows, length), limit), "token_type_ids": ids_of((rows, length), 2, 1)}
    if padding != "none":
        mask = torch.ones(rows, length, dtype=torch.int64)
        mask[1, 9:], mask[2, 4:] = 0, 0
        inputs["attention_mask"] = mask.flip(1) if padding == "left" else mask
    return inputs


def hf_outputs(hf, inputs):
    out = hf(**inputs)
    return {"last_hidden_state": out.last_hidden_state, "pooler_output": out.pooler_output}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_equals_transformers(dtype, padding, device):
    inputs = inputs_of(padding=padding)
    uneven = {"num_hidden_layers": 5, "inner_group_num": 1, "hidden_act": "gelu", "layer_norm_eps": 1e-3}
    for config in ({}, uneven, {"num_hidden_groups": 1, "hidden_act": "relu", "type_vocab_size": 3}):
        rounded = hf_albert(**config).to(dtype)
        # Same weights rounded to dtype: pyfused in float64, transformers in dtype, pyfused in dtype
        truth = outputs_of(like_hf(rounded, torch.float64), call_of(inputs))
        plain = hf_outputs(rounded, inputs)
        mine = like_hf(rounded).to(device)
        actual, reference = outputs_of(mine, call_of(inputs)), reference_outputs(mine, call_of(inputs))
        assert actual.keys() == plain.keys()
        for name, value in actual.items():
            assert value.dtype == dtype
            assert_close(value, [plain[name], reference[name]], truth[name], f"{dtype} {padding} {config} {name}")


@torch.no_grad()
def test_equals_transformers_at_base_size(device):
    """ALBERT base's shape, with fewer layers and words."""
    sizes = {"num_hidden_layers": 3, "num_attention_heads": 12, "embedding_size": 128, "hidden_size": 768}
    sizes |= {"intermediate_size": 3072, "max_position_embeddings": 150, "vocab_size": 500, "num_hidden_groups": 1}
    hf = hf_albert(**sizes, inner_group_num=1, spread=0.03)
    inputs = inputs_of(3, 140, "right", 500)
    truth = outputs_of(like_hf(hf, torch.float64), call_of(inputs))
    mine, plain = like_hf(hf).to(device), hf_outputs(hf, inputs)
    reference = reference_outputs(mine, call_of(inputs))
    for name, value in outputs_of(mine, call_of(inputs)).items():
        assert_close(value, [plain[name], reference[name]], truth[name], name)


def from_keras(backbone):
    """The state dict of KerasHub's AlbertBackbone under pyfused's names, read from its attributes."""

    def array(variable, transposed=False):
        value = variable.value.detach().cpu().clone()
        return value.t().contiguous() if transposed else value

    def norm(ours, layer):
        return {f"{ours}.weight": array(layer.gamma), f"{ours}.bias": array(layer.beta)}

    def dense(ours, layer):
        return {f"{ours}.weight": array(layer.kernel, True), f"{ours}.bias": array(layer.bias)}

    state = {
        "token_embedding.weight": array(backbone.token_embedding.embeddings),
        "position_embedding.weight": array(backbone.position_embedding.position_embeddings),
        "segment_embedding.weight": array(backbone.segment_embedding.embeddings),
        **norm("embedding_norm", backbone.embeddings_layer_norm),
        **dense("projection", backbone.embeddings_projection),
        **dense("pooler", backbone.pooled_dense),
    }
    for i, group in enumerate(backbone.transformer_layers):
        for j, layer in enumerate(group):
            ours, attention = f"layers.{i}.{j}", layer._self_attention_layer
            parts = [getattr(attention, f"{name}_dense") for name in ("query", "key", "value")]
            width = parts[0].kernel.shape[0]
            rows = [array(part.kernel).reshape(width, -1).t() for part in parts]
            state[f"{ours}.attention.query_key_value.weight"] = torch.cat(rows)
            state[f"{ours}.attention.query_key_value.bias"] = torch.cat([array(part.bias).flatten() for part in parts])
            output = attention.output_dense
            state[f"{ours}.attention.output.weight"] = array(output.kernel).reshape(-1, width).t().contiguous()
            state[f"{ours}.attention.output.bias"] = array(output.bias)
            state |= norm(f"{ours}.attention_norm", layer._self_attention_layer_norm)
            state |= dense(f"{ours}.feed_forward.inner", layer._feedforward_intermediate_dense)
            state |= dense(f"{ours}.feed_forward.outer", layer._feedforward_output_dense)
            state |= norm(f"{ours}.feed_forward_norm", layer._feedforward_layer_norm)
    return state


@torch.no_grad()
@pytest.mark.parametrize("heads", [4, 5])
def test_equals_keras_hub(heads, device):
    """Also with 5 heads of 4 in a width of 24, which transformers refuses because 5 does not divide 24."""
    import keras_hub

    sizes = SIZES | {"num_heads": heads}
    keras = keras_hub.models.AlbertBackbone(**sizes, dtype="float32")
    for weight in keras.weights:
        weight.assign(0.3 * torch.randn(tuple(weight.shape)))
    inputs = inputs_of(padding="right")
    call = {name: value.numpy() for name, value in call_of(inputs).items()}
    models = {}
    for dtype in ("float32", "float64"):
        models[dtype] = AlbertBackbone(**sizes, dtype=dtype).to(device).eval()
        models[dtype].load_state_dict(from_keras(keras))
    truth, actual, plain = models["float64"](call), models["float32"](call), keras(call)
    assert plain.keys() == actual.keys()
    with pyfused.backend("reference"):
        reference = models["float32"](call)
    for name, value in actual.items():
        assert_close(value, [plain[name], reference[name]], truth[name], name)
    vectors = torch.randn(3, 10)
    logits = [models[d].token_embedding(vectors.to(device, getattr(torch, d)), reverse=True) for d in models]
    plain = keras.token_embedding(vectors, reverse=True)
    assert_close(logits[0], [plain], logits[1], "logits")


@torch.no_grad()
def test_layers_of_groups():
    """Each application's group follows transformers' rule; compares with its own model's attentions."""
    for layers, groups in ((5, 2), (7, 3), (4, 4), (6, 1), (2, 3), (12, 7)):
        config = {"num_hidden_layers": layers, "num_hidden_groups": groups, "inner_group_num": 1}
        hf = hf_albert(torch.float64, attention="eager", **config)
        mine = like_hf(hf)
        out = mine(call_of(inputs_of()), return_attentions=True)
        theirs = hf(**inputs_of(), output_attentions=True).attentions
        assert len(out["attentions"]) == layers
        for a, b in zip(out["attentions"], theirs):
            torch.testing.assert_close(a, b)


def test_other_inputs(device):
    model = AlbertBackbone(**SIZES).to(device).eval()
    call = call_of(inputs_of(padding="left"))
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
    call = call_of(inputs_of(2, 5)) | {"padding_mask": torch.tensor([[0] * 5, [1] * 5])}
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


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.bool_, np.float32, torch.int8, torch.float16], ids=str)
def test_any_dtype_of_mask(kind, device):
    model = AlbertBackbone(**SIZES).to(device).eval()
    call = call_of(inputs_of(padding="right"))
    expected = model(call)["sequence_output"]
    mask = call["padding_mask"]
    call["padding_mask"] = mask.to(kind) if isinstance(kind, torch.dtype) else mask.numpy().astype(kind)
    assert torch.equal(model(call)["sequence_output"], expected)


def test_config_round_trip():
    model = AlbertBackbone(
        **SIZES, dropout=0.2, num_segments=3, activation="gelu_pytorch_tanh", layer_norm_epsilon=1e-6, dtype="bfloat16",
        attention_dropout=0.1, feed_forward_dropout=0.0, pooler=False, name="small", trainable=False,
    )  # fmt: skip
    again = AlbertBackbone.from_config(model.get_config())
    assert again.get_config() == model.get_config()
    assert again.get_config()["activation"] == "gelu_new"
    assert {k: (v.shape, v.dtype) for k, v in again.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in model.state_dict().items()
    }
    assert not any(p.requires_grad for p in again.parameters())
    assert again.pooler is None
    assert list(again(call_of(inputs_of()))) == ["sequence_output"]


def test_initial_weights_are_those_of_transformers():
    from transformers import AlbertConfig, AlbertModel

    config = AlbertConfig(vocab_size=400, num_hidden_layers=2, num_attention_heads=8, embedding_size=128, hidden_size=256,
                          intermediate_size=512)  # fmt: skip
    theirs = albert_state(AlbertModel(config).state_dict())
    mine = AlbertBackbone(400, 2, 8, 128, 256, 512).state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert mine[name].shape == tensor.shape
        if name.endswith((".bias", "norm.weight")):
            assert torch.equal(mine[name], tensor)
        elif "segment" not in name:
            assert abs(mine[name].std() / tensor.std() - 1) < 0.05, name


def test_parameter_counts_of_published_models():
    """Sizes come from the presets' configurations, counts from KerasHub's metadata."""
    sizes = {"albert_base_en_uncased": (12, 12, 768), "albert_extra_extra_large_en_uncased": (12, 64, 4096)}
    for name, (layers, heads, width) in sizes.items():
        with torch.device("meta"):
            model = AlbertBackbone(30000, layers, heads, 128, width, 4 * width)
        count = sum(p.numel() for p in model.parameters())
        assert count == AlbertBackbone.presets[name]["metadata"]["params"]


def test_dropout_sites(device):
    """If no site drops anything, training equals evaluation; with a rate, the sites are the paper's."""
    call = call_of(inputs_of())
    embedded, wide = ("dropout", 0.3, (3, 17, 10)), ("dropout", 0.3, (3, 17, 24))
    for options, attention_rate, behind in (
        ({}, 0.3, [wide]),  # KerasHub's
        ({"feed_forward_dropout": 0.0}, 0.3, []),  # transformers'
        ({"attention_dropout": 0.2, "feed_forward_dropout": 0.1}, 0.2, [("dropout", 0.1, (3, 17, 24))]),
    ):
        model = AlbertBackbone(**SIZES, dropout=0.3, **options).to(device).train()
        first, second = (seeded(lambda model=model: model(call)["sequence_output"]) for _ in range(2))
        assert torch.equal(first, second)
        assert not torch.equal(first, model(call)["sequence_output"])

        calls = []
        original, attention = F.dropout, pyfused.nn.attention.attention

        def counted(x, p, *rest, calls=calls, original=original):
            calls.append(("dropout", p, tuple(x.shape)))
            return original(x, 0.0)

        def plain(*args, dropout_p, calls=calls, attention=attention, **kwargs):
            calls.append(("attention", dropout_p))
            return attention(*args, dropout_p=0.0, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(F, "dropout", counted)
            patch.setattr(pyfused.nn.attention, "attention", plain)
            whole = model(call)["sequence_output"]
        assert calls == [embedded, *[("attention", attention_rate), wide, *behind] * 8]
        with torch.no_grad():
            torch.testing.assert_close(whole, model.eval()(call)["sequence_output"])


def seeded(call):
    torch.manual_seed(7)
    return call()


def losses(model, forward, steps=30):
    """The loss of each AdamW step; the task is to tell the ids apart by a linear readout of the first dimensions."""
    generator = torch.Generator().manual_seed(5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    out = []
    for _ in range(steps):
        ids = torch.randint(2, 12, (8, 6), generator=generator)
        scores = forward(ids)[..., :12].flatten(0, 1)
        loss = F.cross_entropy(scores, ids.flip(1).flatten().to(scores.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        out.append(loss.item())
    return torch.tensor(out, dtype=torch.float64)


def test_training_follows_transformers(device):
    """Shared weights get the gradients from all their applications."""
    hf = hf_albert(spread=0.1)

    def ours(model):
        return losses(model, lambda ids: model(call_of({"input_ids": ids}))["sequence_output"])

    mine = [ours(like_hf(hf, dtype).to(device)) for dtype in (torch.float32, torch.float64)]
    other = copy.deepcopy(hf)
    theirs = losses(other, lambda ids: other(input_ids=ids).last_hidden_state)
    assert mine[1][-1] < 0.9 * mine[1][0]
    with pyfused.backend("reference"):
        reference = ours(like_hf(hf).to(device))
    assert_close(mine[0], [theirs, reference], mine[1], "losses")


GOOD = {"token_ids": torch.zeros(2, 5, dtype=torch.int64), "segment_ids": None, "padding_mask": None}


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"token_ids": None}, ValueError, "token_ids is missing"),
        ({"head_mask": 1}, ValueError, "unknown key 'head_mask'; it takes token_ids, segment_ids, padding_mask"),
        ({"token_ids": [[1]]}, TypeError, "token_ids is a list"),
        ({"token_ids": torch.zeros(2, 5)}, TypeError, "token_ids is float32"),
        ({"token_ids": torch.full((2, 5), 61)}, IndexError, "token_ids holds 61; it takes 0 to 60"),
        ({"segment_ids": torch.full((2, 5), 2)}, IndexError, "segment_ids holds 2; it takes 0 to 1"),
        ({"segment_ids": torch.zeros(2, 4).long()}, ValueError, r"segment_ids has shape \(2, 4\)"),
        ({"padding_mask": torch.ones(2, 4)}, ValueError, r"padding_mask has shape \(2, 4\).*\(B, S\) = \(2, 5\)"),
        ({"padding_mask": 1}, TypeError, "padding_mask is a int"),
        ({"position_ids": torch.full((2, 5), 33)}, IndexError, "position_ids holds 33; it takes 0 to 32"),
        ({"inputs_embeds": torch.zeros(2, 5, 10)}, ValueError, "given beside token_ids"),
        ({"inputs_embeds": torch.zeros(2, 5, 24), "token_ids": None}, ValueError, r"inputs_embeds has shape"),
        ({"token_ids": torch.zeros(2, 34).long()}, ValueError, "length 34; it takes at most max_sequence_length = 33"),
    ],
)
def test_bad_input_is_refused_by_name(change, error, message, device):
    model = AlbertBackbone(**SIZES).to(device)
    with pytest.raises(error, match=message):
        model({**GOOD, **change})


def test_more_bad_input(device):
    model = AlbertBackbone(**SIZES).to(device)
    for name in ("segment_ids", "padding_mask"):
        with pytest.raises(ValueError, match=f"{name} is missing"):
            model({k: v for k, v in GOOD.items() if k != name})
    with pytest.raises(TypeError, match="inputs is a Tensor; it takes a dict with token_ids and segment_ids"):
        model(GOOD["token_ids"])
    with pytest.raises(TypeError, match=r"AlbertBackbone gives hidden states; the head .* is no part of it"):
        model.logits(torch.zeros(2, 5, 24))
    with pytest.raises(TypeError, match="model is a AlbertBackbone; it takes a GPT2Backbone or a T5Backbone"):
        Generator(model)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"num_layers": 0}, ValueError, "num_layers is 0"),
        ({"num_groups": 1.5}, TypeError, "num_groups is 1.5"),
        ({"num_inner_repetitions": 0}, ValueError, "num_inner_repetitions is 0"),
        ({"embedding_dim": True}, TypeError, "embedding_dim is True"),
        ({"num_heads": 25}, ValueError, "num_heads is 25 and hidden_dim 24"),
        ({"num_segments": 0}, ValueError, "num_segments is 0"),
        ({"dropout": 1.0}, ValueError, "dropout is 1.0"),
        ({"attention_dropout": -0.1}, ValueError, "attention_dropout is -0.1"),
        ({"feed_forward_dropout": "no"}, TypeError, "feed_forward_dropout is 'no'"),
        ({"activation": "swiglu"}, ValueError, "activation is 'swiglu'; it takes gelu_new"),
        ({"layer_norm_epsilon": -1.0}, ValueError, "layer_norm_epsilon is -1.0"),
        ({"pooler": 1}, TypeError, "pooler is 1; it takes True or False"),
        ({"dtype": "int8"}, ValueError, "dtype is 'int8'"),
        ({"key_value_dim": 5}, TypeError, "unknown argument 'key_value_dim'"),
        ({"name": 3}, TypeError, "name is 3"),
    ],
)
def test_bad_configurations_are_refused_by_name(change, error, message):
    with pytest.raises(error, match=message):
        AlbertBackbone(**{**SIZES, **change})
