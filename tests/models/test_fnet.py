"""Does FNet equal its two originals run live, in every dtype, train as it should, and refuse what it cannot do?"""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fnet_cases import call_of, fnet_state, hf_fnet, like_hf, outputs_of, reference_outputs

import pyfused
from pyfused import FNetBackbone
from pyfused.testing import assert_close

SIZES = {"vocabulary_size": 61, "num_layers": 2, "hidden_dim": 24, "intermediate_dim": 56, "max_sequence_length": 40}


def inputs_of(rows=3, length=17, vocabulary=61, segments=4):
    """Inputs by transformers' names."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (rows, length), generator=generator)
    return {"input_ids": ids, "token_type_ids": torch.randint(segments, (rows, length), generator=generator)}


def hf_outputs(hf, inputs):
    out = hf(**inputs)
    return {"last_hidden_state": out.last_hidden_state, "pooler_output": out.pooler_output}


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 17, 40])
@pytest.mark.parametrize("config", [{}, {"hidden_act": "gelu", "layer_norm_eps": 1e-3}, {"hidden_act": "relu"}])
def test_equals_transformers(config, length, device):
    hf, inputs = hf_fnet(**config), inputs_of(length=length)
    truth, plain = hf_outputs(copy.deepcopy(hf).double(), inputs), hf_outputs(hf, inputs)
    mine = like_hf(hf).to(device)
    actual, reference = outputs_of(mine, call_of(inputs)), reference_outputs(mine, call_of(inputs))
    for name, value in actual.items():
        assert_close(value, [plain[name], reference[name]], truth[name], f"{config} {length} {name}")


@torch.no_grad()
def test_equals_transformers_at_base_size(device):
    """fnet-base's shape with fewer layers and words; no size is a power of two."""
    hf = hf_fnet(
        spread=0.03, vocab_size=200, num_hidden_layers=3, hidden_size=768, intermediate_size=3072,
        max_position_embeddings=100,
    )  # fmt: skip
    inputs = inputs_of(1, 99, 200)
    truth, plain = hf_outputs(copy.deepcopy(hf).double(), inputs), hf_outputs(hf, inputs)
    mine = like_hf(hf).to(device)
    reference = reference_outputs(mine, call_of(inputs))
    for name, value in outputs_of(mine, call_of(inputs)).items():
        assert_close(value, [plain[name], reference[name]], truth[name], name)


@torch.no_grad()
def test_positions_segments_and_embeddings_given(device):
    hf, inputs = hf_fnet(), inputs_of()
    truth_model = copy.deepcopy(hf).double()
    mine = like_hf(hf).to(device)
    positions = torch.randint(40, (3, 17), generator=torch.Generator().manual_seed(1))
    embeds = hf.embeddings.word_embeddings(inputs["input_ids"])
    ids = {"input_ids": inputs["input_ids"]}
    given = [inputs | {"position_ids": p} for p in (positions, positions[:1])]
    for change in (ids, *given, {"inputs_embeds": embeds}):
        exact = {k: v.double() if v.is_floating_point() else v for k, v in change.items()}
        truth, plain = hf_outputs(truth_model, exact), hf_outputs(hf, change)
        for name, value in outputs_of(mine, call_of(change)).items():
            assert_close(value, [plain[name]], truth[name], f"{list(change)} {name}")


def test_tpu_option_of_transformers_is_the_same_transform():
    """With it, transformers multiplies by Fourier matrices and takes texts of one length only."""
    pytest.importorskip("scipy")
    plain = hf_fnet()
    theirs = hf_fnet(use_tpu_fourier_optimizations=True, tpu_short_seq_length=17)
    inputs = inputs_of()
    with torch.no_grad():
        actual, expected = outputs_of(like_hf(plain), call_of(inputs)), hf_outputs(theirs, inputs)
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name])


