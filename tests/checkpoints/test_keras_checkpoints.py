"""Do Keras directories of every era load to the right values, and does every damaged or foreign one fail by name?"""

import json
import re

import h5py
import numpy as np
import pytest
import torch

from pyfused.checkpoints import open_checkpoint

EMBEDDING = "layers/reversible_embedding/vars/0"


@pytest.mark.parametrize(
    "policy, dtype",
    [
        ("float16", torch.float16), ({"class_name": "DTypePolicy", "config": {"name": "bfloat16"}}, torch.bfloat16),
        (None, torch.float32), ("mixed_bfloat16", torch.float32), ("int8_from_float32", None), (7, None),
        ({"class_name": "DTypePolicy", "config": {"name": "mixed_float16"}}, torch.float32), ("mixed_int8", None),
        ({"class_name": "DTypePolicyMap", "config": {"default_policy": "float32"}}, None),
        ({"class_name": "QuantizedDTypePolicy", "config": {"mode": "int8", "name": "float32"}}, None),
    ],
)  # fmt: skip
def test_dtype_policies(preset, edit_keras, policy, dtype):
    directory = preset("keras_gpt2")
    edit_keras(directory, dtype=policy)
    checkpoint = open_checkpoint(directory)
    if dtype is not None:
        assert checkpoint.dtype == dtype
    else:
        with pytest.raises(ValueError, match=r"config.json: the dtype policy .*; pass dtype= one of float32"):
            _ = checkpoint.dtype
        assert next(checkpoint.tensors(torch.float32))[1].dtype == torch.float32


