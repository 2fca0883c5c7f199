"""Does T5 equal its two originals run live, in every dtype, train as it should, and refuse what it cannot do?"""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from t5_cases import call_of, hf_t5, like_hf, outputs_of, reference_outputs, t5_state

import pyfused
from pyfused import T5Backbone
from pyfused.testing import assert_close

SIZES = {"vocabulary_size": 61, "num_layers": 2, "num_heads": 4, "hidden_dim": 24, "intermediate_dim": 56}


def ids_of(shape, vocabulary=61, seed=0):
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def inputs_of(rows=3, source=17, target=9, padding="none", vocabulary=61):
    """Inputs by transformers' names."""
    inputs = {
        "input_ids": ids_of((rows, source), vocabulary),
        "decoder_input_ids": ids_of((rows, target), vocabulary, 1),
    }
    if padding != "none":
        mask, behind = torch.ones(rows, source, dtype=torch.int64), torch.ones(rows, target, dtype=torch.int64)
        mask[1, 9:], mask[2, :4] = 0, 0
        behind[1, 5:] = 0
        if padding == "left":
            mask, behind = mask.flip(1), behind.flip(1)
        inputs |= {"attention_mask": mask, "decoder_attention_mask": behind}
    return inputs


def hf_outputs(hf, inputs):
    out = hf(**inputs, output_hidden_states=True)
    return {
        "encoder_last_hidden_state": out.encoder_last_hidden_state,
        "last_hidden_state": out.decoder_hidden_states[-1],
        "logits": out.logits,
    }


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_equals_transformers(dtype, padding, device):
    inputs = inputs_of(padding=padding)
    alone = {"feed_forward_proj": "relu", "num_decoder_layers": 3, "relative_attention_num_buckets": 8}
    alone |= {"relative_attention_max_distance": 11, "layer_norm_epsilon": 1e-3}
    for config in ({}, {"tie_word_embeddings": False, "feed_forward_proj": "gelu"}, alone):
        rounded = hf_t5(**config).to(dtype)
        # Same weights rounded to dtype: pyfused in float64, transformers in dtype, pyfused in dtype. transformers' norm
        # loses precision in float64; the golden cases show that pyfused in float64 is the truth.
        truth = outputs_of(like_hf(rounded, torch.float64), call_of(inputs))
        plain = hf_outputs(rounded, inputs)
        mine = like_hf(rounded).to(device)
        actual, reference = outputs_of(mine, call_of(inputs)), reference_outputs(mine, call_of(inputs))
        seen = inputs.get("decoder_attention_mask", torch.ones_like(inputs["decoder_input_ids"])).cumsum(1) > 0
        for name, value in actual.items():
            assert value.dtype == dtype
            rows = torch.ones(value.shape[:2], dtype=torch.bool) if name.startswith("encoder") else seen
            what = f"{dtype} {padding} {config} {name}"
            plains = [plain[name][rows], reference[name].cpu()[rows]]
            assert_close(value.cpu()[rows], plains, truth[name][rows], what)


@torch.no_grad()
def test_equals_transformers_at_base_size(device):
    """T5 1.1's shape, with fewer layers and words; source and target beyond max_distance."""
    sizes = {"num_layers": 3, "num_heads": 12, "d_model": 768, "d_ff": 2048, "d_kv": 64, "vocab_size": 500}
    hf = hf_t5(**sizes, spread=0.03)
    inputs = inputs_of(1, 150, 140, vocabulary=500)
    truth = outputs_of(like_hf(hf, torch.float64), call_of(inputs))
    mine, plain = like_hf(hf).to(device), hf_outputs(hf, inputs)
    reference = reference_outputs(mine, call_of(inputs))
    for name, value in outputs_of(mine, call_of(inputs)).items():
        assert_close(value, [plain[name], reference[name]], truth[name], name)


