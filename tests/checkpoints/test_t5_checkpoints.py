"""Do T5's directories in both formats load to the right values and outputs, and are bad ones refused by name?"""

import json
import re

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from t5_cases import call_of, live, outputs_of, reference_outputs, t5_state

from pyfused import T5Backbone, backend
from pyfused.checkpoints import open_checkpoint, presets_of
from pyfused.models.backbone import Backbone
from pyfused.testing import assert_close

TIED, UNTIED = ("hf_t5", "keras_t5"), ("hf_t5_v11", "hf_t5_sharded", "keras_t5_v11", "keras_t5_sharded")
COMMON = {
    "vocabulary_size": 29, "num_layers": 2, "num_heads": 3, "hidden_dim": 12, "intermediate_dim": 20, "key_value_dim": 5,
    "dropout": 0.1, "layer_norm_epsilon": 1e-6, "num_decoder_layers": 2, "num_buckets": 32, "max_distance": 128,
    "decoder_start_token_id": 0,
}  # fmt: skip
KINDS = {
    True: {"activation": "relu", "use_gated_activation": False, "tie_embedding_weights": True, "scale_logits": True},
    False: {
        "activation": "gelu_new",
        "use_gated_activation": True,
        "tie_embedding_weights": False,
        "scale_logits": False,
    },
}


@pytest.mark.parametrize("name", TIED + UNTIED)
def test_golden_directories(golden, same, name):
    """All six directories of a kind hold the same weights, whatever the format."""
    checkpoint = open_checkpoint(golden / "ckpt" / name)
    assert (checkpoint.model, checkpoint.dtype) == ("t5", torch.float32)
    assert checkpoint.config == COMMON | KINDS[name in TIED]
    twin = golden / "ckpt" / ("hf_t5" if name in TIED else "hf_t5_v11")
    same(checkpoint.tensors(), t5_state(load_file(twin / "model.safetensors")))
    model = Backbone.from_preset(golden / "ckpt" / name)
    assert type(model) is T5Backbone
    same(model.state_dict(), checkpoint.tensors())
    assert model.get_config() == checkpoint.config | {"dtype": "float32", "name": None, "trainable": True}


@torch.no_grad()
@pytest.mark.parametrize("name", TIED + UNTIED)
def test_golden_outputs(golden, name):
    stored = load_file(golden / "ckpt" / name / "expected.safetensors")
    inputs = {k.removeprefix("in/"): v for k, v in stored.items() if k.startswith("in/")}
    model = Backbone.from_preset(golden / "ckpt" / name)
    actual, reference = outputs_of(model, call_of(inputs)), reference_outputs(model, call_of(inputs))
    with torch.no_grad():
        truth = outputs_of(Backbone.from_preset(golden / "ckpt" / name, dtype="float64"), call_of(inputs))
    for what, value in actual.items():
        rows = live(inputs, what)
        plains = [stored[f"out/{what}"][rows], reference[what][rows]]
        assert_close(value[rows], plains, truth[what][rows], f"{name} {what}")


@pytest.mark.parametrize("name", ["t5", "t5_v11"])
def test_against_the_verified_name_maps(golden, name):
    weights = load_file(golden / "ckpt" / f"hf_{name}" / "model.safetensors")
    rows = json.loads((golden / "name_maps.json").read_text())[name]
    with h5py.File(golden / "ckpt" / f"keras_{name}" / "model.weights.h5") as file:
        for row in rows:
            source = weights[row["hf"]].numpy()
            np.testing.assert_array_equal(file[row["h5"]][()], source.T if row["op"] == "T" else source, row["h5"])


def configured(directory, edit, **changes):
    edit(directory / "config.json", **changes)
    return open_checkpoint(directory, weights=False).config


def test_defaults_and_options_of_hugging_face(preset, edit):
    directory = preset("hf_t5")
    (directory / "config.json").write_text('{"model_type": "t5"}')
    config = open_checkpoint(directory, weights=False).config
    assert (config["vocabulary_size"], config["num_layers"], config["hidden_dim"]) == (32128, 6, 512)
    assert (config["num_heads"], config["key_value_dim"], config["intermediate_dim"]) == (8, 64, 2048)
    assert (config["activation"], config["use_gated_activation"], config["num_decoder_layers"]) == ("relu", False, 6)
    assert (config["tie_embedding_weights"], config["scale_logits"]) == (True, True)
    config = configured(directory, edit, feed_forward_proj="gated-gelu", num_decoder_layers=3, hidden_size=64)
    assert (config["activation"], config["use_gated_activation"]) == ("gelu_new", True)
    assert (config["num_layers"], config["num_decoder_layers"], config["hidden_dim"]) == (6, 3, 64)
    config = configured(directory, edit, feed_forward_proj="gelu", tie_word_embeddings=False, pad_token_id=7)
    assert (config["activation"], config["use_gated_activation"]) == ("gelu", False)
    assert (config["tie_embedding_weights"], config["scale_logits"]) == (False, False)
    assert config["decoder_start_token_id"] == 7
    # As transformers 5 saves an untied model
    config = configured(directory, edit, tie_word_embeddings=True, scale_decoder_outputs=False,
                        decoder_start_token_id=2, dense_act_fn="gelu_new", is_gated_act=True)  # fmt: skip
    assert (config["scale_logits"], config["decoder_start_token_id"]) == (False, 2)
    assert (config["activation"], config["use_gated_activation"]) == ("gelu_new", True)
    (directory / "config.json").write_text('{"architectures": ["T5ForConditionalGeneration"]}')
    assert open_checkpoint(directory, weights=False).model == "t5"