@pytest.mark.parametrize(
    "change, said",
    [
        ({"class_name": "BertBackbone", "registered_name": "keras_hub>BertBackbone"}, "the class is 'BertBackbone'"),
        ({"registered_name": "evil>GPT2Backbone"}, "registered as 'evil>GPT2Backbone'"),
        ({"registered_name": None}, "registered as None"),
        ({"class_name": "GPT2CausalLM"}, "the class is 'GPT2CausalLM'"),
        ({"config": None}, "config is None"),
        ({"config": {"num_layers": 2}}, "vocabulary_size is missing"),
    ],
)
def test_foreign_configurations(preset, edit, change, said):
    directory = preset("keras_gpt2")
    edit(directory / "config.json", **change)
    with pytest.raises(ValueError, match=f"config.json: .*{said}"):
        open_checkpoint(directory)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"num_layers": 3}, "transformer_decoder_2/.*is missing"),
        ({"num_layers": 10**9}, "num_layers is 1000000000; pyfused makes models of at most 1000"),
        ({"num_layers": 1}, "transformer_decoder_1.*not part of the model"),
        ({"num_heads": 2}, "query_dense.* has shape"),
        ({"num_heads": 13}, "num_heads is 13"), ({"dropout": -1}, "dropout is -1"), ({"hidden_dim": 24}, "has shape"),
        ({"layer_norm_epsilon": 1e-3}, "layer_norm_epsilon=0.001"), ({"num_heads": True}, "num_heads is True"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit(preset, edit_keras, change, said):
    directory = preset("keras_gpt2")
    edit_keras(directory, **change)
    with pytest.raises(ValueError, match=f"{re.escape(str(directory))}.*{said}"):
        open_checkpoint(directory)


def test_what_nothing_reads_is_named_in_one_warning(preset, edit):
    directory = preset("keras_gpt2")
    config = json.loads((directory / "config.json").read_text())["config"]
    edit(directory / "config.json", config=config | {"rotary": True, "layer_norm_epsilon": 1e-5, "note": "mine"})
    with pytest.warns(UserWarning, match=r"config.json: .* leaves them unread: note='mine', rotary=True$") as caught:
        open_checkpoint(directory)
    assert len(caught) == 1
    edit(directory / "config.json", config=config, surprise=1)
    with pytest.warns(UserWarning, match="beside the object's config .* unread: surprise"):
        open_checkpoint(directory)


def external_link(file):
    del file[EMBEDDING]
    file[EMBEDDING] = h5py.ExternalLink("/etc/passwd", "/x")


def external_group(file):
    file["layers/more"] = h5py.ExternalLink("other.h5", "/layers")


def soft_link(file):
    del file[EMBEDDING]
    file[EMBEDDING] = h5py.SoftLink("/layers/position_embedding/vars/0")


def hard_link_cycle(file):
    file["layers/dropout/again"] = file["layers"]


def second_hard_link(file):
    file["layers/dropout/vars/0"] = file[EMBEDDING]


def replaced(**options):
    def change(file):
        shape = options.pop("shape", (29, 12))
        del file[EMBEDDING]
        file.create_dataset(EMBEDDING, shape, **options)

    return change


def external_storage(file):
    del file[EMBEDDING]
    file.create_dataset(EMBEDDING, (29, 12), "f4", external=[("/etc/passwd", 0, 1392)])


def virtual(file):
    del file[EMBEDDING]
    layout = h5py.VirtualLayout((29, 12), "f4")
    layout[:] = h5py.VirtualSource("other.h5", "x", (29, 12))
    file.create_virtual_dataset(EMBEDDING, layout)


def untagged(file):
    del file[EMBEDDING]
    file[EMBEDDING] = np.zeros((29, 12), "V2")


def deep(file):
    file["layers/" + "a/" * 40 + "b"] = np.zeros(1, "f4")


def integers(file):
    del file[EMBEDDING]
    file[EMBEDDING] = np.zeros((29, 12), "i4")


def missing(file):
    del file[EMBEDDING]


def extra(file):
    file["layers/reversible_embedding/vars/1"] = np.zeros((12, 29), "f4")


def both_names(file):
    group = file["layers/transformer_decoder/_self_attention_layer"]
    group["_query_dense/vars/0"] = np.zeros((12, 3, 4), "f4")


def named_type(file):
    file["layers/kind"] = np.dtype("f8")


@pytest.mark.parametrize(
    "change, said",
    [
        (external_link, "is an HDF5 ExternalLink; links are not followed"),
        (external_group, "'layers/more' is an HDF5 ExternalLink"),
        (soft_link, "is an HDF5 SoftLink; links are not followed"), (hard_link_cycle, "also holds under another name"),
        (second_hard_link, "also holds under another name"), (external_storage, "not one plain block"),
        (virtual, "not one plain block"), (replaced(dtype="f4", chunks=(1, 1)), "not one plain block"),
        (replaced(dtype="f4", compression="gzip", shape=(2**20, 2**20)), "not one plain block"),
        (replaced(dtype="f4"), "was never written"), (replaced(dtype=">f4"), "dtype >f4"),
        (replaced(dtype=h5py.string_dtype()), r"dtype \|O"), (replaced(dtype="c8"), "dtype <c8"),
        (untagged, r"dtype \|V2"), (deep, "groups deep"), (integers, "has dtype torch.int32"),
        (missing, "is missing"), (extra, "not part of the model"), (both_names, "same variable twice"),
        (named_type, "'layers/kind' is an HDF5 Datatype"),
    ],
)  # fmt: skip
def test_hostile_structure(preset, change, said):
    directory = preset("keras_gpt2")
    with h5py.File(directory / "model.weights.h5", "a") as file:
        change(file)
    with pytest.raises(ValueError, match=f"{re.escape(str(directory))}/model.weights.h5: tensor .*{said}|groups deep"):
        open_checkpoint(directory)


def test_training_state_is_not_a_weight(preset, same, golden):
    directory = preset("keras_gpt2")
    with h5py.File(directory / "model.weights.h5", "a") as file:
        file["optimizer/vars/0"] = np.int64(3)
        file["layers/dropout/seed_generator/vars/0"] = np.zeros(2, "u4")
    same(open_checkpoint(directory).tensors(), open_checkpoint(golden / "ckpt" / "hf_gpt2").tensors())


def test_truncated_and_foreign_files(preset):
    directory = preset("keras_gpt2")
    path = directory / "model.weights.h5"
    content = path.read_bytes()
    for size in (0, 5, 100, 2048, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"model.weights.h5: (cannot be read as an h5 file|.*truncated)"):
            open_checkpoint(directory)
    path.write_bytes(np.random.default_rng(0).bytes(5000))
    with pytest.raises(ValueError, match=r"model.weights.h5: cannot be read as an h5 file"):
        open_checkpoint(directory)
    path.unlink()
    with pytest.raises(ValueError, match=r"no weights found; looked for model.weights.h5 and model.weights.json"):
        open_checkpoint(directory)


def shard(directory):
    """Splits model.weights.h5 as Keras does: a group may lie in two shards, and the index then lists both."""
    path = directory / "model.weights.h5"
    weight_map, names = {}, []
    with h5py.File(path) as source:
        source.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        for index, name in enumerate(names):
            file = f"model_{(index + 1) * 3 // (len(names) + 2):05d}.weights.h5"
            with h5py.File(directory / file, "a") as target:
                target[name] = source[name][()]
            listed = weight_map.setdefault("/" + name.rpartition("/")[0], [])
            if file not in listed:
                listed.append(file)
    path.unlink()
    assert any(len(files) > 1 for files in weight_map.values())
    weight_map = {group: files if len(files) > 1 else files[0] for group, files in weight_map.items()}
    (directory / "model.weights.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def test_shards(preset, golden, same):
    directory = preset("keras_gpt2")
    shard(directory)
    same(open_checkpoint(directory).tensors(), open_checkpoint(golden / "ckpt" / "hf_gpt2").tensors())


def test_bad_shards(preset):
    directory = preset("keras_gpt2")
    weight_map = shard(directory)
    index = directory / "model.weights.json"
    group = "/layers/reversible_embedding/vars"
    file = weight_map[group]
    other = next(name for name in weight_map.values() if isinstance(name, str) and name != file)
    for change, said in (
        ({group: "../model_00000.weights.h5"}, "names the shard '../model_00000.weights.h5', which is a path"),
        ({group: "/etc/x.weights.h5"}, "which is a path"),
        ({group: ["model.safetensors"]}, "a shard is the plain name"),
        ({group: "model_00009.weights.h5"}, "model_00009.weights.h5: missing"),
        ({group: other}, f"{file}: tensor '{group[1:]}/0' is here, but"),
        ({group: [file, other]}, f"{other}: tensor '{group}' is missing"),
        ({group: 3}, f"tensor '{group}': the shards are 3"),
        ({group: [[file]]}, "the shards are"),
        ({"/layers/new/vars": file}, f"{file}: tensor '/layers/new/vars' is missing"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map | change}))
        with pytest.raises(ValueError, match=said):
            open_checkpoint(directory)
    index.write_text(json.dumps({"weight_map": weight_map}))
    with h5py.File(directory / other, "a") as target:
        target[group[1:] + "/0"] = np.zeros((29, 12), "f4")
    index.write_text(json.dumps({"weight_map": weight_map | {group: [file, other]}}))
    with pytest.raises(ValueError, match="are the same variable twice"):
        open_checkpoint(directory)
