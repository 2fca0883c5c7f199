"""Do ALBERT's directories in both formats load to the right values and outputs, and are bad ones refused by name?"""

import json
import re

import h5py
import numpy as np
import pytest
import torch
from albert_cases import albert_state, call_of, outputs_of, reference_outputs
from safetensors.torch import load_file, save_file

from pyfused import AlbertBackbone, backend
from pyfused.checkpoints import open_checkpoint, presets_of
from pyfused.models.backbone import Backbone
from pyfused.testing import assert_close

NAMES = ("hf_albert_pretraining", "hf_albert_mlm", "keras_albert")
CONFIG = {
    "vocabulary_size": 29, "num_layers": 4, "num_heads": 3, "embedding_dim": 6, "hidden_dim": 12, "intermediate_dim": 20,
    "num_groups": 2, "num_inner_repetitions": 2, "dropout": 0.0, "max_sequence_length": 16, "num_segments": 2,
    "activation": "gelu_new", "layer_norm_epsilon": 1e-12, "attention_dropout": None,
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_golden_directories(golden, same, name):
    """All three hold the same backbone, that of masked-token prediction without its pooler."""
    checkpoint = open_checkpoint(golden / "ckpt" / name)
    assert (checkpoint.model, checkpoint.dtype) == ("albert", torch.float32)
    pooler, feed_forward = name != "hf_albert_mlm", None if name.startswith("keras") else 0.0
    assert checkpoint.config == CONFIG | {"pooler": pooler, "feed_forward_dropout": feed_forward}
    twin = golden / "ckpt" / ("hf_albert_mlm" if not pooler else "hf_albert_pretraining")
    same(checkpoint.tensors(), albert_state(load_file(twin / "model.safetensors")))
    model = Backbone.from_preset(golden / "ckpt" / name)
    assert type(model) is AlbertBackbone
    same(model.state_dict(), checkpoint.tensors())
    assert model.get_config() == checkpoint.config | {"dtype": "float32", "name": None, "trainable": True}


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_golden_outputs(golden, name):
    stored = load_file(golden / "ckpt" / name / "expected.safetensors")
    inputs = {k.removeprefix("in/"): v for k, v in stored.items() if k.startswith("in/")}
    model = Backbone.from_preset(golden / "ckpt" / name)
    actual, reference = outputs_of(model, call_of(inputs)), reference_outputs(model, call_of(inputs))
    assert {f"out/{what}" for what in actual} == {k for k in stored if k.startswith("out/")}
    truth = outputs_of(Backbone.from_preset(golden / "ckpt" / name, dtype="float64"), call_of(inputs))
    assert inputs["attention_mask"].sum(1).min() > 0  # the libraries disagree about rows that may look at no key
    for what, value in actual.items():
        assert_close(value, [stored[f"out/{what}"], reference[what]], truth[what], f"{name} {what}")


def test_against_the_verified_name_maps(golden):
    weights = load_file(golden / "ckpt" / "hf_albert_pretraining" / "model.safetensors")
    rows = json.loads((golden / "name_maps.json").read_text())["albert"]
    with h5py.File(golden / "ckpt" / "keras_albert" / "model.weights.h5") as file:
        for row in rows:
            source = weights["albert." + row["hf"]].numpy()
            source = source.T if row["op"].startswith("T") else source
            np.testing.assert_array_equal(file[row["h5"]][()], source.reshape(row["shape"]), row["h5"])
    plan = open_checkpoint(golden / "ckpt" / "keras_albert")._plan
    assert {row["h5"] for row in rows} == {piece.name for target in plan.values() for piece in target.pieces}


def configured(directory, edit, **changes):
    edit(directory / "config.json", **changes)
    return open_checkpoint(directory, weights=False).config


def test_defaults_and_options_of_hugging_face(preset, edit):
    directory = preset("hf_albert_pretraining")
    (directory / "config.json").write_text('{"model_type": "albert"}')
    config = open_checkpoint(directory, weights=False).config
    assert (config["vocabulary_size"], config["num_layers"], config["num_heads"]) == (30000, 12, 64)
    assert (config["embedding_dim"], config["hidden_dim"], config["intermediate_dim"]) == (128, 4096, 16384)
    assert (config["num_groups"], config["num_inner_repetitions"], config["num_segments"]) == (1, 1, 2)
    assert (config["activation"], config["layer_norm_epsilon"], config["max_sequence_length"]) == (
        "gelu_new",
        1e-12,
        512,
    )
    assert (config["dropout"], config["attention_dropout"], config["feed_forward_dropout"]) == (0.0, None, 0.0)
    # As the published ones of version 1, and what all of them repeat
    config = configured(directory, edit, hidden_act="gelu", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
                        gap_size=0, net_structure_type=0, num_memory_blocks=0, down_scale_factor=1,
                        position_embedding_type="absolute", classifier_dropout_prob=0.1)  # fmt: skip
    assert (config["activation"], config["dropout"], config["attention_dropout"]) == ("gelu", 0.1, None)
    config = configured(directory, edit, attention_probs_dropout_prob=0.0, num_hidden_layers=5, num_hidden_groups=2)
    assert (config["attention_dropout"], config["num_layers"], config["num_groups"]) == (0.0, 5, 2)
    (directory / "config.json").write_text('{"architectures": ["AlbertForMaskedLM"]}')
    assert open_checkpoint(directory, weights=False).model == "albert"


@pytest.mark.parametrize(
    "change, said",
    [
        ({"hidden_act": "mish"}, "hidden_act is 'mish'; it takes one of gelu_new"),
        ({"hidden_act": 3}, "hidden_act is 3"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_groups": 10**9}, "num_groups is 1000000000"),
        ({"num_hidden_groups": 3}, "albert_layer_groups.2.*is missing"),
        ({"num_hidden_groups": 1}, "albert_layer_groups.1.*is not part of the model"),
        ({"inner_group_num": 3}, "albert_layers.2.*is missing"),
        ({"embedding_size": 7}, "word_embeddings.weight' has shape"),
        ({"type_vocab_size": 3}, "token_type_embeddings.weight' has shape"),
        ({"num_attention_heads": 5}, "hidden_size is 12, not a multiple of num_attention_heads, 5"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"num_memory_blocks": 2}, "num_memory_blocks is 2; pyfused supports only 0"),
        ({"quantization_config": {"bits": 8}}, "quantization_config"),
        ({"hidden_dropout_prob": 2.0}, "hidden_dropout_prob is 2.0"),
    ],
)
def test_options_that_do_not_fit(preset, edit, change, said):
    directory = preset("hf_albert_pretraining")
    edit(directory / "config.json", **change)
    with pytest.raises(ValueError, match=f"{re.escape(str(directory))}.*{said}"):
        open_checkpoint(directory)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"num_groups": 3}, "num_layers is 4, not a multiple of num_groups, 3"),
        ({"num_heads": 13}, "num_heads is 13, more than hidden_dim, 12"),
        ({"num_inner_repetitions": 1}, "transformer_encoder_2.*is not part of the model"),
        ({"activation": "relu"}, "activation='relu'"),
        ({"embedding_dim": None}, "embedding_dim is None"),
    ],
)
def test_options_of_keras_that_do_not_fit(preset, edit, change, said):
    directory = preset("keras_albert")
    config = json.loads((directory / "config.json").read_text())["config"]
    edit(directory / "config.json", config=config | change)
    with pytest.raises(ValueError, match=f"{re.escape(str(directory))}.*{said}"):
        open_checkpoint(directory)