@pytest.mark.parametrize(
    "change, said",
    [
        ({"feed_forward_proj": "gated-mish"}, "feed_forward_proj is 'gated-mish'"),
        ({"feed_forward_proj": "half-gelu"}, "feed_forward_proj is 'half-gelu'"),
        ({"feed_forward_proj": 3}, "feed_forward_proj is 3"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"num_layers": 10**9}, "num_layers is 1000000000"),
        ({"num_decoder_layers": 10**9}, "num_decoder_layers is 1000000000"),
        ({"num_decoder_layers": 3}, "decoder.block.2.*is missing"),
        ({"num_layers": 1}, "encoder.block.1.*is not part of the model"),
        ({"d_kv": 4}, "SelfAttention.q.weight' has shape"),
        ({"relative_attention_num_buckets": 16}, "relative_attention_bias.weight' has shape"),
        ({"feed_forward_proj": "gated-gelu"}, "wi_0.weight'.*is missing"),
        ({"decoder_start_token_id": -1}, "decoder_start_token_id is -1"),
        ({"quantization_config": {"bits": 8}}, "quantization_config"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
    ],
)
def test_options_that_do_not_fit(preset, edit, change, said):
    directory = preset("hf_t5")
    edit(directory / "config.json", **change)
    with pytest.raises(ValueError, match=f"{re.escape(str(directory))}.*{said}"):
        open_checkpoint(directory)


@pytest.mark.parametrize(
    "activation, name",
    [
        ("relu", "relu"), ("gelu", "gelu"), ("silu", "silu"), ("swish", "silu"), ("tanh", "tanh"),
        ("keras_hub>gelu_approximate", "gelu_new"), ("keras_nlp>gelu_approximate", "gelu_new"),
        ({"module": "builtins", "class_name": "function", "config": "keras_nlp>gelu_approximate",
          "registered_name": "function"}, "gelu_new"),
        ("linear", None), (None, None), (7, None), ({"class_name": "ReLU", "config": {}}, None),
    ],
)  # fmt: skip
def test_activations_of_keras(preset, edit, activation, name):
    directory = preset("keras_t5_v11")
    config = json.loads((directory / "config.json").read_text())["config"]
    edit(directory / "config.json", config=config | {"activation": activation})
    if name is not None:
        assert open_checkpoint(directory).config["activation"] == name
    else:
        with pytest.raises(ValueError, match=r"config.json: activation is .*; it takes one of gelu_new"):
            open_checkpoint(directory)


def test_a_redundant_head_is_dropped_and_a_different_one_used(preset, edit):
    directory = preset("hf_t5")
    path = directory / "model.safetensors"
    weights = load_file(path)
    save_file(weights | {"lm_head.weight": weights["shared.weight"].clone()}, path)
    assert open_checkpoint(directory).config["tie_embedding_weights"] is True
    save_file(weights | {"lm_head.weight": weights["shared.weight"] + 1}, path)
    with pytest.warns(UserWarning, match=r"'lm_head.weight' differs from 'shared.weight'"):
        config = open_checkpoint(directory).config
    assert (config["tie_embedding_weights"], config["scale_logits"]) == (False, True)
    edit(directory / "config.json", scale_decoder_outputs=False)  # as transformers 5 writes: no reason to warn
    config = open_checkpoint(directory).config
    assert (config["tie_embedding_weights"], config["scale_logits"]) == (False, False)
    save_file(weights, path)
    edit(directory / "config.json", tie_word_embeddings=False, scale_decoder_outputs=None)
    config = open_checkpoint(directory).config  # of a model without a head
    assert (config["tie_embedding_weights"], config["scale_logits"]) == (True, False)


def test_published_names_are_kerashubs():
    keras_hub = pytest.importorskip("keras_hub")
    theirs, ours = keras_hub.models.T5Backbone.presets, presets_of({"t5"})
    assert set(theirs) <= set(ours)
    assert len(theirs) == 11
    for name, entry in theirs.items():
        assert ours[name]["kaggle_handle"] == entry["kaggle_handle"]
        assert ours[name]["metadata"]["params"] == entry["metadata"]["params"]
    assert T5Backbone.presets["flan_base_multi"]["hf_repo"] == "google/flan-t5-base"


