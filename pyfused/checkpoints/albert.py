"""How do ALBERT's configuration and weight names in Hugging Face and Keras format map to pyfused's?

pyfused has one matrix for query, key and value, with the rows in that order. A layer is stored once, however often it is
applied.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

from pyfused.checkpoints.files import Options, Refused
from pyfused.checkpoints.layer_plans import Tensors, numbered
from pyfused.checkpoints.names import settle_pooler
from pyfused.checkpoints.options import (
    REFUSED,
    SILENT,
    check_activation,
    check_heads,
    check_keras,
    finish_keras,
    read_activation,
    read_keras,
)

HF_SAVED_PREFIX = ""

HF_BUFFERS = (r"embeddings\.(position_ids|token_type_ids)",)  # of older versions: 0, 1, ... and zeros
HF_HEAD = None  # the backbone has no output matrix of its own
HF_EMBEDDING, HF_COPIES, HF_BARE = "embeddings.word_embeddings.weight", ("predictions.decoder.weight",), ""
_SIZED = {"num_groups": 1, "num_inner_repetitions": 1, "max_sequence_length": 512, "num_segments": 2}
DEFAULTS: dict[str, Any] = {**_SIZED, "pooler": True}
DEPTHS = ("num_groups", "num_inner_repetitions")  # of stored layers; num_layers counts the applied ones

KERAS_TASKS = ("MaskedLM", "TextClassifier")  # KerasHub's classes that take this backbone
_KERAS_SIZES = ("vocabulary_size", "num_layers", "num_heads", "embedding_dim", "hidden_dim", "intermediate_dim")
_KERAS_FIXED = {
    "activation": "gelu_new", "layer_norm_epsilon": 1e-12, "attention_dropout": None, "feed_forward_dropout": None,
    "pooler": True,
}  # fmt: skip

# pyfused's argument -> transformers' option and its default
_SIZES = {
    "vocabulary_size": ("vocab_size", 30000), "num_layers": ("num_hidden_layers", 12),
    "num_heads": ("num_attention_heads", 64), "embedding_dim": ("embedding_size", 128),
    "hidden_dim": ("hidden_size", 4096), "intermediate_dim": ("intermediate_size", 16384),
    "num_groups": ("num_hidden_groups", 1), "num_inner_repetitions": ("inner_group_num", 1),
    "max_sequence_length": ("max_position_embeddings", 512), "num_segments": ("type_vocab_size", 2),
}  # fmt: skip

# Options of the original TensorFlow configurations, repeated in the published ones
_OFF = {"gap_size": 0, "net_structure_type": 0, "num_memory_blocks": 0, "down_scale_factor": 1}
_REFUSED = REFUSED | {
    name: Refused(f"pyfused supports only {off}, the value in every published ALBERT", off)
    for name, off in _OFF.items()
}
_SILENT = SILENT | {"classifier_dropout_prob", "tie_word_embeddings"}


def config_from_hf(raw: dict[str, Any], file: Path) -> dict[str, Any]:
    """AlbertBackbone's constructor arguments. Raises ValueError for an unsupported option that changes the outputs."""
    options = Options(raw, file)
    options.refuse(_REFUSED)
    dropout = options.number("hidden_dropout_prob", 0.0, high=1.0)
    attention = options.number("attention_probs_dropout_prob", 0.0, high=1.0)
    config: dict[str, Any] = {name: options.integer(*theirs) for name, theirs in _SIZES.items()}
    if config["hidden_dim"] % config["num_heads"]:
        width, heads = config["hidden_dim"], config["num_heads"]
        raise ValueError(f"{file}: hidden_size is {width}, not a multiple of num_attention_heads, {heads}")
    config |= {
        "dropout": dropout,
        "activation": read_activation(options, "hidden_act"),
        "layer_norm_epsilon": options.number("layer_norm_eps", 1e-12),
        # None means `dropout`: from_preset(..., dropout=0.0) then turns both off
        "attention_dropout": None if attention == dropout else attention,
        # transformers' ALBERT has no dropout after the feed-forward network; only config_to_hf writes this option
        "feed_forward_dropout": options.number("feed_forward_dropout_prob", 0.0, high=1.0),
        "pooler": True,
    }
    options.finish(_SILENT)
    return config