def from_keras(backbone):
    """The state dict of KerasHub's FNetBackbone under pyfused's names, read from its attributes."""

    def array(variable, transpose=False):
        value = variable.value.detach().cpu().clone()
        return value.t().contiguous() if transpose else value

    state = {
        "token_embedding.weight": array(backbone.token_embedding.embeddings),
        "position_embedding.weight": array(backbone.position_embedding.position_embeddings),
        "segment_embedding.weight": array(backbone.segment_embedding.embeddings),
    }
    norms = {"embedding_norm": backbone.embeddings_layer_norm}
    linears = {"projection": backbone.embedding_projection, "pooler": backbone.pooled_dense}
    for i, layer in enumerate(backbone.transformer_layers):
        norms |= {f"layers.{i}.mixing_norm": layer._mixing_layer_norm}
        norms |= {f"layers.{i}.feed_forward_norm": layer._output_layer_norm}
        linears |= {f"layers.{i}.feed_forward.inner": layer._intermediate_dense}
        linears |= {f"layers.{i}.feed_forward.outer": layer._output_dense}
    for name, layer in norms.items():
        state |= {f"{name}.weight": array(layer.gamma), f"{name}.bias": array(layer.beta)}
    for name, layer in linears.items():
        state |= {f"{name}.weight": array(layer.kernel, True), f"{name}.bias": array(layer.bias)}
    return state


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_equals_keras_hub(dtype, device):
    """KerasHub transforms in float32 for every dtype, as pyfused does; transformers cannot do 16 bits on a CPU."""
    import keras_hub

    keras = keras_hub.models.FNetBackbone(**SIZES, dtype=dtype)
    for weight in keras.weights:
        weight.assign((1.0 if weight.name == "gamma" else 0.0) + 0.2 * torch.randn(tuple(weight.shape)))
    inputs = {k: v.numpy() for k, v in inputs_of().items()}
    call = call_of(inputs)
    models = {}
    for name in (dtype, "float64"):
        models[name] = FNetBackbone(**SIZES, dtype=name).to(device).eval()
        models[name].load_state_dict(from_keras(keras))
    truth, actual, plain = models["float64"](call), models[dtype](call), keras(call)
    assert plain.keys() == actual.keys()
    with pyfused.backend("reference"):
        reference = models[dtype](call)
    for name, value in actual.items():
        assert value.dtype == getattr(torch, dtype)
        assert_close(value, [plain[name].detach(), reference[name]], truth[name], name)
    logits = keras.token_embedding(plain["sequence_output"], reverse=True)
    exact = models["float64"].logits(truth["sequence_output"])
    mine = models[dtype].logits(actual["sequence_output"])
    with pyfused.backend("reference"):
        reference = models[dtype].logits(reference["sequence_output"])
    assert_close(mine, [logits.detach(), reference], exact, "logits")


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_each_backend_in_16_bits(dtype, each_backend, device):
    rounded = hf_fnet().to(dtype)
    inputs = inputs_of()
    exact = like_hf(rounded, torch.float64)
    with pyfused.backend("reference"):
        truth = outputs_of(exact, call_of(inputs))
    mine = like_hf(rounded).to(device)
    actual, reference = outputs_of(mine, call_of(inputs)), reference_outputs(mine, call_of(inputs))
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
    call = call_of(inputs_of())
    together = model(call)["sequence_output"]
    for row in range(3):
        alone = model({name: value[row : row + 1] for name, value in call.items()})["sequence_output"]
        torch.testing.assert_close(alone, together[row : row + 1])


def test_numpy_and_any_integers(device):
    model = FNetBackbone(**SIZES).to(device).eval()
    call = call_of(inputs_of())
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
    call = call_of(inputs_of())
    out = bare(call)
    assert list(out) == ["sequence_output"]
    assert torch.equal(out["sequence_output"], whole(call)["sequence_output"])


def test_config_round_trip():
    model = FNetBackbone(
        **SIZES, dropout=0.2, num_segments=2, dtype="bfloat16", activation="gelu_pytorch_tanh", layer_norm_epsilon=1e-6,
        pooler=False, name="small", trainable=False,
    )  # fmt: skip
    assert model.get_config()["activation"] == "gelu_new"
    again = FNetBackbone.from_config(model.get_config())
    assert again.get_config() == model.get_config()
    assert {k: (v.shape, v.dtype) for k, v in again.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in model.state_dict().items()
    }
    assert not any(p.requires_grad for p in again.parameters())
    assert model.layers[0].feed_forward.activation == "gelu_tanh"
    assert model.layers[0].mixing_norm.eps == 1e-6


def test_initial_weights_are_those_of_transformers():
    from transformers import FNetConfig, FNetModel

    config = FNetConfig(vocab_size=400, num_hidden_layers=2, hidden_size=256, intermediate_size=512,
                        max_position_embeddings=80)  # fmt: skip
    theirs = fnet_state(FNetModel(config).state_dict())
    mine = FNetBackbone(400, 2, 256, 512, max_sequence_length=80).state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if tensor.dim() == 1:
            assert torch.equal(mine[name], tensor), name
        else:
            assert abs(mine[name].std() / tensor.std() - 1) < 0.1, name


def test_parameter_counts_of_published_models():
    """Sizes come from the presets' configurations, counts from KerasHub's metadata."""
    with torch.device("meta"):
        base, large = FNetBackbone(32000, 12, 768, 3072), FNetBackbone(32000, 24, 1024, 4096)
    for model, name in ((base, "f_net_base_en"), (large, "f_net_large_en")):
        assert sum(p.numel() for p in model.parameters()) == FNetBackbone.presets[name]["metadata"]["params"]


def seeded(call):
    torch.manual_seed(7)
    return call()