def from_keras(backbone):
    """The state dict of KerasHub's T5Backbone under pyfused's names, read from its attributes."""

    def array(variable, transpose=False):
        value = variable.value.detach().cpu().clone()
        return value.t().contiguous() if transpose else value

    def rows(attention, *names):
        return torch.cat([array(getattr(attention, f"{name}_projector").kernel, True) for name in names])

    embedding = backbone.token_embedding
    state = {"token_embedding.weight": array(embedding.embeddings)}
    if not embedding.tie_weights:
        state["token_embedding.reverse_weight"] = array(embedding.reverse_embeddings, True)
    for stack in ("encoder", "decoder"):
        for i, layer in enumerate(getattr(backbone, f"{stack}_transformer_layers")):
            ours, attention = f"{stack}.layers.{i}.", layer.self_attention
            state[ours + "attention_norm.weight"] = array(layer.self_attention_layer_norm.weight)
            state[ours + "attention.query_key_value.weight"] = rows(attention, "query", "key", "value")
            state[ours + "attention.output.weight"] = rows(attention, "output")
            if i == 0:
                state[ours + "attention.relative_bias"] = array(attention.relative_attention_bias)
            if stack == "decoder":
                attention = layer.cross_attention
                state[ours + "cross_attention_norm.weight"] = array(layer.cross_attention_layer_norm.weight)
                state[ours + "cross_attention.query.weight"] = rows(attention, "query")
                state[ours + "cross_attention.key_value.weight"] = rows(attention, "key", "value")
                state[ours + "cross_attention.output.weight"] = rows(attention, "output")
            state[ours + "feed_forward_norm.weight"] = array(layer.layer_norm.weight)
            names = {"gate": "input", "up": "gate"} if layer.use_gated_activation else {"inner": "input"}
            for name, theirs in (names | {"outer": "output"}).items():
                state[f"{ours}feed_forward.{name}.weight"] = array(getattr(layer, f"{theirs}_projector").kernel, True)
        state[f"{stack}.final_norm.weight"] = array(getattr(backbone, f"{stack}_layer_norm").weight)
    return state


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Layer .* was passed an input with a mask:UserWarning")
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_equals_keras_hub(kind, device):
    import keras_hub
    from keras_hub.src.utils.keras_utils import gelu_approximate

    # Their defaults, the same as ours; then every choice the other way.
    options = (
        {} if kind == "tied" else {"activation": gelu_approximate, "key_value_dim": 7, "tie_embedding_weights": False}
    )
    keras = keras_hub.models.T5Backbone(**SIZES, **options, dtype="float32")
    for weight in keras.weights:
        weight.assign(0.3 * torch.randn(tuple(weight.shape)))
    inputs = {k: v.numpy() for k, v in inputs_of(padding="right").items()}
    call = call_of(inputs)
    ours = dict(options)
    if kind == "untied":
        ours["activation"] = keras.get_config()["activation"]
    models = {}
    for dtype in ("float32", "float64"):
        models[dtype] = T5Backbone(**SIZES, **ours, dtype=dtype).to(device).eval()
        models[dtype].load_state_dict(from_keras(keras))
    truth, actual, plain = models["float64"](call), models["float32"](call), keras(call)
    assert plain.keys() == actual.keys()
    with pyfused.backend("reference"):
        reference = models["float32"](call)
    for name, value in actual.items():
        assert_close(value, [plain[name], reference[name]], truth[name], name)
    lm = keras_hub.models.T5Seq2SeqLM(backbone=keras, preprocessor=None)
    theirs = lm(call)
    logits = [models[d].logits(o["decoder_sequence_output"]) for d, o in (("float32", actual), ("float64", truth))]
    plains = [theirs, models["float32"].logits(reference["decoder_sequence_output"])]
    assert_close(logits[0], plains, logits[1], "logits")