settle = settle_pooler


def config_to_hf(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """transformers' configuration for AlbertBackbone's arguments. Raises ValueError for one that it has no option for."""
    config = DEFAULTS | config
    hidden_dim, num_heads = config["hidden_dim"], config["num_heads"]
    if hidden_dim % num_heads:
        raise ValueError(f"hidden_dim is {hidden_dim}; transformers' ALBERT takes multiples of num_heads, {num_heads}")
    activation = check_activation(config, whose="transformers' ALBERT")
    dropout = config.get("dropout", 0.0)
    rates = {name: config.get(f"{name}_dropout") for name in ("attention", "feed_forward")}
    rates = {name: dropout if rate is None else rate for name, rate in rates.items()}
    described = {
        "architectures": ["AlbertModel"],
        "model_type": "albert",
        "dtype": dtype,
        **{theirs[0]: config[name] for name, theirs in _SIZES.items()},
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": rates["attention"],
        "hidden_act": activation,
        "layer_norm_eps": config.get("layer_norm_epsilon", 1e-12),
        # transformers' defaults, if the vocabulary is large enough
        "pad_token_id": 0,
        "bos_token_id": 2 if config["vocabulary_size"] > 2 else None,
        "eos_token_id": 3 if config["vocabulary_size"] > 3 else None,
    }
    if rates["feed_forward"]:  # transformers has no dropout there, but keeps the option
        described["feed_forward_dropout_prob"] = rates["feed_forward"]
    return described


def config_from_keras(raw: dict[str, Any], file: Path) -> dict[str, Any]:
    """AlbertBackbone's constructor arguments from the ``config`` of a serialised KerasHub AlbertBackbone."""
    options = Options(raw, file)
    config = read_keras(options, _KERAS_SIZES, _SIZED, 0.0)
    if config["num_layers"] % config["num_groups"]:
        depth, groups = config["num_layers"], config["num_groups"]
        raise ValueError(f"{file}: num_layers is {depth}, not a multiple of num_groups, {groups}")
    check_heads(config, file)
    return config | finish_keras(options, _KERAS_FIXED)


def config_to_keras(config: dict[str, Any]) -> dict[str, Any]:
    """KerasHub's arguments for AlbertBackbone's. Raises ValueError for one that its class does not have."""
    config = {"dropout": 0.0} | DEFAULTS | config
    check_keras(config, _KERAS_FIXED, "AlbertBackbone")
    depth, groups = config["num_layers"], config["num_groups"]
    if depth % groups:
        raise ValueError(f"num_layers is {depth}; KerasHub's AlbertBackbone takes multiples of num_groups, {groups}")
    return {name: config[name] for name in (*_KERAS_SIZES, *_SIZED, "dropout")}


def name_tensors(tensors: Tensors, config: dict[str, Any]) -> None:
    """The tensors of both formats. Keras numbers the layers through all groups."""
    width, inner, narrow = config["hidden_dim"], config["intermediate_dim"], config["embedding_dim"]
    tensors.embeddings(config)
    tensors.norm("embedding_norm", "embeddings.LayerNorm", "layers/layer_normalization", narrow)
    tensors.linear("projection", "encoder.embedding_hidden_mapping_in", "layers/dense", width, narrow)
    places = product(range(config["num_groups"]), range(config["num_inner_repetitions"]))
    for count, (group, place) in enumerate(places):
        layer = tensors.inside(
            f"layers.{group}.{place}",
            f"encoder.albert_layer_groups.{group}.albert_layers.{place}",
            numbered("layers/transformer_encoder", count),
        )
        projections = [f"attention.{part}" for part in ("query", "key", "value")]
        layer.attention(projections, "attention.dense", "_self_attention_layer", width, config["num_heads"])
        layer.norm("attention_norm", "attention.LayerNorm", "_self_attention_layer_norm", width)
        layer.linear("feed_forward.inner", "ffn", "_feedforward_intermediate_dense", inner, width)
        layer.linear("feed_forward.outer", "ffn_output", "_feedforward_output_dense", width, inner)
        layer.norm("feed_forward_norm", "full_layer_layer_norm", "_feedforward_layer_norm", width)
    if config["pooler"]:
        tensors.linear("pooler", "pooler", "layers/dense_1", width, width)