def test_half_a_pooler_is_refused(preset):
    path = preset("hf_albert_pretraining") / "model.safetensors"
    weights = load_file(path)
    del weights["albert.pooler.bias"]
    save_file(weights, path)
    with pytest.raises(ValueError, match=r"'pooler.bias' of shape .* is missing"):
        open_checkpoint(path.parent)


@pytest.mark.parametrize("legacy", [True, False])
def test_files_of_older_keras(preset, same, legacy):
    """`layers` and the projections under the names they had; class and dtype as they were written."""
    directory = preset("keras_albert")
    expected = dict(open_checkpoint(directory).tensors())
    path = directory / "model.weights.h5"
    with h5py.File(path, "r+") as file:
        for name, group in file["layers"].items():
            if name.startswith("transformer_encoder"):
                attention = group["_self_attention_layer"]
                for part in ("query", "key", "value", "output"):
                    attention.move(f"{part}_dense", f"_{part}_dense")
        if legacy:
            file.move("layers", "_layer_checkpoint_dependencies")
    raw = (directory / "config.json").read_text().replace("keras_hub>", "keras_nlp>")
    (directory / "config.json").write_text(raw)
    same(open_checkpoint(directory).tensors(), expected)


def test_published_names_are_kerashubs():
    keras_hub = pytest.importorskip("keras_hub")
    theirs, ours = keras_hub.models.AlbertBackbone.presets, presets_of({"albert"})
    assert set(theirs) <= set(ours)
    assert len(theirs) == 4
    for name, entry in theirs.items():
        assert ours[name]["kaggle_handle"] == entry["kaggle_handle"]
        assert ours[name]["metadata"]["params"] == entry["metadata"]["params"]
    assert AlbertBackbone.presets["albert_base_en_uncased"]["hf_repo"] == "albert/albert-base-v2"