def test_dropout_sites(device):
    """If no site drops anything, training equals evaluation; with a rate, the sites are the paper's."""
    model = FNetBackbone(**SIZES, dropout=0.3).to(device)
    call = call_of(inputs_of())
    model.train()
    first, second = (seeded(lambda: model(call)["sequence_output"]) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, model(call)["sequence_output"])

    calls = []
    original = F.dropout

    def counted(x, p, *rest):
        calls.append((tuple(x.shape), p))
        return original(x, 0.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "dropout", counted)
        whole = model(call)["sequence_output"]
    assert calls == [((3, 17, 24), 0.3)] * 3  # after the projection and after each feed-forward network
    with torch.no_grad():
        torch.testing.assert_close(whole, model.eval()(call)["sequence_output"])


def losses(model, forward, steps=30):
    """The loss of each AdamW step; the task is to tell which of ten words comes first."""
    generator = torch.Generator().manual_seed(5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    out = []
    for _ in range(steps):
        ids = torch.randint(2, 12, (8, 6), generator=generator)
        scores = forward(ids)
        loss = F.cross_entropy(scores, ids[:, 0].to(scores.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        out.append(loss.item())
    return torch.tensor(out, dtype=torch.float64)


def test_training_follows_transformers(device):
    hf = hf_fnet(spread=0.1)
    mine = [like_hf(hf, dtype).to(device) for dtype in (torch.float32, torch.float64)]
    ours = [losses(m, lambda ids, m=m: m.logits(m(token_ids=ids, segment_ids=None)["pooled_output"])) for m in mine]
    other = copy.deepcopy(hf)
    table = other.embeddings.word_embeddings.weight
    theirs = losses(other, lambda ids: other(input_ids=ids).pooler_output @ table.t())
    assert ours[1][-1] < 0.9 * ours[1][0]
    with pyfused.backend("reference"):
        plain = like_hf(hf).to(device)
        reference = losses(plain, lambda ids: plain.logits(plain(token_ids=ids, segment_ids=None)["pooled_output"]))
    assert_close(ours[0], [theirs, reference], ours[1], "losses")


GOOD = {"token_ids": torch.zeros(2, 5, dtype=torch.int64), "segment_ids": torch.zeros(2, 5, dtype=torch.int64)}


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"token_ids": None}, ValueError, "token_ids is missing"),
        ({"padding_mask": torch.ones(2, 5)}, ValueError, "padding_mask is given; FNet mixes every position into every"),
        ({"attention_mask": 1}, ValueError, "unknown key 'attention_mask'; it takes token_ids, segment_ids"),
        ({"token_ids": [[1]]}, TypeError, "token_ids is a list"),
        ({"token_ids": torch.zeros(2, 5)}, TypeError, "token_ids is float32"),
        ({"token_ids": torch.full((2, 5), 61)}, IndexError, "token_ids holds 61; it takes 0 to 60"),
        ({"token_ids": torch.full((2, 5), -1)}, IndexError, "token_ids holds -1"),
        ({"segment_ids": torch.full((2, 5), 4)}, IndexError, "segment_ids holds 4; it takes 0 to 3"),
        ({"segment_ids": torch.zeros(2, 4).long()}, ValueError, r"segment_ids has shape \(2, 4\)"),
        ({"position_ids": torch.full((2, 5), 40)}, IndexError, "position_ids holds 40; it takes 0 to 39"),
        ({"inputs_embeds": torch.zeros(2, 5, 24)}, ValueError, "given beside token_ids"),
        ({"inputs_embeds": torch.zeros(2, 5, 8), "token_ids": None}, ValueError, "inputs_embeds has shape"),
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
    with pytest.raises(TypeError, match="inputs is a Tensor; it takes a dict with token_ids and segment_ids"):
        model(GOOD["token_ids"])
    with pytest.raises(TypeError, match="FNetBackbone"):
        pyfused.Generator(model)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"num_layers": 0}, ValueError, "num_layers is 0"),
        ({"num_segments": 1.5}, TypeError, "num_segments is 1.5"),
        ({"hidden_dim": 24.0}, TypeError, "hidden_dim is 24.0"),
        ({"dropout": 1.0}, ValueError, "dropout is 1.0"),
        ({"activation": "swiglu"}, ValueError, "activation is 'swiglu'; it takes gelu_new"),
        ({"activation": None}, ValueError, "activation is None"),
        ({"layer_norm_epsilon": "a"}, TypeError, "layer_norm_epsilon is 'a'"),
        ({"pooler": None}, TypeError, "pooler is None"),
        ({"dtype": "int8"}, ValueError, "dtype is 'int8'"),
        ({"num_heads": 5}, TypeError, "unknown argument 'num_heads'"),
        ({"name": 3}, TypeError, "name is 3"),
    ],
)
def test_bad_configurations_are_refused_by_name(change, error, message):
    with pytest.raises(error, match=message):
        FNetBackbone(**{**SIZES, **change})


def test_it_is_exported():
    assert pyfused.FNetBackbone is FNetBackbone
