"""How do FNet's configuration and weight names in Hugging Face and Keras format map to pyfused's?

Hugging Face stores a linear weight as nn.Linear does, Keras as (in, out).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pyfused.checkpoints.files import Options
from pyfused.checkpoints.options import REFUSED, SILENT, check_activation, check_keras, finish_keras, read_activation
from pyfused.checkpoints.plan import Plan, transposed, whole
from pyfused.checkpoints.storage import Entry

HF_SAVED_PREFIX = ""

# Positions 0, 1, ..., segments 0, and the Fourier matrices of models made for a TPU
HF_BUFFERS = (r"embeddings\.(position_ids|token_type_ids)", r"encoder\..*\.dft_mat_(hidden|seq)")
HF_HEAD = None  # the backbone has no output matrix of its own
HF_EMBEDDING, HF_COPIES, HF_BARE = "embeddings.word_embeddings.weight", ("cls.predictions.decoder.weight",), ""
DEFAULTS: dict[str, Any] = {"max_sequence_length": 512, "num_segments": 4, "pooler": True}
DEPTHS = ("num_layers",)
KERAS_TASKS = ("MaskedLM", "TextClassifier")  # KerasHub's classes that take this backbone
_KERAS_FIXED = {"activation": "gelu_new", "layer_norm_epsilon": 1e-12, "pooler": True}

# use_tpu_fourier_optimizations computes the same transform with matrix products, for texts of tpu_short_seq_length
_SILENT = SILENT | {"tie_word_embeddings", "tpu_short_seq_length"}


def config_from_hf(raw: dict[str, Any], file: Path) -> dict[str, Any]:
    """FNetBackbone's constructor arguments. Raises ValueError for an unsupported option that changes the outputs."""
    options = Options(raw, file)
    options.refuse(REFUSED)
    activation = read_activation(options, "hidden_act")
    options.boolean("use_tpu_fourier_optimizations", False)
    config: dict[str, Any] = {
        "vocabulary_size": options.integer("vocab_size", 32000),
        "num_layers": options.integer("num_hidden_layers", 12),
        "hidden_dim": options.integer("hidden_size", 768),
        "intermediate_dim": options.integer("intermediate_size", 3072),
        "dropout": options.number("hidden_dropout_prob", 0.1, high=1.0),
        "max_sequence_length": options.integer("max_position_embeddings", 512),
        "num_segments": options.integer("type_vocab_size", 4),
        "activation": activation,
        "layer_norm_epsilon": options.number("layer_norm_eps", 1e-12),
        "pooler": True,
    }
    options.finish(_SILENT)
    return config


def settle(config: dict[str, Any], entries: dict[str, Entry]) -> tuple[dict[str, Any], dict[str, Entry]]:
    """Sets ``pooler`` from the weight files; the configuration does not say."""
    return config | {"pooler": any(name.startswith("pooler.") for name in entries)}, entries


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
        "vocab_size": config["vocabulary_size"],
        "num_hidden_layers": config["num_layers"],
        "hidden_size": config["hidden_dim"],
        "intermediate_size": config["intermediate_dim"],
        "hidden_dropout_prob": config.get("dropout", 0.1),
        "max_position_embeddings": config["max_sequence_length"],
        "type_vocab_size": config["num_segments"],
        "hidden_act": activation,
        "layer_norm_eps": config.get("layer_norm_epsilon", 1e-12),
        "use_tpu_fourier_optimizations": False,
        **{name: index if index < config["vocabulary_size"] else None for name, index in special.items()},
    }


def config_from_keras(raw: dict[str, Any], file: Path) -> dict[str, Any]:
    """FNetBackbone's constructor arguments from the ``config`` of a serialised KerasHub FNetBackbone."""
    options = Options(raw, file)
    config: dict[str, Any] = {
        name: options.integer(name) for name in ("vocabulary_size", "num_layers", "hidden_dim", "intermediate_dim")
    }
    config |= {
        "dropout": options.number("dropout", 0.1, high=1.0),
        "max_sequence_length": options.integer("max_sequence_length", 512),
        "num_segments": options.integer("num_segments", 4),
    }
    return config | finish_keras(options, _KERAS_FIXED)


