"""Do files that transformers and KerasHub write now load here, and does transformers load what is written here?"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from pyfused.checkpoints import open_checkpoint, save_to_preset
from pyfused.models.backbone import Backbone

transformers = pytest.importorskip("transformers")
keras_hub = pytest.importorskip("keras_hub")

SIZES = {"vocab_size": 61, "n_layer": 3, "n_head": 4, "n_embd": 24, "n_inner": 56, "n_positions": 33}


def randomised(model):
    """Every parameter random, biases and norms too, so that none can be mistaken for another."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def matrices(model):
    """transformers' weights, Conv1D's transposed, by name without the prefix."""
    state = {name.removeprefix("transformer."): tensor for name, tensor in model.state_dict().items()}
    return {
        name: tensor.t() if name.startswith("h.") and tensor.dim() == 2 else tensor for name, tensor in state.items()
    }


def check(checkpoint, theirs):
    ours = dict(checkpoint.tensors())
    assert torch.equal(ours["token_embedding.weight"], theirs["wte.weight"])
    assert torch.equal(ours["position_embedding.weight"], theirs["wpe.weight"])
    for i in range(SIZES["n_layer"]):
        for kind in ("weight", "bias"):
            for mine, name in (("attention_norm", "ln_1"), ("attention.query_key_value", "attn.c_attn"),
                               ("attention.output", "attn.c_proj"), ("feed_forward_norm", "ln_2"),
                               ("feed_forward.inner", "mlp.c_fc"), ("feed_forward.outer", "mlp.c_proj")):  # fmt: skip
                assert torch.equal(ours[f"layers.{i}.{mine}.{kind}"], theirs[f"h.{i}.{name}.{kind}"]), name
    assert torch.equal(ours["final_norm.bias"], theirs["ln_f.bias"])


@pytest.mark.parametrize("name", ["GPT2Model", "GPT2LMHeadModel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shards", ["5GB", "20KB"])
def test_transformers_save_pretrained(tmp_path, name, dtype, shards):
    model = randomised(getattr(transformers, name)(transformers.GPT2Config(**SIZES))).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size=shards)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shards == "20KB")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.dtype == dtype
    assert checkpoint.config["tie_embedding_weights"] is True
    check(checkpoint, matrices(model))


def test_transformers_untied(tmp_path):
    config = transformers.GPT2Config(**SIZES, tie_word_embeddings=False)
    model = randomised(transformers.GPT2LMHeadModel(config))
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config["tie_embedding_weights"] is False
    assert torch.equal(dict(checkpoint.tensors())["token_embedding.reverse_weight"], model.lm_head.weight)
    check(checkpoint, matrices(model))


