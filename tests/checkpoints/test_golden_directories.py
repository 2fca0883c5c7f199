"""Do the golden directories of both formats hold what their names say, and does each compute what its writer computed?"""

import json

import h5py
import numpy as np
import pytest
import torch
from backbone_cases import assert_near, call_of, live, outputs_of, reference_outputs
from safetensors.torch import load_file

from pyfused.checkpoints import open_checkpoint
from pyfused.models.backbone import Backbone
from pyfused.testing import assert_close

SIZES = {"vocabulary_size": 29, "num_layers": 2, "num_heads": 3, "hidden_dim": 12, "intermediate_dim": 20}
ROWS = {"max_sequence_length": 16, "activation": "gelu_new"}
GPT2 = {
    **SIZES, **ROWS, "dropout": 0.1, "layer_norm_epsilon": 1e-5, "embedding_dropout": None, "attention_dropout": None,
    "residual_dropout": None, "scale_attention": True, "scale_attention_by_inverse_layer_index": False,
    "upcast_attention": False, "cross_attention": False, "tie_embedding_weights": True,
}  # fmt: skip
ALBERT = {
    **SIZES, **ROWS, "num_layers": 4, "embedding_dim": 6, "num_groups": 2, "num_inner_repetitions": 2, "dropout": 0.0,
    "num_segments": 2, "layer_norm_epsilon": 1e-12, "attention_dropout": None, "feed_forward_dropout": 0.0, "pooler": True,
}  # fmt: skip
T5 = {
    **SIZES, "key_value_dim": 5, "dropout": 0.1, "layer_norm_epsilon": 1e-6, "num_decoder_layers": 2, "num_buckets": 32,
    "max_distance": 128, "decoder_start_token_id": 0, "activation": "relu", "use_gated_activation": False,
    "tie_embedding_weights": True, "scale_logits": True,
}  # fmt: skip
V11 = T5 | {
    "activation": "gelu_new", "use_gated_activation": True, "tie_embedding_weights": False, "scale_logits": False,
}  # fmt: skip
FNET = {name: value for name, value in SIZES.items() if name != "num_heads"} | ROWS
FNET |= {"dropout": 0.1, "num_segments": 4, "layer_norm_epsilon": 1e-12, "pooler": True}
# name: (the family, the one with the same weights, the backbone's arguments)
DIRECTORIES = {
    **dict.fromkeys(
        ("hf_gpt2", "hf_gpt2_lm", "keras_gpt2", "keras_gpt2_legacy", "keras_gpt2_task", "keras_gpt2_bf16"),
        ("gpt2", "hf_gpt2", GPT2),
    ),
    "hf_albert_pretraining": ("albert", "hf_albert_pretraining", ALBERT),
    "hf_albert_mlm": ("albert", "hf_albert_mlm", ALBERT | {"pooler": False}),
    "keras_albert": ("albert", "hf_albert_pretraining", ALBERT | {"feed_forward_dropout": None}),
    **dict.fromkeys(("hf_t5", "keras_t5"), ("t5", "hf_t5", T5)),
    **dict.fromkeys(("hf_t5_v11", "hf_t5_sharded", "keras_t5_v11", "keras_t5_sharded"), ("t5", "hf_t5_v11", V11)),
    **dict.fromkeys(("hf_fnet_pretraining", "keras_fnet"), ("fnet", "hf_fnet_pretraining", FNET)),
}


@pytest.mark.parametrize("name", DIRECTORIES)
def test_weights_and_configuration(golden, same, name):
    """Directories of one kind hold the same weights, whatever the format."""
    family, twin, config = DIRECTORIES[name]
    checkpoint, half = open_checkpoint(golden / "ckpt" / name), name.endswith("bf16")
    assert (checkpoint.model, checkpoint.config, checkpoint.directory) == (family, config, golden / "ckpt" / name)
    assert checkpoint.dtype == (torch.bfloat16 if half else torch.float32)
    expected = dict(open_checkpoint(golden / "ckpt" / twin).tensors())
    expected = {key: tensor.to(checkpoint.dtype) for key, tensor in expected.items()}
    same(checkpoint.tensors(), expected)
    same(checkpoint.tensors(torch.float64), {key: tensor.double() for key, tensor in expected.items()})
    model = Backbone.from_preset(golden / "ckpt" / name)
    same(model.state_dict(), expected)
    assert checkpoint.shapes == {key: tuple(value.shape) for key, value in expected.items()}
    own = {"dtype": "bfloat16" if half else "float32", "name": None, "trainable": True}
    assert model.get_config() == config | own


@torch.no_grad()
@pytest.mark.parametrize("name", DIRECTORIES)
def test_outputs(golden, name):
    family, directory = DIRECTORIES[name][0], golden / "ckpt" / name
    stored = load_file(directory / "expected.safetensors")
    inputs = {k.removeprefix("in/"): v for k, v in stored.items() if k.startswith("in/")}
    call, model = call_of(family, inputs), Backbone.from_preset(directory, dtype="float32")
    actual, reference = outputs_of(model, call), reference_outputs(model, call)
    truth = outputs_of(Backbone.from_preset(directory, dtype="float64"), call)
    assert {f"out/{what}" for what in actual} >= {k for k in stored if k.startswith("out/")}
    for what in (k.removeprefix("out/") for k in stored if k.startswith("out/")):
        rows = ...  # the libraries disagree about rows that may look at no key
        if family in ("gpt2", "t5"):
            rows = live(inputs, what) if family == "t5" else inputs["attention_mask"].cumsum(1) > 0
        plains = [stored[f"out/{what}"][rows], reference[what][rows]]
        assert_near(plains[0], truth[what][rows])
        assert_close(actual[what][rows], plains, truth[what][rows], f"{name} {what}")


@pytest.mark.parametrize(
    "name, prefix, hf, keras",
    [("gpt2", "", "hf_gpt2", "keras_gpt2"), ("albert", "albert.", "hf_albert_pretraining", "keras_albert"),
     ("t5", "", "hf_t5", "keras_t5"), ("t5_v11", "", "hf_t5_v11", "keras_t5_v11"),
     ("fnet", "fnet.", "hf_fnet_pretraining", "keras_fnet")],
)  # fmt: skip
def test_against_the_verified_name_maps(golden, name, prefix, hf, keras):
    """Every variable of the file, put where the name map says it comes from; and the plan names each of them."""
    weights = load_file(golden / "ckpt" / hf / "model.safetensors")
    rows = json.loads((golden / "name_maps.json").read_text())[name]
    with h5py.File(golden / "ckpt" / keras / "model.weights.h5") as file:
        for row in rows:
            source = weights[prefix + row["hf"]].numpy()
            if row["op"] == "cols_reshape":
                first, last, _ = row["args"]
                source = source[..., first:last]
            source = source.T if row["op"].startswith("T") else source
            np.testing.assert_array_equal(file[row["h5"]][()], source.reshape(file[row["h5"]].shape), row["h5"])
    plan = open_checkpoint(golden / "ckpt" / keras)._plan
    assert {row["h5"] for row in rows} == {piece.name for target in plan.values() for piece in target.pieces}