def test_encode_alone(device):
    model = T5Backbone(**SIZES).to(device).eval()
    call = call_of(inputs_of(padding="right"))
    source = {k: v for k, v in call.items() if k.startswith("encoder")}
    with torch.no_grad():
        both = model(call)
        alone = model.encode(source)
        assert torch.equal(alone, both["encoder_sequence_output"])
        given = {k: v for k, v in call.items() if k != "encoder_token_ids"} | {"encoder_sequence_output": alone}
        assert torch.equal(model(given)["decoder_sequence_output"], both["decoder_sequence_output"])
        embedded = {f"{side}_inputs_embeds": model.token_embedding(call[f"{side}_token_ids"].to(device))
                    for side in ("encoder", "decoder")}  # fmt: skip
        masks = {k: v for k, v in call.items() if k.endswith("mask")}
        assert torch.equal(model(masks, **embedded)["decoder_sequence_output"], both["decoder_sequence_output"])


def test_padding_changes_no_real_row(device):
    model = T5Backbone(**SIZES).to(device).eval()
    ids, target = ids_of((1, 6)), ids_of((1, 5), seed=2)
    with torch.no_grad():
        alone = model(call_of({"input_ids": ids, "decoder_input_ids": target}))["decoder_sequence_output"]
        for left, right in ((3, 0), (0, 3), (2, 2)):
            padded = torch.cat([ids_of((1, left), seed=3), ids, ids_of((1, right), seed=4)], 1)
            mask = torch.tensor([[0] * left + [1] * 6 + [0] * right])
            out = model(call_of({"input_ids": padded, "attention_mask": mask, "decoder_input_ids": target}))
            torch.testing.assert_close(out["decoder_sequence_output"], alone)


@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 0, 4), (2, 5, 0), (0, 0, 0)])
def test_empty(shape, device):
    rows, source, target = shape
    model = T5Backbone(**SIZES).to(device).eval()
    ids = {"input_ids": torch.zeros(rows, source, dtype=torch.int64)}
    out = model(call_of(ids | {"decoder_input_ids": torch.zeros(rows, target, dtype=torch.int64)}))
    assert out["encoder_sequence_output"].shape == (rows, source, 24)
    assert out["decoder_sequence_output"].shape == (rows, target, 24)
    assert torch.isfinite(out["decoder_sequence_output"]).all()


def test_wholly_padded_sources_give_finite_rows(device):
    model = T5Backbone(**SIZES).to(device).eval()
    inputs = inputs_of(2, 5, 4)
    inputs["attention_mask"] = torch.tensor([[0] * 5, [1] * 5])
    out = model(call_of(inputs), return_attentions=True)
    assert torch.isfinite(out["decoder_sequence_output"]).all()
    assert out["cross_attentions"][1][0].abs().max() == 0


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.bool_, np.float32, torch.int8, torch.float16], ids=str)
def test_any_dtype_of_mask(kind, device):
    model = T5Backbone(**SIZES).to(device).eval()
    call = call_of(inputs_of(padding="right"))
    expected = model(call)["decoder_sequence_output"]
    for name in ("encoder_padding_mask", "decoder_padding_mask"):
        mask = call[name]
        call[name] = mask.to(kind) if isinstance(kind, torch.dtype) else mask.numpy().astype(kind)
    assert torch.equal(model(call)["decoder_sequence_output"], expected)


def test_only_the_pass_writes_to_a_cache(device):
    """A call that fails before the decoder runs does not change the cache."""
    model = T5Backbone(**SIZES).to(device).eval()
    cache, call = model.new_cache(3, 12), call_of(inputs_of(padding="right"))

    def fail(*_):
        raise RuntimeError("on the way")

    hook = model.decoder.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="on the way"):
        model(call, cache=cache)
    assert (cache.length, cache.encoder_mask, cache.cross[0]) == (0, None, None)
    hook.remove()
    model(call, cache=cache)
    assert torch.equal(cache.encoder_mask, call["encoder_padding_mask"].bool().to(device))


