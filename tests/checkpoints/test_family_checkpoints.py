"""Which options and weights of each family load, from both formats, and which are refused by name? test_hf_checkpoints.py and
test_keras_checkpoints.py have what holds for all, with GPT-2 as the example."""

import json
import re

import h5py
import pytest
from safetensors.torch import load_file, save_file

import pyfused
from pyfused.checkpoints import open_checkpoint, presets_of
from pyfused.families import FAMILIES
from pyfused.models.backbone import Backbone

ALBERT, T5, FNET = "hf_albert_pretraining", "hf_t5", "hf_fnet_pretraining"


def configured(directory, edit, **changes):
    edit(directory / "config.json", **changes)
    return open_checkpoint(directory, weights=False).config


def defaults(directory, **raw):
    """The backbone's arguments for a configuration with these options alone."""
    (directory / "config.json").write_text(json.dumps(raw))
    return open_checkpoint(directory, weights=False).config


def test_defaults_and_options_of_albert(preset, edit):
    directory = preset(ALBERT)
    assert defaults(directory, model_type="albert") == {
        "vocabulary_size": 30000, "num_layers": 12, "num_heads": 64, "embedding_dim": 128, "hidden_dim": 4096,
        "intermediate_dim": 16384, "num_groups": 1, "num_inner_repetitions": 1, "num_segments": 2, "activation": "gelu_new",
        "layer_norm_epsilon": 1e-12, "max_sequence_length": 512, "dropout": 0.0, "attention_dropout": None,
        "feed_forward_dropout": 0.0, "pooler": True,
    }  # fmt: skip
    # As the published ones of version 1, and what all of them repeat
    config = configured(directory, edit, hidden_act="gelu", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
                        gap_size=0, net_structure_type=0, num_memory_blocks=0, down_scale_factor=1,
                        position_embedding_type="absolute", classifier_dropout_prob=0.1)  # fmt: skip
    assert (config["activation"], config["dropout"], config["attention_dropout"]) == ("gelu", 0.1, None)
    config = configured(directory, edit, attention_probs_dropout_prob=0.0, num_hidden_layers=5, num_hidden_groups=2)
    assert (config["attention_dropout"], config["num_layers"], config["num_groups"]) == (0.0, 5, 2)


def test_defaults_and_options_of_t5(preset, edit):
    directory = preset(T5)
    config = defaults(directory, model_type="t5")
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


def test_defaults_and_options_of_fnet(preset, edit):
    directory = preset(FNET)
    assert defaults(directory, model_type="fnet") == {
        "vocabulary_size": 32000, "num_layers": 12, "hidden_dim": 768, "intermediate_dim": 3072, "dropout": 0.1,
        "max_sequence_length": 512, "num_segments": 4, "activation": "gelu_new", "layer_norm_epsilon": 1e-12, "pooler": True,
    }  # fmt: skip
    config = configured(directory, edit, hidden_act="gelu", layer_norm_eps=1e-6, type_vocab_size=2, hidden_dropout_prob=0,
                        use_tpu_fourier_optimizations=True, tpu_short_seq_length=128)  # fmt: skip
    assert (config["activation"], config["layer_norm_epsilon"], config["num_segments"]) == ("gelu", 1e-6, 2)
    assert config["dropout"] == 0.0


@pytest.mark.parametrize(
    "architecture, family",
    [("AlbertForMaskedLM", "albert"), ("T5ForConditionalGeneration", "t5"), ("FNetForMaskedLM", "fnet")],
)
def test_a_class_tells_the_family(preset, architecture, family):
    directory = preset(ALBERT)
    defaults(directory, architectures=[architecture])
    assert open_checkpoint(directory, weights=False).model == family