SIZES = {"vocab_size": 61, "num_layers": 3, "num_heads": 4, "d_model": 24, "d_ff": 56, "d_kv": 7}


def randomised(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


@pytest.mark.parametrize("name", ["T5Model", "T5ForConditionalGeneration"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shards", ["5GB", "20KB"])
def test_transformers_save_pretrained(tmp_path, same, name, dtype, shards):
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(**SIZES, feed_forward_proj="gated-gelu", num_decoder_layers=2)
    model = randomised(getattr(transformers, name)(config)).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size=shards)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shards == "20KB")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.dtype == dtype
    assert checkpoint.config["tie_embedding_weights"] is True
    same(checkpoint.tensors(), t5_state(model.state_dict()))


def test_transformers_untied(tmp_path, same):
    transformers = pytest.importorskip("transformers")
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**SIZES, tie_word_embeddings=False))
    model.lm_head.weight = torch.nn.Parameter(torch.randn(61, 24))
    randomised(model).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.config["tie_embedding_weights"], checkpoint.config["scale_logits"]) == (False, False)
    same(checkpoint.tensors(), t5_state(model.state_dict()))


@torch.no_grad()
@pytest.mark.parametrize(
    "kind, sharded, dtype",  # every pair of values
    [
        ("relu", False, "float32"),
        ("relu", True, "bfloat16"),
        ("gated", True, "float32"),
        ("gated", False, "bfloat16"),
    ],
)
def test_keras_hub_save_to_preset(tmp_path, dtype, sharded, kind):
    keras_hub = pytest.importorskip("keras_hub")
    options = {"activation": "relu", "use_gated_activation": False}
    if kind == "gated":
        from keras_hub.src.utils.keras_utils import gelu_approximate

        options = {"activation": gelu_approximate, "tie_embedding_weights": False, "key_value_dim": 7}
    sizes = {"vocabulary_size": 61, "num_layers": 3, "num_heads": 4, "hidden_dim": 24, "intermediate_dim": 56}
    model = keras_hub.models.T5Backbone(**sizes, **options, dropout=0.2, dtype=dtype)
    for variable in model.weights:
        variable.assign(0.1 * torch.randn(tuple(variable.shape)))
    model.save_to_preset(str(tmp_path), max_shard_size=3e-5 if sharded else 10)
    assert (tmp_path / "model.weights.json").exists() == sharded
    mine = Backbone.from_preset(tmp_path)
    assert mine.dtype == getattr(torch, dtype)
    assert mine.get_config()["dropout"] == 0.2
    assert sum(p.numel() for p in mine.parameters()) == model.count_params()
    if dtype == "float32":
        ids, mask = torch.randint(61, (2, 9)), torch.ones(2, 9)
        mask[1, 6:] = 0
        call = {"encoder_token_ids": ids, "encoder_padding_mask": mask}
        call |= {"decoder_token_ids": ids[:, :5], "decoder_padding_mask": torch.ones(2, 5)}
        theirs, truth = model(call), Backbone.from_preset(tmp_path, dtype="float64")(call)
        with backend("reference"):
            reference = mine(call)
        for name, value in mine(call).items():
            assert_close(value, [theirs[name], reference[name]], truth[name], name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "change",
    [
        {"use_gated_activation": False}, {"activation": "gelu", "num_decoder_layers": 1},
        {"activation": "gelu_new", "tie_embedding_weights": False, "num_buckets": 16, "max_distance": 40},
        {"activation": "silu", "scale_logits": False, "decoder_start_token_id": 3, "key_value_dim": None},
        {"activation": "relu", "tie_embedding_weights": False, "scale_logits": True, "layer_norm_epsilon": 1e-3},
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*'lm_head.weight' differs from 'shared.weight'")
def test_what_is_saved_loads_in_transformers(tmp_path, same, dtype, change):
    transformers = pytest.importorskip("transformers")
    config = {"vocabulary_size": 61, "num_layers": 2, "num_heads": 4, "hidden_dim": 24, "intermediate_dim": 56}
    model = T5Backbone(**config, **{"key_value_dim": 7} | change, dtype=dtype).eval()
    model.save_to_preset(tmp_path / "saved")
    again = Backbone.from_preset(tmp_path / "saved")
    same(again.state_dict(), model.state_dict())
    saved, stated = again.get_config(), model.get_config()
    assert saved == stated | {"key_value_dim": stated["key_value_dim"] or 6}

    theirs, report = transformers.T5ForConditionalGeneration.from_pretrained(
        tmp_path / "saved", dtype="auto", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.randint(61, (2, 7))
    with torch.no_grad():
        out = outputs_of(model.double(), call_of({"input_ids": ids, "decoder_input_ids": ids}))
        expected = theirs.eval().double()(input_ids=ids, decoder_input_ids=ids).logits
    # transformers takes the mean squares in float32 whatever the dtype; a wrong option is off by far more than that
    assert (out["logits"] - expected).abs().max() < 1e-5 * expected.abs().max()