def test_config_round_trip():
    model = T5Backbone(
        **SIZES, key_value_dim=7, dropout=0.2, activation="gelu_pytorch_tanh", use_gated_activation=False, dtype="bfloat16",
        tie_embedding_weights=False, num_decoder_layers=1, num_buckets=16, max_distance=40, name="small", trainable=False,
        decoder_start_token_id=5,
    )  # fmt: skip
    assert model.get_config()["scale_logits"] is False
    again = T5Backbone.from_config(model.get_config())
    assert again.get_config() == model.get_config()
    assert {k: (v.shape, v.dtype) for k, v in again.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in model.state_dict().items()
    }
    assert not any(p.requires_grad for p in again.parameters())
    assert len(model.encoder.layers) == 2
    assert len(model.decoder.layers) == 1
    assert model.encoder.layers[0].feed_forward.activation == "gelu_tanh"


def test_logits_are_scaled_where_the_weights_are_tied(device):
    hidden = torch.randn(2, 3, 24, device=device)
    for tied in (True, False):
        for scaled in (None, True, False):
            model = T5Backbone(**SIZES, tie_embedding_weights=tied, scale_logits=scaled).to(device)
            embedding = model.token_embedding
            head = embedding.weight if tied else embedding.reverse_weight
            expected = (hidden * (24**-0.5 if (tied if scaled is None else scaled) else 1.0)) @ head.t()
            torch.testing.assert_close(model.logits(hidden), expected)


def test_initial_weights_are_those_of_transformers():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=400, num_layers=2, num_heads=8, d_model=256, d_ff=512, d_kv=24,
                      feed_forward_proj="gated-gelu")  # fmt: skip
    theirs = t5_state(T5ForConditionalGeneration(config).state_dict())
    mine = T5Backbone(400, 2, 8, 256, 512, key_value_dim=24, activation="gelu_new").state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        for part, (a, b) in enumerate(zip(mine[name].chunk(3), tensor.chunk(3))):  # queries have their own spread
            if name.endswith("norm.weight"):
                assert torch.equal(a, b)
            else:
                assert abs(a.std() / b.std() - 1) < (0.3 if "relative_bias" in name else 0.05), (name, part)


def test_parameter_counts_of_published_models():
    """Sizes come from the presets' configurations, counts from KerasHub's metadata."""
    with torch.device("meta"):
        small = T5Backbone(32128, 6, 8, 512, 2048, 64, use_gated_activation=False)
        flan = T5Backbone(32128, 12, 12, 768, 2048, 64, activation="gelu_new", tie_embedding_weights=False)
    presets = T5Backbone.presets
    for model, name in ((small, "t5_small_multi"), (flan, "flan_base_multi")):
        assert sum(p.numel() for p in model.parameters()) == presets[name]["metadata"]["params"]


def seeded(call):
    torch.manual_seed(7)
    return call()


def test_dropout_sites(device):
    """If no site drops anything, training equals evaluation; with a rate, the sites are the paper's."""
    model = T5Backbone(**SIZES, dropout=0.3, num_decoder_layers=1).to(device)
    call = call_of(inputs_of())
    model.train()
    first, second = (seeded(lambda: model(call)["decoder_sequence_output"]) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, model(call)["decoder_sequence_output"])
    assert (first == 0).float().mean() > 0.2  # after the final norm

    calls = []
    original, attention = F.dropout, pyfused.nn.attention.attention

    def counted(x, p, *rest):
        calls.append(("dropout", tuple(x.shape)))
        return original(x, 0.0)

    def plain(*args, dropout_p, **kwargs):
        calls.append(("attention", dropout_p))
        return attention(*args, dropout_p=0.0, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "dropout", counted)
        patch.setattr(pyfused.nn.attention, "attention", plain)
        whole = model(call)["decoder_sequence_output"]
    wide, target = ("dropout", (3, 17, 24)), ("dropout", (3, 9, 24))
    heads = ("attention", 0.3)
    layer = [heads, wide, ("dropout", (3, 17, 56)), wide]
    behind = [heads, target, heads, target, ("dropout", (3, 9, 56)), target]
    assert calls == [wide, *layer, *layer, wide, target, *behind, target]
    with torch.no_grad():
        torch.testing.assert_close(whole, model.eval()(call)["decoder_sequence_output"])


