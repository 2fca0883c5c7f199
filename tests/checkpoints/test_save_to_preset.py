"""Do transformers and KerasHub read what is saved, with the same weights and outputs, and is the rest refused by name?"""

import json

import h5py
import keras_hub
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from pyfused import AlbertBackbone, Backbone, FNetBackbone, GPT2Backbone, T5Backbone
from pyfused.checkpoints import convert, open_checkpoint
from pyfused.testing import assert_close

IDS = torch.randint(4, 29, (2, 9), generator=torch.Generator().manual_seed(3))
SIZES = {"vocabulary_size": 29, "num_layers": 2, "num_heads": 3, "hidden_dim": 12, "intermediate_dim": 20}
FNET = {name: value for name, value in SIZES.items() if name != "num_heads"}
ALBERT = {**SIZES, "embedding_dim": 6, "num_layers": 4, "num_groups": 2, "num_inner_repetitions": 2}
HF_T5 = {"vocab_size": 29, "num_layers": 2, "num_heads": 3, "d_model": 12, "d_ff": 20, "d_kv": 5}

# id: (KerasHub's class, its arguments, names of its inputs)
ONE, SEGMENTS = ("token_ids", "padding_mask"), ("token_ids", "segment_ids", "padding_mask")
TWO = ("encoder_token_ids", "encoder_padding_mask", "decoder_token_ids", "decoder_padding_mask")
KERAS = {
    "gpt2": ("GPT2Backbone", {**SIZES, "max_sequence_length": 16, "dropout": 0.2}, ONE),
    "gpt2, 5 heads of 2 in 12": ("GPT2Backbone", {**SIZES, "num_heads": 5, "max_sequence_length": 16}, ONE),
    "albert, 5 heads of 2 in 12": ("AlbertBackbone", {**ALBERT, "num_heads": 5, "max_sequence_length": 16}, SEGMENTS),
    "albert": ("AlbertBackbone", {**ALBERT, "max_sequence_length": 16}, SEGMENTS),
    "fnet": ("FNetBackbone", {**FNET, "max_sequence_length": 16}, SEGMENTS[:2]),
    "t5": ("T5Backbone", {**SIZES, "key_value_dim": 5, "use_gated_activation": False}, TWO),
    "t5 1.1": ("T5Backbone", {**SIZES, "activation": "gelu", "tie_embedding_weights": False}, TWO),
    "flan": ("T5Backbone", {**SIZES, "activation": "gelu_new", "tie_embedding_weights": False}, TWO),
}
# id: (transformers' class, its configuration)
HF_GPT2 = {"vocab_size": 29, "n_positions": 16, "n_embd": 12, "n_layer": 2, "n_head": 3, "n_inner": 20}
HF_ALBERT = {"vocab_size": 29, "embedding_size": 6, "hidden_size": 12, "num_hidden_layers": 4, "num_hidden_groups": 2,
             "num_attention_heads": 3, "intermediate_size": 20, "inner_group_num": 2, "max_position_embeddings": 16,
             "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}  # fmt: skip
HF_FNET = {
    "vocab_size": 29,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "intermediate_size": 20,
    "max_position_embeddings": 16,
}
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
HF = {
    "gpt2": ("GPT2LMHeadModel", transformers.GPT2Config(**HF_GPT2)),
    "gpt2, untied": ("GPT2LMHeadModel", transformers.GPT2Config(**HF_GPT2, tie_word_embeddings=False)),
    "albert": ("AlbertModel", transformers.AlbertConfig(**HF_ALBERT)),
    "fnet": ("FNetModel", transformers.FNetConfig(**HF_FNET)),
    "t5": ("T5ForConditionalGeneration", transformers.T5Config(**HF_T5)),
    "t5, untied, gated": ("T5ForConditionalGeneration", transformers.T5Config(**HF_T5, **GATED)),
    "t5 encoder": ("T5EncoderModel", transformers.T5Config(**HF_T5, feed_forward_proj="gated-silu")),
}
IN_BOTH = ("gpt2", "albert", "fnet", "t5", "t5, untied, gated")  # transformers' models that KerasHub has too


def keras_model(case, **more):
    torch.manual_seed(5)
    name, arguments, _ = KERAS[case]
    if arguments.get("activation") == "gelu_new":
        arguments = {**arguments, "activation": keras_hub.src.utils.keras_utils.gelu_approximate}
    model = getattr(keras_hub.models, name)(**arguments, **more)
    for variable in model.weights:
        variable.assign(0.3 * torch.randn(tuple(variable.shape)))
    return model


def hf_model(case, **more):
    torch.manual_seed(6)
    name, config = HF[case]
    model = getattr(transformers, name)(config)
    if case == "t5, untied, gated":  # transformers 5 ties every new T5, and unties it if the file has a head
        model.lm_head.weight = torch.nn.Parameter(torch.empty(29, 12))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def keras_outputs(model, inputs):
    values = {"token_ids": IDS, "segment_ids": IDS % 2, "padding_mask": torch.ones_like(IDS)}
    with torch.no_grad():
        out = model({name: values[name.removeprefix("encoder_").removeprefix("decoder_")] for name in inputs})
    return out if isinstance(out, dict) else {"sequence_output": out}


@torch.no_grad()
def hf_outputs(model):
    more = {"decoder_input_ids": IDS.flip(1)} if isinstance(model, transformers.T5ForConditionalGeneration) else {}
    return model(IDS, **more)[0]


def h5_of(directory):
    found = {}
    for path in directory.glob("*.h5"):
        with h5py.File(path) as file:
            file.visititems(lambda name, o: found.update({name: np.array(o)}) if isinstance(o, h5py.Dataset) else None)
    return found


def same_files(one, other):
    """Two directories of the same bytes. Only KerasHub's metadata.json may differ, which has the time."""
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    for name in names:
        assert name == "metadata.json" or (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize("case", KERAS)
def test_keras_hub_reads_its_own_model_again(tmp_path, case):
    """In one file, or in several for one model of each kind."""
    theirs = keras_model(case)
    theirs.save_to_preset(str(tmp_path / "theirs"))
    model = Backbone.from_preset(tmp_path / "theirs")
    outputs = keras_outputs(theirs, KERAS[case][2])
    for shards in ("10GB", 2000) if case in ("gpt2", "albert", "t5 1.1") else ("10GB",):
        ours = tmp_path / str(shards)
        model.save_to_preset(ours, "keras", max_shard_size=shards)
        assert (ours / "model.weights.json").exists() == (shards == 2000)
        for made in ("config.json", "metadata.json"):
            written, kept = (json.loads((place / made).read_text()) for place in (ours, tmp_path / "theirs"))
            for config in (written, kept):
                config.pop("date_saved", None)
                config.get("config", {}).pop("name", None)  # numbered by KerasHub
            assert written == kept
        one, other = h5_of(ours), h5_of(tmp_path / "theirs")
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[name], other[name]) for name in one)
        again = keras_outputs(getattr(keras_hub.models, KERAS[case][0]).from_preset(str(ours)), KERAS[case][2])
        for name, expected in outputs.items():
            assert torch.equal(again[name], expected), name