SIZES = {"vocab_size": 61, "num_hidden_layers": 5, "num_attention_heads": 4, "embedding_size": 10, "hidden_size": 24,
         "intermediate_size": 56, "num_hidden_groups": 2, "inner_group_num": 2, "max_position_embeddings": 33}  # fmt: skip


def randomised(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


@pytest.mark.parametrize("name", ["AlbertModel", "AlbertForPreTraining", "AlbertForMaskedLM"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shards", ["5GB", "20KB"])
def test_transformers_save_pretrained(tmp_path, same, name, dtype, shards):
    transformers = pytest.importorskip("transformers")
    model = randomised(getattr(transformers, name)(transformers.AlbertConfig(**SIZES))).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size=shards)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shards == "20KB")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.dtype == dtype
    assert checkpoint.config["pooler"] == (name != "AlbertForMaskedLM")
    same(checkpoint.tensors(), albert_state(model.state_dict()))


@torch.no_grad()
@pytest.mark.parametrize("heads", [4, 5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sharded", [False, True])
def test_keras_hub_save_to_preset(tmp_path, heads, dtype, sharded):
    """Also with a head size that does not divide the width."""
    keras_hub = pytest.importorskip("keras_hub")
    sizes = {"vocabulary_size": 61, "num_layers": 4, "num_heads": heads, "embedding_dim": 10, "hidden_dim": 24}
    sizes |= {"intermediate_dim": 56, "num_groups": 2, "num_inner_repetitions": 2, "max_sequence_length": 33}
    model = keras_hub.models.AlbertBackbone(**sizes, dropout=0.2, num_segments=3, dtype=dtype)
    for variable in model.weights:
        variable.assign(0.1 * torch.randn(tuple(variable.shape)))
    model.save_to_preset(str(tmp_path), max_shard_size=3e-5 if sharded else 10)
    assert (tmp_path / "model.weights.json").exists() == sharded
    mine = Backbone.from_preset(tmp_path)
    assert mine.dtype == getattr(torch, dtype)
    assert (mine.get_config()["dropout"], mine.get_config()["feed_forward_dropout"]) == (0.2, None)
    assert sum(p.numel() for p in mine.parameters()) == model.count_params()
    if dtype == "float32":
        mask = torch.ones(2, 9)
        mask[1, 6:] = 0
        call = {"token_ids": torch.randint(61, (2, 9)), "segment_ids": torch.randint(3, (2, 9)), "padding_mask": mask}
        theirs, truth = model(call), Backbone.from_preset(tmp_path, dtype="float64")(call)
        with backend("reference"):
            reference = mine(call)
        for name, value in mine(call).items():
            assert_close(value, [theirs[name], reference[name]], truth[name], name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "change",
    [
        {}, {"activation": "gelu", "num_groups": 3, "layer_norm_epsilon": 1e-3, "num_segments": 3},
        {"pooler": False, "dropout": 0.2, "feed_forward_dropout": 0.0, "attention_dropout": 0.1},
        {"activation": "keras_hub>gelu_approximate", "dropout": 0.2, "num_inner_repetitions": 2},
    ],
)  # fmt: skip
def test_what_is_saved_loads_in_transformers(tmp_path, same, dtype, change):
    transformers = pytest.importorskip("transformers")
    config = {"vocabulary_size": 61, "num_layers": 5, "num_heads": 4, "embedding_dim": 10, "hidden_dim": 24}
    config |= {"intermediate_dim": 56, "max_sequence_length": 33}
    model = randomised(AlbertBackbone(**config, **change, dtype=dtype).eval())
    model.save_to_preset(tmp_path / "saved")
    again = Backbone.from_preset(tmp_path / "saved")
    same(again.state_dict(), model.state_dict())
    saved, stated = again.get_config(), model.get_config()
    # None follows `dropout`, which transformers' configuration cannot say of the feed-forward's output
    rate = stated["dropout"] if stated["feed_forward_dropout"] is None else stated["feed_forward_dropout"]
    assert saved == stated | {"feed_forward_dropout": rate}

    theirs, report = transformers.AlbertModel.from_pretrained(
        tmp_path / "saved", dtype="auto", output_loading_info=True, add_pooling_layer=change.get("pooler", True)
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.dtype == getattr(torch, dtype)
    ids = torch.randint(61, (2, 7))
    with torch.no_grad():
        out = model.double()(token_ids=ids, segment_ids=None, padding_mask=None)["sequence_output"]
        expected = theirs.eval().double()(input_ids=ids).last_hidden_state
    torch.testing.assert_close(out, expected)


def test_saving_refuses_by_name(tmp_path):
    with pytest.raises(ValueError, match="hidden_dim is 8; transformers' ALBERT takes multiples of num_heads, 3"):
        AlbertBackbone(9, 1, 3, 4, 8, 8).save_to_preset(tmp_path)
    assert not any(tmp_path.iterdir())