def losses(model, forward, logits, steps=30):
    """The loss of each AdamW step; the task is to copy ten of the words."""
    generator = torch.Generator().manual_seed(5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    out = []
    for _ in range(steps):
        ids = torch.randint(2, 12, (8, 6), generator=generator)
        shifted = torch.cat([torch.zeros(8, 1, dtype=torch.int64), ids[:, :-1]], 1)
        scores = logits(forward(ids, shifted)).flatten(0, 1)
        loss = F.cross_entropy(scores, ids.flatten().to(scores.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        out.append(loss.item())
    return torch.tensor(out, dtype=torch.float64)


def test_training_follows_transformers(device):
    hf = hf_t5(spread=0.1)
    mine = [like_hf(hf, dtype).to(device) for dtype in (torch.float32, torch.float64)]
    ours = [
        losses(
            m,
            lambda a, b, m=m: m(call_of({"input_ids": a, "decoder_input_ids": b}))["decoder_sequence_output"],
            m.logits,
        )
        for m in mine
    ]
    other = copy.deepcopy(hf)
    theirs = losses(other, lambda a, b: other(input_ids=a, decoder_input_ids=b).logits, lambda x: x)
    assert ours[1][-1] < 0.9 * ours[1][0]
    with pyfused.backend("reference"):
        plain = like_hf(hf).to(device)
        reference = losses(
            plain,
            lambda a, b: plain(call_of({"input_ids": a, "decoder_input_ids": b}))["decoder_sequence_output"],
            plain.logits,
        )
    assert_close(ours[0], [theirs, reference], ours[1], "losses")


GOOD = {
    "encoder_token_ids": torch.zeros(2, 5, dtype=torch.int64), "encoder_padding_mask": None,
    "decoder_token_ids": torch.zeros(2, 4, dtype=torch.int64), "decoder_padding_mask": None,
}  # fmt: skip


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"encoder_token_ids": None}, ValueError, "encoder_token_ids is missing"),
        ({"decoder_token_ids": None}, ValueError, "decoder_token_ids is missing"),
        ({"token_ids": 1}, ValueError, "unknown key 'token_ids'; it takes encoder_token_ids"),
        ({"head_mask": 1}, ValueError, "unknown key 'head_mask'"),
        ({"encoder_token_ids": [[1]]}, TypeError, "encoder_token_ids is a list"),
        ({"decoder_token_ids": torch.zeros(2, 4)}, TypeError, "decoder_token_ids is float32"),
        ({"encoder_token_ids": torch.full((2, 5), 61)}, IndexError, "encoder_token_ids holds 61; it takes 0 to 60"),
        ({"decoder_token_ids": torch.full((2, 4), -1)}, IndexError, "decoder_token_ids holds -1"),
        ({"encoder_token_ids": torch.zeros(3, 5).long()}, ValueError, "encoder_token_ids has 3 rows.*batch size, 2"),
        ({"encoder_padding_mask": torch.ones(2, 4)}, ValueError, r"encoder_padding_mask has shape \(2, 4\).*\(B, Se\)"),
        ({"decoder_padding_mask": torch.ones(2, 5)}, ValueError, r"decoder_padding_mask has shape \(2, 5\).*\(B, Sd\)"),
        ({"encoder_padding_mask": 1}, TypeError, "encoder_padding_mask is a int"),
        ({"encoder_inputs_embeds": torch.zeros(2, 5, 24)}, ValueError, "given beside encoder_token_ids"),
        ({"decoder_inputs_embeds": torch.zeros(2, 4, 24)}, ValueError, "given beside decoder_token_ids"),
        ({"encoder_sequence_output": torch.zeros(2, 5, 24)}, ValueError, "given beside encoder_token_ids"),
        ({"encoder_sequence_output": torch.zeros(2, 5, 8), "encoder_token_ids": None}, ValueError, "has shape"),
        ({"encoder_sequence_output": torch.zeros(3, 5, 24), "encoder_token_ids": None}, ValueError, "has shape"),
        ({"cache": "yes"}, TypeError, "cache is a str"),
    ],
)
def test_bad_input_is_refused_by_name(change, error, message, device):
    model = T5Backbone(**SIZES).to(device)
    with pytest.raises(error, match=message):
        model({**GOOD, **change})