@pytest.mark.parametrize("shards", ["10GB", 2000])
@pytest.mark.parametrize("case", HF)
def test_transformers_reads_its_own_model_again(tmp_path, same, case, shards):
    theirs = hf_model(case)
    theirs.save_pretrained(tmp_path / "theirs")
    Backbone.from_preset(tmp_path / "theirs").save_to_preset(tmp_path / "ours", max_shard_size=shards)
    assert (tmp_path / "ours" / "model.safetensors.index.json").exists() == (shards == 2000)
    again, report = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    same(again.state_dict(), theirs.state_dict())
    assert torch.equal(hf_outputs(again.eval()), hf_outputs(theirs))


@torch.no_grad()
@pytest.mark.parametrize("case", IN_BOTH)
def test_from_transformers_to_keras_hub_and_back(tmp_path, same, case):
    theirs = hf_model(case)
    theirs.save_pretrained(tmp_path / "hf")
    model = Backbone.from_preset(tmp_path / "hf")
    model.save_to_preset(tmp_path / "keras", "keras")
    keras = keras_hub.models.Backbone.from_preset(str(tmp_path / "keras"))
    again = Backbone.from_preset(tmp_path / "keras")
    same(again.state_dict(), model.state_dict())
    again.save_to_preset(tmp_path / "back")
    loaded = type(theirs).from_pretrained(tmp_path / "back").eval()
    same(loaded.state_dict(), theirs.state_dict())
    exact = type(theirs)(theirs.config).double().eval()
    exact.load_state_dict({name: tensor.double() for name, tensor in theirs.state_dict().items()})
    inputs = next(row[2] for row in KERAS.values() if row[0] == type(model).__name__)
    states = keras_outputs(keras, inputs)
    if case.startswith("t5"):
        more = {"decoder_input_ids": IDS, "output_hidden_states": True}
        pairs = {
            "encoder_sequence_output": [hf(IDS, **more).encoder_last_hidden_state for hf in (theirs, exact)],
            "decoder_sequence_output": [hf(IDS, **more).decoder_hidden_states[-1] for hf in (theirs, exact)],
        }
    elif case == "gpt2":
        pairs = {"sequence_output": [hf.transformer(IDS)[0] for hf in (theirs, exact)]}
    else:
        both = [hf(IDS, token_type_ids=IDS % 2) for hf in (theirs, exact)]
        pairs = {"sequence_output": [out[0] for out in both], "pooled_output": [out[1] for out in both]}
    for name, (plain, truth) in pairs.items():
        assert_close(states[name], plain, truth, name)