@pytest.mark.parametrize("heads", [4, 5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("sharded", [False, True])
def test_keras_hub_save_to_preset(tmp_path, heads, dtype, sharded):
    """Also with a head size that does not divide the width: 5 heads of 4 out of 24."""
    model = keras_hub.models.GPT2Backbone(
        vocabulary_size=61, num_layers=3, num_heads=heads, hidden_dim=24, intermediate_dim=56, dropout=0.2,
        max_sequence_length=33, dtype=dtype,
    )  # fmt: skip
    for variable in model.weights:
        variable.assign(torch.randn(tuple(variable.shape)))
    model.save_to_preset(str(tmp_path), max_shard_size=3e-5 if sharded else 10)
    assert (tmp_path / "model.weights.json").exists() == sharded
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.dtype == getattr(torch, dtype)
    assert (checkpoint.config["dropout"], checkpoint.config["num_heads"]) == (0.2, heads)
    ours = dict(checkpoint.tensors())
    size = 24 // heads

    def same(name, variable, transpose=False):
        value = variable.value.detach()
        value = value.reshape(ours[name].shape[::-1]).t() if transpose else value.reshape(ours[name].shape)
        assert torch.equal(ours[name], value), name

    same("token_embedding.weight", model.token_embedding.embeddings)
    same("position_embedding.weight", model.get_layer("position_embedding").position_embeddings)
    for i, layer in enumerate(model.transformer_layers):
        attention = layer._self_attention_layer
        rows = ours[f"layers.{i}.attention.query_key_value.weight"].split(heads * size)
        biases = ours[f"layers.{i}.attention.query_key_value.bias"].split(heads * size)
        for row, bias, dense in zip(rows, biases, (attention.query_dense, attention.key_dense, attention.value_dense)):
            assert torch.equal(row, dense.kernel.value.detach().reshape(24, -1).t())
            assert torch.equal(bias, dense.bias.value.detach().reshape(-1))
        same(f"layers.{i}.attention.output.weight", attention.output_dense.kernel, True)
        same(f"layers.{i}.attention.output.bias", attention.output_dense.bias)
        same(f"layers.{i}.attention_norm.weight", layer._self_attention_layer_norm.gamma)
        same(f"layers.{i}.feed_forward_norm.bias", layer._feedforward_layer_norm.beta)
        same(f"layers.{i}.feed_forward.inner.weight", layer._feedforward_intermediate_dense.kernel, True)
        same(f"layers.{i}.feed_forward.outer.weight", layer._feedforward_output_dense.kernel, True)
        same(f"layers.{i}.feed_forward.outer.bias", layer._feedforward_output_dense.bias)
    same("final_norm.weight", model.get_layer("layer_norm").gamma)


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize`:UserWarning")
def test_keras_hub_quantised(tmp_path):
    model = keras_hub.models.GPT2Backbone(
        vocabulary_size=61, num_layers=1, num_heads=4, hidden_dim=24, intermediate_dim=56, max_sequence_length=33
    )
    model.quantize("int8")
    model.save_to_preset(str(tmp_path))
    with pytest.raises(ValueError, match=r"pass dtype="):
        _ = open_checkpoint(tmp_path, weights=False).dtype
    with pytest.raises(ValueError, match=r"model.weights.h5: tensor .*(int8|not part of the model|has shape)"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("change", [{}, {"cross_attention": True}, {"tie_embedding_weights": False, "dropout": 0.0}])
def test_what_is_saved_loads_in_transformers(tmp_path, standin, same, dtype, change):
    config = {"vocabulary_size": 61, "num_layers": 3, "num_heads": 4, "hidden_dim": 24, "intermediate_dim": 56}
    options = {"max_sequence_length": 33, "dtype": dtype, "activation": "gelu_tanh", "layer_norm_epsilon": 1e-3,
               "attention_dropout": 0.3, "scale_attention": False, "scale_attention_by_inverse_layer_index": True,
               "upcast_attention": True}  # fmt: skip
    model = randomised(standin(**config, **options | change))
    model.save_to_preset(tmp_path / "new" / "place")
    directory = tmp_path / "new" / "place"
    assert sorted(path.name for path in directory.iterdir()) == ["config.json", "model.safetensors"]
    same(Backbone.from_preset(directory).state_dict(), model.state_dict())
    checkpoint = open_checkpoint(directory)
    for name, value in {**config, **options, **change}.items():
        if name not in ("dtype", "activation"):
            assert checkpoint.config[name] == value, name
    assert checkpoint.config["activation"] == "gelu_new"

    theirs, report = transformers.GPT2LMHeadModel.from_pretrained(directory, dtype="auto", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.dtype == getattr(torch, dtype)
    check(checkpoint, matrices(theirs))
    if "tie_embedding_weights" in change:
        assert torch.equal(theirs.lm_head.weight, model.token_embedding.reverse_weight)
    else:
        assert theirs.lm_head.weight is theirs.transformer.wte.weight
    assert (theirs.config.resid_pdrop, theirs.config.attn_pdrop) == (change.get("dropout", 0.1), 0.3)
    assert (theirs.config.scale_attn_weights, theirs.config.layer_norm_epsilon) == (False, 1e-3)

    theirs.save_pretrained(tmp_path / "again")
    assert {k: v.tolist() for k, v in load_file(tmp_path / "again" / "model.safetensors").items()} == {
        k: v.tolist() for k, v in load_file(directory / "model.safetensors").items()
    }
    same(open_checkpoint(tmp_path / "again").tensors(), checkpoint.tensors())


def test_saving_refuses_by_name(tmp_path, standin):
    sizes = {"vocabulary_size": 9, "num_layers": 1, "hidden_dim": 8, "intermediate_dim": 8, "max_sequence_length": 4}
    with pytest.raises(ValueError, match="hidden_dim is 8; transformers' GPT-2 takes multiples of num_heads, 3"):
        standin(num_heads=3, **sizes).save_to_preset(tmp_path)
    with pytest.raises(ValueError, match="activation is 'mish'"):
        standin(num_heads=2, activation="mish", **sizes).save_to_preset(tmp_path)
    with pytest.raises(TypeError, match="model is a Linear; it takes a backbone"):
        save_to_preset(torch.nn.Linear(2, 2), tmp_path)
    model = standin(num_heads=2, **sizes)
    model.final_norm.half()
    with pytest.raises(ValueError, match=r"its tensors have .*; pass dtype="):
        model.save_to_preset(tmp_path)
    model = standin(num_heads=2, **sizes)
    model.adapter = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"not those of its configuration: \['adapter.bias', 'adapter.weight'\]"):
        model.save_to_preset(tmp_path)
    assert not any(tmp_path.iterdir())


def test_saving_over_a_checkpoint_that_a_model_came_from(tmp_path, golden, standin, same):
    """Loading leaves no view of the file behind, so that a training run may write where it read."""
    directory = shutil.copytree(golden / "ckpt" / "hf_gpt2", tmp_path / "model")
    model = Backbone.from_preset(directory)
    model.save_to_preset(directory)
    same(Backbone.from_preset(directory).state_dict(), model.state_dict())
    assert json.loads((directory / "config.json").read_text())["architectures"] == ["GPT2LMHeadModel"]
