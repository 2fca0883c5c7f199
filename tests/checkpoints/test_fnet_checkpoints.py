"""Do FNet's directories in both formats load to the right values and outputs, and are bad ones refused by name?"""

import json
import re

import h5py
import numpy as np
import pytest
import torch
from fnet_cases import call_of, fnet_state, outputs_of, reference_outputs
from safetensors.torch import load_file, save_file

from pyfused import FNetBackbone, backend
from pyfused.checkpoints import open_checkpoint, presets_of
from pyfused.models.backbone import Backbone
from pyfused.testing import assert_close

NAMES = ("hf_fnet_pretraining", "keras_fnet")
CONFIG = {
    "vocabulary_size": 29, "num_layers": 2, "hidden_dim": 12, "intermediate_dim": 20, "dropout": 0.1,
    "max_sequence_length": 16, "num_segments": 4, "activation": "gelu_new", "layer_norm_epsilon": 1e-12, "pooler": True,
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_golden_directories(golden, same, name):
    """Both hold the same weights, whatever the format."""
    checkpoint = open_checkpoint(golden / "ckpt" / name)
    assert (checkpoint.model, checkpoint.dtype) == ("fnet", torch.float32)
    assert checkpoint.config == CONFIG
    same(checkpoint.tensors(), fnet_state(load_file(golden / "ckpt" / NAMES[0] / "model.safetensors")))
    model = Backbone.from_preset(golden / "ckpt" / name)
    assert type(model) is FNetBackbone
    same(model.state_dict(), checkpoint.tensors())
    assert model.get_config() == checkpoint.config | {"dtype": "float32", "name": None, "trainable": True}


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_golden_outputs(golden, name):
    stored = load_file(golden / "ckpt" / name / "expected.safetensors")
    call = call_of({k.removeprefix("in/"): v for k, v in stored.items() if k.startswith("in/")})
    model = Backbone.from_preset(golden / "ckpt" / name)
    actual, reference = outputs_of(model, call), reference_outputs(model, call)
    truth = outputs_of(Backbone.from_preset(golden / "ckpt" / name, dtype="float64"), call)
    for what, value in actual.items():
        assert_close(value, [stored[f"out/{what}"], reference[what]], truth[what], f"{name} {what}")


def test_against_the_verified_name_maps(golden):
    weights = load_file(golden / "ckpt" / "hf_fnet_pretraining" / "model.safetensors")
    rows = json.loads((golden / "name_maps.json").read_text())["fnet"]
    assert len(rows) == 25
    with h5py.File(golden / "ckpt" / "keras_fnet" / "model.weights.h5") as file:
        for row in rows:
            source = weights[f"fnet.{row['hf']}"].numpy()
            np.testing.assert_array_equal(file[row["h5"]][()], source.T if row["op"] == "T" else source, row["h5"])


def test_defaults_and_options_of_hugging_face(preset, edit):
    directory = preset("hf_fnet_pretraining")
    (directory / "config.json").write_text('{"model_type": "fnet"}')
    config = open_checkpoint(directory, weights=False).config
    assert config == CONFIG | {
        "vocabulary_size": 32000, "num_layers": 12, "hidden_dim": 768, "intermediate_dim": 3072, "max_sequence_length": 512,
    }  # fmt: skip
    edit(directory / "config.json", hidden_act="gelu", layer_norm_eps=1e-6, type_vocab_size=2, hidden_dropout_prob=0,
         use_tpu_fourier_optimizations=True, tpu_short_seq_length=128)  # fmt: skip
    config = open_checkpoint(directory, weights=False).config
    assert (config["activation"], config["layer_norm_epsilon"], config["num_segments"]) == ("gelu", 1e-6, 2)
    assert config["dropout"] == 0.0
    (directory / "config.json").write_text('{"architectures": ["FNetForMaskedLM"]}')
    assert open_checkpoint(directory, weights=False).model == "fnet"


@pytest.mark.parametrize(
    "change, said",
    [
        ({"hidden_act": "mish"}, "hidden_act is 'mish'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": 10**9}, "num_layers is 1000000000; pyfused makes models of at most 1000"),
        ({"num_hidden_layers": 3}, "encoder.layer.2.*is missing"),
        ({"num_hidden_layers": 1}, "encoder.layer.1.*is not part of the model"),
        ({"type_vocab_size": 2}, "token_type_embeddings.weight' has shape"),
        ({"use_tpu_fourier_optimizations": "yes"}, "use_tpu_fourier_optimizations is 'yes'"),
        ({"quantization_config": {"bits": 8}}, "quantization_config"),
    ],
)
def test_options_that_do_not_fit(preset, edit, change, said):
    directory = preset("hf_fnet_pretraining")
    edit(directory / "config.json", **change)
    with pytest.raises(ValueError, match=f"{re.escape(str(directory))}.*{said}"):
        open_checkpoint(directory)


def test_options_of_keras_that_do_not_fit(preset, edit):
    directory = preset("keras_fnet")
    config = json.loads((directory / "config.json").read_text())["config"]
    for change, said in (({"num_layers": 3}, "f_net_encoder_2.*is missing"), ({"num_segments": 0}, "num_segments is 0"),
                         ({"activation": "relu"}, "activation='relu'")):  # fmt: skip
        edit(directory / "config.json", config=config | change)
        with pytest.raises(ValueError, match=said):
            open_checkpoint(directory)