def test_more_bad_input(device):
    model = T5Backbone(**SIZES).to(device)
    for name in ("encoder_padding_mask", "decoder_padding_mask"):
        with pytest.raises(ValueError, match=f"{name} is missing"):
            model({k: v for k, v in GOOD.items() if k != name})
    with pytest.raises(
        TypeError, match="inputs is a Tensor; it takes a dict with encoder_token_ids and encoder_padding"
    ):
        model(GOOD["encoder_token_ids"])
    with pytest.raises(ValueError, match="cache has 3 rows"):
        model(GOOD, cache=model.new_cache(3, 8))
    with pytest.raises(ValueError, match="room for 3; it cannot take 4 more"):
        model(GOOD, cache=model.new_cache(2, 3))
    cache = model.new_cache(2, 8)
    model(GOOD, cache=cache)
    with pytest.raises(ValueError, match="encoder_token_ids is given, but the cache holds"):
        model(GOOD, cache=cache)
    with pytest.raises(ValueError, match="capacity is 0"):
        model.new_cache(2, 0)
    with pytest.raises(ValueError, match="unknown key 'decoder_token_ids'"):
        model.encode(GOOD)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"num_layers": 0}, ValueError, "num_layers is 0"),
        ({"num_decoder_layers": 1.5}, TypeError, "num_decoder_layers is 1.5"),
        ({"hidden_dim": 24.0}, TypeError, "hidden_dim is 24.0"),
        ({"num_heads": 25}, ValueError, "num_heads is 25 and hidden_dim 24"),
        ({"key_value_dim": 257}, ValueError, "key_value_dim is 257; it takes at most 256"),
        ({"key_value_dim": 0}, ValueError, "key_value_dim is 0"),
        ({"dropout": 1.0}, ValueError, "dropout is 1.0"),
        ({"activation": "swiglu"}, ValueError, "activation is 'swiglu'; it takes gelu_new"),
        ({"activation": None}, ValueError, "activation is None"),
        ({"layer_norm_epsilon": "a"}, TypeError, "layer_norm_epsilon is 'a'"),
        ({"use_gated_activation": 1}, TypeError, "use_gated_activation is 1"),
        ({"tie_embedding_weights": None}, TypeError, "scale_logits is None|tie_embedding_weights is None"),
        ({"num_buckets": 2}, ValueError, "2 buckets"),
        ({"max_distance": 16}, ValueError, "max_distance is 16"),
        ({"decoder_start_token_id": 61}, ValueError, "decoder_start_token_id is 61"),
        ({"dtype": "int8"}, ValueError, "dtype is 'int8'"),
        ({"max_sequence_length": 5}, TypeError, "unknown argument 'max_sequence_length'"),
        ({"name": 3}, TypeError, "name is 3"),
    ],
)
def test_bad_configurations_are_refused_by_name(change, error, message):
    with pytest.raises(error, match=message):
        T5Backbone(**{**SIZES, **change})


@pytest.mark.parametrize("activation", ["gelu", "gelu_python", "gelu_fast", "swish", "keras_hub>gelu_approximate"])
def test_spellings_of_activations(activation):
    model = T5Backbone(**SIZES, activation=activation)
    expected = {"gelu_python": "gelu", "gelu_fast": "gelu_new", "swish": "silu"}.get(activation, activation)
    assert model.get_config()["activation"] == expected.replace("keras_hub>gelu_approximate", "gelu_new")


def test_it_is_exported():
    assert pyfused.T5Backbone is T5Backbone