@pytest.mark.parametrize(
    "name, change, said",
    [
        (ALBERT, {"hidden_act": "mish"}, "hidden_act is 'mish'; it takes one of gelu_new"),
        (ALBERT, {"hidden_act": 3}, "hidden_act is 3"),
        (ALBERT, {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        (ALBERT, {"num_hidden_groups": 10**9}, "num_groups is 1000000000"),
        (ALBERT, {"num_hidden_groups": 3}, "albert_layer_groups.2.*is missing"),
        (ALBERT, {"num_hidden_groups": 1}, "albert_layer_groups.1.*is not part of the model"),
        (ALBERT, {"inner_group_num": 3}, "albert_layers.2.*is missing"),
        (ALBERT, {"embedding_size": 7}, "word_embeddings.weight' has shape"),
        (ALBERT, {"type_vocab_size": 3}, "token_type_embeddings.weight' has shape"),
        (ALBERT, {"num_attention_heads": 5}, "hidden_size is 12, not a multiple of num_attention_heads, 5"),
        (ALBERT, {"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        (ALBERT, {"num_memory_blocks": 2}, "num_memory_blocks is 2; pyfused supports only 0"),
        (ALBERT, {"quantization_config": {"bits": 8}}, "quantization_config"),
        (ALBERT, {"hidden_dropout_prob": 2.0}, "hidden_dropout_prob is 2.0"),
        (T5, {"feed_forward_proj": "gated-mish"}, "feed_forward_proj is 'gated-mish'"),
        (T5, {"feed_forward_proj": "half-gelu"}, "feed_forward_proj is 'half-gelu'"),
        (T5, {"feed_forward_proj": 3}, "feed_forward_proj is 3"),
        (T5, {"num_layers": 0}, "num_layers is 0"),
        (T5, {"num_layers": 10**9}, "num_layers is 1000000000"),
        (T5, {"num_decoder_layers": 10**9}, "num_decoder_layers is 1000000000"),
        (T5, {"num_decoder_layers": 3}, "decoder.block.2.*is missing"),
        (T5, {"num_layers": 1}, "encoder.block.1.*is not part of the model"),
        (T5, {"d_kv": 4}, "SelfAttention.q.weight' has shape"),
        (T5, {"relative_attention_num_buckets": 16}, "relative_attention_bias.weight' has shape"),
        (T5, {"feed_forward_proj": "gated-gelu"}, "wi_0.weight'.*is missing"),
        (T5, {"decoder_start_token_id": -1}, "decoder_start_token_id is -1"),
        (T5, {"quantization_config": {"bits": 8}}, "quantization_config"),
        (T5, {"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
        (FNET, {"hidden_act": "mish"}, "hidden_act is 'mish'"),
        (FNET, {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        (FNET, {"num_hidden_layers": 10**9}, "num_layers is 1000000000; pyfused makes models of at most 1000"),
        (FNET, {"num_hidden_layers": 3}, "encoder.layer.2.*is missing"),
        (FNET, {"num_hidden_layers": 1}, "encoder.layer.1.*is not part of the model"),
        (FNET, {"type_vocab_size": 2}, "token_type_embeddings.weight' has shape"),
        (FNET, {"use_tpu_fourier_optimizations": "yes"}, "use_tpu_fourier_optimizations is 'yes'"),
        (FNET, {"quantization_config": {"bits": 8}}, "quantization_config"),
    ],
)
def test_options_that_do_not_fit(preset, edit, name, change, said):
    directory = preset(name)
    edit(directory / "config.json", **change)
    with pytest.raises(ValueError, match=f"{re.escape(str(directory))}.*{said}"):
        open_checkpoint(directory)


@pytest.mark.parametrize(
    "name, change, said",
    [
        ("keras_albert", {"num_groups": 3}, "num_layers is 4, not a multiple of num_groups, 3"),
        ("keras_albert", {"num_heads": 13}, "num_heads is 13, more than hidden_dim, 12"),
        ("keras_albert", {"num_inner_repetitions": 1}, "transformer_encoder_2.*is not part of the model"),
        ("keras_albert", {"activation": "relu"}, "activation='relu'"),
        ("keras_albert", {"embedding_dim": None}, "embedding_dim is None"),
        ("keras_fnet", {"num_layers": 3}, "f_net_encoder_2.*is missing"),
        ("keras_fnet", {"num_segments": 0}, "num_segments is 0"),
        ("keras_fnet", {"activation": "relu"}, "activation='relu'"),
    ],
)
def test_options_of_keras_that_do_not_fit(preset, edit_keras, name, change, said):
    directory = preset(name)
    edit_keras(directory, **change)
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
def test_activations_of_keras(preset, edit_keras, activation, name):
    directory = preset("keras_t5_v11")
    edit_keras(directory, activation=activation)
    if name is not None:
        assert open_checkpoint(directory).config["activation"] == name
    else:
        with pytest.raises(ValueError, match=r"config.json: activation is .*; it takes one of gelu_new"):
            open_checkpoint(directory)


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


@pytest.mark.parametrize("name, pooler", [(ALBERT, "albert.pooler"), (FNET, "fnet.pooler.dense")])
def test_the_pooler_is_a_matter_of_the_file(preset, same, name, pooler):
    directory = preset(name)
    path = directory / "model.safetensors"
    weights, whole = load_file(path), dict(open_checkpoint(directory).tensors())
    bare = {name: tensor for name, tensor in weights.items() if not name.startswith(pooler)}
    save_file(bare, path)
    model = Backbone.from_preset(directory)
    assert (model.get_config()["pooler"], model.pooler) == (False, None)
    same(model.state_dict(), {name: tensor for name, tensor in whole.items() if not name.startswith("pooler.")})
    save_file(bare | {f"{pooler}.weight": weights[f"{pooler}.weight"]}, path)
    with pytest.raises(ValueError, match=r"'pooler.*\.bias' of shape .* is missing"):
        open_checkpoint(directory)


def test_a_redundant_head_is_dropped_and_a_different_one_used(preset, edit):
    directory = preset(T5)
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


@pytest.mark.parametrize(
    "family, count, name, repository",
    [
        ("gpt2", 5, "gpt2_base_en", "openai-community/gpt2"), ("albert", 4, "albert_base_en_uncased", "albert/albert-base-v2"),
        ("t5", 11, "flan_base_multi", "google/flan-t5-base"), ("fnet", 2, "f_net_base_en", "google/fnet-base"),
    ],
)  # fmt: skip
def test_published_names_are_kerashubs(family, count, name, repository):
    keras_hub = pytest.importorskip("keras_hub")
    theirs = getattr(keras_hub.models, f"{FAMILIES[family].keras_name}Backbone").presets
    ours = presets_of({family})
    assert len(theirs) == count
    for published, entry in theirs.items():
        assert ours[published]["kaggle_handle"] == entry["kaggle_handle"]
        assert ours[published]["metadata"]["params"] == entry["metadata"]["params"]
    assert getattr(pyfused, FAMILIES[family].class_name).presets[name]["hf_repo"] == repository
