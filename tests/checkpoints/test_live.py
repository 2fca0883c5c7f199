"""Do files that transformers and KerasHub write now load here, and do both load what is written here?"""

import copy
import json
import shutil

import pytest
import torch
from backbone_cases import (
    NAMES,
    assert_near,
    backbone_of_options,
    call_of,
    hf_fnet,
    hf_model,
    hf_outputs,
    inputs_of,
    like_hf,
    outputs_of,
)
from safetensors.torch import load_file

from pyfused import backend
from pyfused.checkpoints import open_checkpoint, save_to_preset
from pyfused.models.backbone import Backbone
from pyfused.testing import assert_close

transformers = pytest.importorskip("transformers")
keras_hub = pytest.importorskip("keras_hub")

# test_heads_and_prefixes.py loads every other class
HEADED = {"gpt2": "GPT2LMHeadModel", "albert": "AlbertModel", "t5": "T5ForConditionalGeneration", "fnet": "FNetModel"}


@torch.no_grad()
def assert_same_function(preset, hf):
    """The preset and transformers' model give the same outputs. transformers' T5 norm is in float32 whatever the dtype."""
    inputs = inputs_of(hf.config.model_type)
    found = outputs_of(Backbone.from_preset(preset, dtype="float64"), call_of(hf.config.model_type, inputs))
    expected = hf_outputs(copy.deepcopy(hf).double().eval(), inputs)
    assert found.keys() >= expected.keys()
    for name, value in expected.items():
        assert_near(value.float(), found[name])


@pytest.mark.parametrize(
    "dtype, shards", [(torch.float32, "5GB"), (torch.bfloat16, "10KB"), (torch.float16, "10KB")], ids=str
)
@pytest.mark.parametrize("family", HEADED)
def test_transformers_save_pretrained(tmp_path, family, dtype, shards):
    hf = hf_model(family, dtype, kind=HEADED[family])
    hf.save_pretrained(tmp_path, max_shard_size=shards)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shards == "10KB")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.dtype == dtype
    assert checkpoint.config.get("tie_embedding_weights", True)
    assert_same_function(tmp_path, hf)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_transformers_untied(tmp_path, family):
    hf = hf_model(family, kind=HEADED[family], tie_word_embeddings=False)
    hf.lm_head.weight = torch.nn.Parameter(torch.randn(61, 24))
    hf.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config["tie_embedding_weights"] is False
    assert checkpoint.config.get("scale_logits", False) is False
    assert torch.equal(dict(checkpoint.tensors())["token_embedding.reverse_weight"], hf.lm_head.weight)
    assert_same_function(tmp_path, hf)


def test_transformers_made_for_a_tpu(tmp_path, same):
    """Its Fourier matrices are in the file and of no use here."""
    pytest.importorskip("scipy")
    hf_fnet(use_tpu_fourier_optimizations=True, tpu_short_seq_length=16).save_pretrained(tmp_path)
    assert any("dft_mat" in name for name in load_file(tmp_path / "model.safetensors"))
    same(open_checkpoint(tmp_path).tensors(), like_hf(hf_fnet()).state_dict())


