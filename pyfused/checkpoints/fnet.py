"""How do FNet's configuration and weight names in Hugging Face and Keras format map to pyfused's?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pyfused.checkpoints.files import Options
from pyfused.checkpoints.layer_plans import Tensors, numbered
from pyfused.checkpoints.names import settle_pooler
from pyfused.checkpoints.options import (
    REFUSED,
    SILENT,
    check_activation,
    check_keras,
    finish_keras,
    read_activation,
    read_keras,
)

HF_SAVED_PREFIX = ""

# Positions 0, 1, ..., segments 0, and the Fourier matrices of models made for a TPU
HF_BUFFERS = (r"embeddings\.(position_ids|token_type_ids)", r"encoder\..*\.dft_mat_(hidden|seq)")
HF_HEAD = None  # the backbone has no output matrix of its own
HF_EMBEDDING, HF_COPIES, HF_BARE = "embeddings.word_embeddings.weight", ("cls.predictions.decoder.weight",), ""
_SIZED = {"max_sequence_length": 512, "num_segments": 4}
DEFAULTS: dict[str, Any] = {**_SIZED, "pooler": True}
DEPTHS = ("num_layers",)
KERAS_TASKS = ("MaskedLM", "TextClassifier")  # KerasHub's classes that take this backbone
_KERAS_SIZES = ("vocabulary_size", "num_layers", "hidden_dim", "intermediate_dim")
_KERAS_FIXED = {"activation": "gelu_new", "layer_norm_epsilon": 1e-12, "pooler": True}

# pyfused's argument -> transformers' option and its default
_SIZES = {
    "vocabulary_size": ("vocab_size", 32000), "num_layers": ("num_hidden_layers", 12), "hidden_dim": ("hidden_size", 768),
    "intermediate_dim": ("intermediate_size", 3072), "max_sequence_length": ("max_position_embeddings", 512),
    "num_segments": ("type_vocab_size", 4),
}  # fmt: skip

# use_tpu_fourier_optimizations computes the same transform with matrix products, for texts of tpu_short_seq_length
_SILENT = SILENT | {"tie_word_embeddings", "tpu_short_seq_length"}


def config_from_hf(raw: dict[str, Any], file: Path) -> dict[str, Any]:
    """FNetBackbone's constructor arguments. Raises ValueError for an unsupported option that changes the outputs."""
    options = Options(raw, file)
    options.refuse(REFUSED)
    options.boolean("use_tpu_fourier_optimizations", False)
    config: dict[str, Any] = {
        **{name: options.integer(*theirs) for name, theirs in _SIZES.items()},
        "dropout": options.number("hidden_dropout_prob", 0.1, high=1.0),
        "activation": read_activation(options, "hidden_act"),
        "layer_norm_epsilon": options.number("layer_norm_eps", 1e-12),
        "pooler": True,
    }
    options.finish(_SILENT)
    return config


settle = settle_pooler


def config_to_hf(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """transformers' configuration for FNetBackbone's arguments. Raises ValueError for one that it has no option for."""
    config = DEFAULTS | config
    activation = check_activation(config, whose="transformers' FNet")
    # transformers' defaults, if the vocabulary is large enough
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    return {
        "architectures": ["FNetModel"],
        "model_type": "fnet",
        "dtype": dtype,
        **{theirs[0]: config[name] for name, theirs in _SIZES.items()},
        "hidden_dropout_prob": config.get("dropout", 0.1),
        "hidden_act": activation,
        "layer_norm_eps": config.get("layer_norm_epsilon", 1e-12),
        "use_tpu_fourier_optimizations": False,
        **{name: index if index < config["vocabulary_size"] else None for name, index in special.items()},
    }


def config_from_keras(raw: dict[str, Any], file: Path) -> dict[str, Any]:
    """FNetBackbone's constructor arguments from the ``config`` of a serialised KerasHub FNetBackbone."""
    options = Options(raw, file)
    config = read_keras(options, _KERAS_SIZES, _SIZED)
    return config | finish_keras(options, _KERAS_FIXED)


def config_to_keras(config: dict[str, Any]) -> dict[str, Any]:
    """KerasHub's arguments for FNetBackbone's. Raises ValueError for one that its class does not have."""
    config = {"dropout": 0.1} | DEFAULTS | config
    check_keras(config, _KERAS_FIXED, "FNetBackbone")
    return {name: config[name] for name in (*_KERAS_SIZES, *_SIZED, "dropout")}


def name_tensors(tensors: Tensors, config: dict[str, Any]) -> None:
    """The tensors of both formats."""
    width, inner = config["hidden_dim"], config["intermediate_dim"]
    tensors.embeddings(config)
    tensors.norm("embedding_norm", "embeddings.LayerNorm", "layers/layer_normalization", width)
    tensors.linear("projection", "embeddings.projection", "layers/dense", width, width)
    for i in range(config["num_layers"]):
        layer = tensors.inside(f"layers.{i}", f"encoder.layer.{i}", numbered("layers/f_net_encoder", i))
        layer.norm("mixing_norm", "fourier.output.LayerNorm", "_mixing_layer_norm", width)
        layer.linear("feed_forward.inner", "intermediate.dense", "_intermediate_dense", inner, width)
        layer.linear("feed_forward.outer", "output.dense", "_output_dense", width, inner)
        layer.norm("feed_forward_norm", "output.LayerNorm", "_output_layer_norm", width)
    if config["pooler"]:
        tensors.linear("pooler", "pooler.dense", "layers/dense_1", width, width)