@pytest.fixture(scope="module")
def keras_t5(tmp_path_factory):
    """A directory with a T5 model that KerasHub saved."""
    directory = tmp_path_factory.mktemp("keras") / "t5"
    keras_model("t5 1.1").save_to_preset(str(directory))
    return directory


# KerasHub's T5 does not run in float64
@pytest.mark.parametrize(
    "format, dtype",
    [("hf", torch.bfloat16), ("hf", torch.float64), ("keras", torch.bfloat16), ("keras", torch.float16)],
)
def test_a_cast_on_the_way(tmp_path, same, keras_t5, format, dtype):
    model = Backbone.from_preset(keras_t5)
    expected = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    model.save_to_preset(tmp_path / "saved", format, dtype=dtype)
    convert(keras_t5, tmp_path / "converted", format, dtype=dtype)
    same_files(tmp_path / "saved", tmp_path / "converted")
    again = Backbone.from_preset(tmp_path / "saved")
    assert again.dtype == dtype
    same(again.state_dict(), expected)
    name = str(dtype).removeprefix("torch.")
    if format == "hf":
        assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == name
        theirs = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "saved", dtype="auto")
        assert torch.equal(theirs.lm_head.weight, expected["token_embedding.reverse_weight"])
    else:
        theirs = keras_hub.models.T5Backbone.from_preset(str(tmp_path / "saved"), dtype=name)
        assert torch.equal(theirs.token_embedding.embeddings.value, expected["token_embedding.weight"])
    assert {t.dtype for t in model.state_dict().values()} == {torch.float32}


def test_frozen_weights_stay_frozen_in_keras(tmp_path):
    keras_model("gpt2", trainable=False).save_to_preset(str(tmp_path / "theirs"))
    model = Backbone.from_preset(tmp_path / "theirs")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert Backbone.from_preset(tmp_path / "theirs", trainable=True).token_embedding.weight.requires_grad
    model.save_to_preset(tmp_path / "saved", "keras")
    convert(tmp_path / "theirs", tmp_path / "converted", "keras")
    same_files(tmp_path / "saved", tmp_path / "converted")
    for place in ("theirs", "saved"):
        theirs = keras_hub.models.GPT2Backbone.from_preset(str(tmp_path / place))
        assert (theirs.trainable, len(theirs.trainable_weights)) == (False, 0), place


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_a_mixed_policy_stays_one_in_keras(tmp_path, policy):
    keras_model("gpt2", dtype=policy).save_to_preset(str(tmp_path / "theirs"))
    Backbone.from_preset(tmp_path / "theirs").save_to_preset(tmp_path / "saved", "keras")
    convert(tmp_path / "theirs", tmp_path / "converted", "keras")
    same_files(tmp_path / "saved", tmp_path / "converted")
    checkpoint = open_checkpoint(tmp_path / "saved")
    assert (checkpoint.dtype, f"mixed_{checkpoint.compute_dtype}") == (torch.float32, policy.replace("_", "_torch."))
    assert keras_hub.models.GPT2Backbone.from_preset(str(tmp_path / "saved"), dtype=None) is not None


@pytest.mark.parametrize("case", IN_BOTH)
def test_convert_writes_what_a_model_would(tmp_path, case):
    hf_model(case).save_pretrained(tmp_path / "theirs")
    model = Backbone.from_preset(tmp_path / "theirs")
    for format in ("hf", "keras"):
        convert(tmp_path / "theirs", tmp_path / f"converted {format}", format, max_shard_size=3000)
        model.save_to_preset(tmp_path / f"saved {format}", format, max_shard_size=3000)
        same_files(tmp_path / f"saved {format}", tmp_path / f"converted {format}")