def test_the_pooler_is_a_matter_of_the_file(preset, same):
    directory = preset("hf_fnet_pretraining")
    weights = load_file(directory / "model.safetensors")
    bare = {name: tensor for name, tensor in weights.items() if not name.startswith("fnet.pooler")}
    save_file(bare, directory / "model.safetensors")
    model = Backbone.from_preset(directory)
    assert (model.get_config()["pooler"], model.pooler) == (False, None)
    same(model.state_dict(), fnet_state(bare))
    bare["fnet.pooler.dense.weight"] = weights["fnet.pooler.dense.weight"]
    save_file(bare, directory / "model.safetensors")
    with pytest.raises(ValueError, match=r"'pooler.dense.bias' of shape .* is missing"):
        open_checkpoint(directory)


def test_published_names_are_kerashubs():
    keras_hub = pytest.importorskip("keras_hub")
    theirs, ours = keras_hub.models.FNetBackbone.presets, presets_of({"fnet"})
    assert set(theirs) <= set(ours)
    assert len(theirs) == 2
    for name, entry in theirs.items():
        assert ours[name]["kaggle_handle"] == entry["kaggle_handle"]
        assert ours[name]["metadata"]["params"] == entry["metadata"]["params"]
    assert FNetBackbone.presets["f_net_base_en"]["hf_repo"] == "google/fnet-base"


SIZES = {
    "vocab_size": 61,
    "num_hidden_layers": 3,
    "hidden_size": 24,
    "intermediate_size": 56,
    "max_position_embeddings": 40,
}


def randomised(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


@pytest.mark.parametrize(
    "name", ["FNetModel", "FNetForMaskedLM", "FNetForPreTraining", "FNetForNextSentencePrediction"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shards", ["5GB", "10KB"])
def test_transformers_save_pretrained(tmp_path, same, name, dtype, shards):
    transformers = pytest.importorskip("transformers")
    model = randomised(getattr(transformers, name)(transformers.FNetConfig(**SIZES))).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size=shards)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shards == "10KB")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.dtype == dtype
    assert checkpoint.config["pooler"] is True
    same(checkpoint.tensors(), fnet_state(model.state_dict()))


def test_transformers_made_for_a_tpu(tmp_path, same):
    """Its Fourier matrices are in the file and of no use here."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("scipy")
    config = transformers.FNetConfig(**SIZES, use_tpu_fourier_optimizations=True, tpu_short_seq_length=16)
    model = randomised(transformers.FNetModel(config))
    model.save_pretrained(tmp_path)
    assert any("dft_mat" in name for name in load_file(tmp_path / "model.safetensors"))
    same(open_checkpoint(tmp_path).tensors(), fnet_state(model.state_dict()))


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sharded", [False, True])
def test_keras_hub_save_to_preset(tmp_path, dtype, sharded):
    keras_hub = pytest.importorskip("keras_hub")
    sizes = {
        "vocabulary_size": 61,
        "num_layers": 3,
        "hidden_dim": 24,
        "intermediate_dim": 56,
        "max_sequence_length": 40,
    }
    model = keras_hub.models.FNetBackbone(**sizes, dropout=0.2, num_segments=2, dtype=dtype)
    for variable in model.weights:
        variable.assign(0.1 * torch.randn(tuple(variable.shape)))
    model.save_to_preset(str(tmp_path), max_shard_size=1.5e-5 if sharded else 10)
    assert (tmp_path / "model.weights.json").exists() == sharded
    mine = Backbone.from_preset(tmp_path)
    assert mine.dtype == getattr(torch, dtype)
    assert (mine.get_config()["dropout"], mine.get_config()["num_segments"]) == (0.2, 2)
    assert sum(p.numel() for p in mine.parameters()) == model.count_params()
    if dtype == "float32":
        call = {"token_ids": torch.randint(61, (2, 9)), "segment_ids": torch.randint(2, (2, 9))}
        theirs, truth = model(call), Backbone.from_preset(tmp_path, dtype="float64")(call)
        with backend("reference"):
            reference = mine(call)
        for name, value in mine(call).items():
            assert_close(value, [theirs[name], reference[name]], truth[name], name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "change",
    [{}, {"activation": "gelu", "num_segments": 2}, {"layer_norm_epsilon": 1e-3, "dropout": 0.0}, {"pooler": False}],
)
def test_what_is_saved_loads_in_transformers(tmp_path, same, dtype, change):
    transformers = pytest.importorskip("transformers")
    config = {
        "vocabulary_size": 61,
        "num_layers": 2,
        "hidden_dim": 24,
        "intermediate_dim": 56,
        "max_sequence_length": 40,
    }
    model = randomised(FNetBackbone(**config, **change, dtype=dtype)).eval()
    model.save_to_preset(tmp_path / "saved")
    again = Backbone.from_preset(tmp_path / "saved")
    same(again.state_dict(), model.state_dict())
    assert again.get_config() == model.get_config()

    pooler = change.get("pooler", True)
    theirs, report = transformers.FNetModel.from_pretrained(
        tmp_path / "saved", dtype="auto", output_loading_info=True, add_pooling_layer=pooler
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.dtype == getattr(torch, dtype)
    same(fnet_state(theirs.state_dict()), model.state_dict())
    assert (theirs.config.hidden_act, theirs.config.layer_norm_eps) == (
        change.get("activation", "gelu_new"),
        change.get("layer_norm_epsilon", 1e-12),
    )
    ids = torch.randint(61, (2, 7))
    with torch.no_grad():
        out = model.double()(token_ids=ids, segment_ids=None)["sequence_output"]
        expected = theirs.eval().double()(input_ids=ids).last_hidden_state
    assert (out - expected).abs().max() < 1e-9 * expected.abs().max()