def config_to_keras(config: dict[str, Any]) -> dict[str, Any]:
    """KerasHub's arguments for FNetBackbone's. Raises ValueError for one that its class does not have."""
    config = {"dropout": 0.1} | DEFAULTS | config
    check_keras(config, _KERAS_FIXED, "FNetBackbone")
    names = ("vocabulary_size", "num_layers", "hidden_dim", "intermediate_dim", "dropout", "max_sequence_length",
             "num_segments")  # fmt: skip
    return {name: config[name] for name in names}


def hf_plan(config: dict[str, Any]) -> Plan:
    """pyfused's names from Hugging Face's."""
    width, inner = config["hidden_dim"], config["intermediate_dim"]
    plan: Plan = {}

    def table(ours: str, rows: int, theirs: str) -> None:
        plan[f"{ours}_embedding.weight"] = whole((rows, width), f"embeddings.{theirs}_embeddings.weight")

    def linear(ours: str, out: int, into: int, theirs: str) -> None:
        plan[f"{ours}.weight"] = whole((out, into), f"{theirs}.weight")
        plan[f"{ours}.bias"] = whole((out,), f"{theirs}.bias")

    def norm(ours: str, theirs: str) -> None:
        for kind in ("weight", "bias"):
            plan[f"{ours}.{kind}"] = whole((width,), f"{theirs}.LayerNorm.{kind}")

    table("token", config["vocabulary_size"], "word")
    table("position", config["max_sequence_length"], "position")
    table("segment", config["num_segments"], "token_type")
    norm("embedding_norm", "embeddings")
    linear("projection", width, width, "embeddings.projection")
    for i in range(config["num_layers"]):
        ours, theirs = f"layers.{i}", f"encoder.layer.{i}"
        norm(f"{ours}.mixing_norm", f"{theirs}.fourier.output")
        linear(f"{ours}.feed_forward.inner", inner, width, f"{theirs}.intermediate.dense")
        linear(f"{ours}.feed_forward.outer", width, inner, f"{theirs}.output.dense")
        norm(f"{ours}.feed_forward_norm", f"{theirs}.output")
    if config["pooler"]:
        linear("pooler", width, width, "pooler.dense")
    return plan


def keras_plan(config: dict[str, Any]) -> Plan:
    """pyfused's names from h5 paths."""
    width, inner = config["hidden_dim"], config["intermediate_dim"]
    plan: Plan = {}

    def table(ours: str, rows: int, theirs: str) -> None:
        plan[f"{ours}_embedding.weight"] = whole((rows, width), f"layers/{theirs}embedding/vars/0")

    def linear(ours: str, out: int, into: int, theirs: str) -> None:
        plan[f"{ours}.weight"] = transposed((out, into), f"layers/{theirs}/vars/0")
        plan[f"{ours}.bias"] = whole((out,), f"layers/{theirs}/vars/1")

    def norm(ours: str, theirs: str) -> None:
        for i, kind in enumerate(("weight", "bias")):
            plan[f"{ours}.{kind}"] = whole((width,), f"layers/{theirs}/vars/{i}")

    table("token", config["vocabulary_size"], "reversible_")
    table("position", config["max_sequence_length"], "position_")
    table("segment", config["num_segments"], "")
    norm("embedding_norm", "layer_normalization")
    linear("projection", width, width, "dense")
    for i in range(config["num_layers"]):
        ours, theirs = f"layers.{i}", "f_net_encoder" + (f"_{i}" if i else "")
        norm(f"{ours}.mixing_norm", f"{theirs}/_mixing_layer_norm")
        linear(f"{ours}.feed_forward.inner", inner, width, f"{theirs}/_intermediate_dense")
        linear(f"{ours}.feed_forward.outer", width, inner, f"{theirs}/_output_dense")
        norm(f"{ours}.feed_forward_norm", f"{theirs}/_output_layer_norm")
    linear("pooler", width, width, "dense_1")
    return plan