SMALL = {"vocabulary_size": 9, "num_layers": 2, "hidden_dim": 8, "intermediate_dim": 8}
REFUSED = [
    (GPT2Backbone, {"num_heads": 2, "activation": "gelu"}, "activation is 'gelu'"),
    (GPT2Backbone, {"num_heads": 2, "layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06; KerasHub's GPT2Backbone always"),
    (GPT2Backbone, {"num_heads": 2, "attention_dropout": 0.3}, "attention_dropout is 0.3; .* has dropout, 0.1; load the"),
    (GPT2Backbone, {"num_heads": 2, "scale_attention": False}, "scale_attention is False"),
    (GPT2Backbone, {"num_heads": 2, "scale_attention_by_inverse_layer_index": True}, "inverse_layer_index is True"),
    (GPT2Backbone, {"num_heads": 2, "upcast_attention": True}, "upcast_attention is True"),
    (GPT2Backbone, {"num_heads": 2, "cross_attention": True}, "cross_attention is True"),
    (GPT2Backbone, {"num_heads": 2, "tie_embedding_weights": False}, "tie_embedding_weights is False"),
    (AlbertBackbone, {"num_heads": 2, "embedding_dim": 4, "pooler": False}, "pooler is False"),
    (AlbertBackbone, {"num_heads": 2, "embedding_dim": 4, "activation": "relu"}, "activation is 'relu'"),
    (AlbertBackbone, {"num_heads": 2, "embedding_dim": 4, "dropout": 0.1, "feed_forward_dropout": 0.0}, "forward_dropout is 0"),
    (AlbertBackbone, {"num_heads": 2, "embedding_dim": 4, "num_layers": 5, "num_groups": 2}, "num_layers is 5; .* multiples"),
    (FNetBackbone, {"pooler": False}, "pooler is False"),
    (FNetBackbone, {"layer_norm_epsilon": 1e-5}, "layer_norm_epsilon is 1e-05"),
    (T5Backbone, {"num_heads": 2, "num_decoder_layers": 1}, "num_decoder_layers is 1; KerasHub's T5Backbone always has 2"),
    (T5Backbone, {"num_heads": 2, "num_decoder_layers": 0}, "num_decoder_layers is 0"),
    (T5Backbone, {"num_heads": 2, "num_buckets": 16}, "num_buckets is 16"),
    (T5Backbone, {"num_heads": 2, "activation": "quick_gelu"}, "activation is 'quick_gelu', which KerasHub's T5Backbone"),
    (T5Backbone, {"num_heads": 2, "max_distance": 64}, "max_distance is 64"),
    (T5Backbone, {"num_heads": 2, "scale_logits": False}, "scale_logits is False"),
    (T5Backbone, {"num_heads": 2, "decoder_start_token_id": 3}, "decoder_start_token_id is 3"),
]  # fmt: skip


@pytest.mark.parametrize("kind, more, message", REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_keras_cannot_express_is_refused_by_name(tmp_path, kind, more, message):
    with pytest.raises(ValueError, match=message):
        kind(**{**SMALL, **more}).save_to_preset(tmp_path / "saved", "keras")
    assert not any(tmp_path.iterdir())


def test_bad_arguments(tmp_path):
    model = FNetBackbone(**SMALL)
    for error, message, arguments in [
        (ValueError, "format is 'onnx'; it takes 'hf' or 'keras'", {"format": "onnx"}),
        (ValueError, "max_shard_size is '10 apples'; it takes", {"max_shard_size": "10 apples"}),
        (ValueError, "max_shard_size is 0; it takes", {"max_shard_size": 0}),
        (TypeError, "max_shard_size is of type float", {"max_shard_size": 1.5}),
        (ValueError, "dtype is 'int8'; it takes", {"dtype": "int8"}),
        (ValueError, "tokenizer: preset is 'nowhere'", {"tokenizer": "nowhere"}),
        (TypeError, "tokenizer is True; it takes a preset's name", {"tokenizer": True}),
        (ValueError, "has no tokeniser that can be saved", {"tokenizer": tmp_path}),
    ]:
        with pytest.raises(error, match=message):
            model.save_to_preset(tmp_path / "saved", **arguments)
    with pytest.raises(TypeError, match="directory is ''; it takes a path"):
        model.save_to_preset("")
    table = model.segment_embedding.weight
    model.segment_embedding.weight = torch.nn.Parameter(table[:2])
    with pytest.raises(
        ValueError, match=r"segment_embedding.weight has shape \(2, 8\), but its configuration calls for \(4, 8\)"
    ):
        model.save_to_preset(tmp_path / "saved")
    model.segment_embedding.weight = table
    model.projection.half()
    with pytest.raises(ValueError, match=r"its tensors have .*; pass dtype="):
        model.save_to_preset(tmp_path / "saved")
    assert not any(tmp_path.iterdir())
    model.save_to_preset(tmp_path / "saved", dtype="bfloat16", max_shard_size="1KiB")
    assert {
        tensor.dtype for path in (tmp_path / "saved").glob("*.safetensors") for tensor in load_file(path).values()
    } == {torch.bfloat16}