SIZES = {"vocabulary_size": 61, "num_layers": 3, "hidden_dim": 24, "intermediate_dim": 56}
HEADS = {**SIZES, "num_heads": 4}
FIVE = {"num_heads": 5}  # of 4, in a width of 24: transformers refuses that
GATED = {"tie_embedding_weights": False, "key_value_dim": 7}
KERAS = {
    "gpt2": (HEADS | {"max_sequence_length": 33}, FIVE),
    "albert": (HEADS | {"num_layers": 4, "embedding_dim": 10, "num_groups": 2, "num_inner_repetitions": 2,
                        "max_sequence_length": 33, "num_segments": 3}, FIVE),
    "t5": (HEADS | {"activation": "relu", "use_gated_activation": False}, {"use_gated_activation": True, **GATED}),
    "fnet": (SIZES | {"max_sequence_length": 40}, {"num_segments": 2}),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Layer .* was passed an input with a mask:UserWarning")
@pytest.mark.parametrize(
    "other, dtype, sharded",  # every pair of values
    [(False, "float32", False), (False, "bfloat16", True), (True, "float32", True), (True, "float16", False)],
)
@pytest.mark.parametrize("family", KERAS)
def test_keras_hub_save_to_preset(tmp_path, family, other, dtype, sharded):
    """In half precision only FNet's outputs are compared; KerasHub transforms in float32 for every dtype, as pyfused does."""
    sizes, change = KERAS[family]
    stated = sizes | (change if other else {})
    options = dict(stated)
    if family == "t5" and other:
        from keras_hub.src.utils.keras_utils import gelu_approximate

        options["activation"], stated["activation"] = gelu_approximate, "gelu_new"
    keras = getattr(keras_hub.models, f"{NAMES[family]}Backbone")(**options, dropout=0.2, dtype=dtype)
    for weight in keras.weights:
        weight.assign((1.0 if weight.name == "gamma" else 0.0) + 0.2 * torch.randn(tuple(weight.shape)))
    keras.save_to_preset(str(tmp_path), max_shard_size=1.5e-5 if sharded else 10)
    assert (tmp_path / "model.weights.json").exists() == sharded
    mine = Backbone.from_preset(tmp_path)
    assert mine.dtype == getattr(torch, dtype)
    assert mine.get_config().items() >= (stated | {"dropout": 0.2}).items()
    assert sum(p.numel() for p in mine.parameters()) == keras.count_params()
    if dtype != "float32" and family != "fnet":
        return
    call = call_of(family, inputs_of(family, padding="none" if family == "fnet" else "right"))
    exact, vectors = Backbone.from_preset(tmp_path, dtype="float64"), torch.randn(3, mine.token_embedding.embedding_dim)

    def outputs(model, dtype):
        found = model(call)
        found = found if isinstance(found, dict) else {"sequence_output": found}
        return found | {"logits": model.token_embedding(vectors.to(dtype), reverse=True)}

    plain, actual, truth = outputs(keras, mine.dtype), outputs(mine, mine.dtype), outputs(exact, torch.float64)
    assert plain.keys() == actual.keys()
    with backend("reference"):
        reference = outputs(mine, mine.dtype)
    for name, value in actual.items():
        assert value.dtype == mine.dtype
        assert_near(plain[name], truth[name])
        assert_close(value, [plain[name], reference[name]], truth[name], name)


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize`:UserWarning")
def test_keras_hub_quantised(tmp_path):
    model = keras_hub.models.GPT2Backbone(**HEADS, max_sequence_length=33)
    model.quantize("int8")
    model.save_to_preset(str(tmp_path))
    with pytest.raises(ValueError, match=r"pass dtype="):
        _ = open_checkpoint(tmp_path, weights=False).dtype
    with pytest.raises(ValueError, match=r"model.weights.h5: tensor .*(int8|not part of the model|has shape)"):
        open_checkpoint(tmp_path)


GPT2 = {"activation": "gelu_new", "layer_norm_epsilon": 1e-3, "attention_dropout": 0.3, "scale_attention": False,
        "scale_attention_by_inverse_layer_index": True, "upcast_attention": True}  # fmt: skip
SAVED = [
    ("gpt2", GPT2), ("gpt2", {**GPT2, "cross_attention": True}),
    ("gpt2", {**GPT2, "tie_embedding_weights": False, "dropout": 0.0}),
    ("albert", {}), ("albert", {"activation": "gelu", "num_groups": 2, "layer_norm_epsilon": 1e-3, "num_segments": 3}),
    ("albert", {"pooler": False, "dropout": 0.2, "feed_forward_dropout": 0.0, "attention_dropout": 0.1}),
    ("albert", {"activation": "keras_hub>gelu_approximate", "dropout": 0.2, "num_inner_repetitions": 2}),
    ("t5", {"use_gated_activation": False}), ("t5", {"activation": "gelu", "num_decoder_layers": 1}),
    ("t5", {"activation": "gelu_new", "tie_embedding_weights": False, "num_buckets": 16, "max_distance": 40}),
    ("t5", {"activation": "silu", "scale_logits": False, "decoder_start_token_id": 3, "key_value_dim": None}),
    ("t5", {"activation": "relu", "tie_embedding_weights": False, "scale_logits": True, "layer_norm_epsilon": 1e-3}),
    ("fnet", {}), ("fnet", {"activation": "gelu", "num_segments": 2}), ("fnet", {"layer_norm_epsilon": 1e-3, "dropout": 0.0}),
    ("fnet", {"pooler": False}),
]  # fmt: skip


def randomised(model):
    """Every parameter random, biases and norms too, so that none can be mistaken for another."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.5)
    return model


@pytest.mark.filterwarnings("ignore:.*'lm_head.weight' differs from 'shared.weight'")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family, change", SAVED)
def test_what_is_saved_loads_in_transformers(tmp_path, same, family, change, dtype):
    own = {"key_value_dim": 7} if family == "t5" else {}
    model = randomised(backbone_of_options(family, **own | change, dtype=dtype))
    directory = tmp_path / "new" / "place"
    model.save_to_preset(directory)
    assert sorted(path.name for path in directory.iterdir()) == ["config.json", "model.safetensors"]
    again = Backbone.from_preset(directory)
    same(again.state_dict(), model.state_dict())
    stated = model.get_config()
    if family == "albert" and stated["feed_forward_dropout"] is None:  # transformers cannot say: as `dropout`
        stated["feed_forward_dropout"] = stated["dropout"]
    if family == "t5":
        stated["key_value_dim"] = stated["key_value_dim"] or 6
    assert again.get_config() == stated

    pooler = {"add_pooling_layer": stated["pooler"]} if "pooler" in stated else {}
    theirs, report = getattr(transformers, HEADED[family]).from_pretrained(
        directory, dtype="auto", output_loading_info=True, **pooler
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.dtype == getattr(torch, dtype)
    assert_same_function(directory, theirs)
    if family == "gpt2":
        assert (theirs.config.resid_pdrop, theirs.config.attn_pdrop) == (change.get("dropout", 0.1), 0.3)
        head = (
            model.token_embedding.reverse_weight if "tie_embedding_weights" in change else model.token_embedding.weight
        )
        assert torch.equal(theirs.lm_head.weight, head)
    theirs.save_pretrained(tmp_path / "again")
    same(open_checkpoint(tmp_path / "again").tensors(), model.state_dict())


def test_saving_refuses_by_name(tmp_path):
    def small(family="gpt2", **options):
        return backbone_of_options(family, num_layers=1, hidden_dim=8, **{"num_heads": 2} | options)

    with pytest.raises(ValueError, match="hidden_dim is 8; transformers' GPT-2 takes multiples of num_heads, 3"):
        small(num_heads=3).save_to_preset(tmp_path)
    with pytest.raises(ValueError, match="hidden_dim is 8; transformers' ALBERT takes multiples of num_heads, 3"):
        small("albert", num_heads=3).save_to_preset(tmp_path)
    with pytest.raises(TypeError, match="model is a Linear; it takes a backbone"):
        save_to_preset(torch.nn.Linear(2, 2), tmp_path)
    model = small()
    model.adapter = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"not those of its configuration: \['adapter.bias', 'adapter.weight'\]"):
        model.save_to_preset(tmp_path)
    model = small()
    model._config["activation"] = "mish"
    with pytest.raises(ValueError, match="activation is 'mish'"):
        model.save_to_preset(tmp_path)
    assert not any(tmp_path.iterdir())


def test_saving_over_a_checkpoint_that_a_model_came_from(tmp_path, golden, same):
    """Loading leaves no view of the file behind, so that a training run may write where it read."""
    directory = shutil.copytree(golden / "ckpt" / "hf_gpt2", tmp_path / "model")
    model = Backbone.from_preset(directory)
    model.save_to_preset(directory)
    same(Backbone.from_preset(directory).state_dict(), model.state_dict())
    assert json.loads((directory / "config.json").read_text())["architectures"] == ["GPT2LMHeadModel"]
