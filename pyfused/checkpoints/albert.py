"""How do ALBERT's configuration and weight names in Hugging Face and Keras format map to pyfused's?

Hugging Face stores a linear weight as nn.Linear does. Keras stores it as (in, out), and attention's weights with the heads as
one more dimension. pyfused has one matrix for query, key and value, with the rows in that order. A layer is stored once,
however often it is applied.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pyfused.checkpoints.files import Options, Refused
from pyfused.checkpoints.options import REFUSED, SILENT, check_activation, check_keras, finish_keras, read_activation
from pyfused.checkpoints.plan import Piece, Plan, Target, transposed, whole
from pyfused.checkpoints.storage import Entry

HF_SAVED_PREFIX = ""

HF_BUFFERS = (r"embeddings\.(position_ids|token_type_ids)",)  # of older versions: 0, 1, ... and zeros
HF_HEAD = None  # the backbone has no output matrix of its own
HF_EMBEDDING, HF_COPIES, HF_BARE = "embeddings.word_embeddings.weight", ("predictions.decoder.weight",), ""
DEFAULTS: dict[str, Any] = {
    "num_groups": 1, "num_inner_repetitions": 1, "max_sequence_length": 512, "num_segments": 2, "pooler": True,
}  # fmt: skip
DEPTHS = ("num_groups", "num_inner_repetitions")  # of stored layers; num_layers counts the applied ones

KERAS_TASKS = ("MaskedLM", "TextClassifier")  # KerasHub's classes that take this backbone
_KERAS_FIXED = {
    "activation": "gelu_new", "layer_norm_epsilon": 1e-12, "attention_dropout": None, "feed_forward_dropout": None,
    "pooler": True,
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
    config: dict[str, Any] = {
        "vocabulary_size": options.integer("vocab_size", 30000),
        "num_layers": options.integer("num_hidden_layers", 12),
        "num_heads": options.integer("num_attention_heads", 64),
        "embedding_dim": options.integer("embedding_size", 128),
        "hidden_dim": options.integer("hidden_size", 4096),
        "intermediate_dim": options.integer("intermediate_size", 16384),
        "num_groups": options.integer("num_hidden_groups", 1),
        "num_inner_repetitions": options.integer("inner_group_num", 1),
        "dropout": dropout,
        "max_sequence_length": options.integer("max_position_embeddings", 512),
        "num_segments": options.integer("type_vocab_size", 2),
    }
    if config["hidden_dim"] % config["num_heads"]:
        width, heads = config["hidden_dim"], config["num_heads"]
        raise ValueError(f"{file}: hidden_size is {width}, not a multiple of num_attention_heads, {heads}")
    activation = read_activation(options, "hidden_act")
    config |= {
        "activation": activation,
        "layer_norm_epsilon": options.number("layer_norm_eps", 1e-12),
        # None means `dropout`: from_preset(..., dropout=0.0) then turns both off
        "attention_dropout": None if attention == dropout else attention,
        # transformers' ALBERT has no dropout after the feed-forward network; only config_to_hf writes this option
        "feed_forward_dropout": options.number("feed_forward_dropout_prob", 0.0, high=1.0),
        "pooler": True,
    }
    options.finish(_SILENT)
    return config


def settle(config: dict[str, Any], entries: dict[str, Entry]) -> tuple[dict[str, Any], dict[str, Entry]]:
    """Sets ``pooler`` from the weight files; the configuration does not say. Masked language models are saved without one."""
    return config | {"pooler": any(name.startswith("pooler.") for name in entries)}, entries


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
        "vocab_size": config["vocabulary_size"],
        "num_hidden_layers": config["num_layers"],
        "num_attention_heads": num_heads,
        "embedding_size": config["embedding_dim"],
        "hidden_size": hidden_dim,
        "intermediate_size": config["intermediate_dim"],
        "num_hidden_groups": config["num_groups"],
        "inner_group_num": config["num_inner_repetitions"],
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": rates["attention"],
        "max_position_embeddings": config["max_sequence_length"],
        "type_vocab_size": config["num_segments"],
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
    needed = ("vocabulary_size", "num_layers", "num_heads", "embedding_dim", "hidden_dim", "intermediate_dim")
    config: dict[str, Any] = {name: options.integer(name) for name in needed}
    config["num_groups"] = options.integer("num_groups", 1)
    config["num_inner_repetitions"] = options.integer("num_inner_repetitions", 1)
    config["dropout"] = options.number("dropout", 0.0, high=1.0)
    config["max_sequence_length"] = options.integer("max_sequence_length", 512)
    config["num_segments"] = options.integer("num_segments", 2)
    if config["num_layers"] % config["num_groups"]:
        layers, groups = config["num_layers"], config["num_groups"]
        raise ValueError(f"{file}: num_layers is {layers}, not a multiple of num_groups, {groups}")
    if config["num_heads"] > config["hidden_dim"]:
        raise ValueError(f"{file}: num_heads is {config['num_heads']}, more than hidden_dim, {config['hidden_dim']}")
    return config | finish_keras(options, _KERAS_FIXED)


def config_to_keras(config: dict[str, Any]) -> dict[str, Any]:
    """KerasHub's arguments for AlbertBackbone's. Raises ValueError for one that its class does not have."""
    config = {"dropout": 0.0} | DEFAULTS | config
    check_keras(config, _KERAS_FIXED, "AlbertBackbone")
    layers, groups = config["num_layers"], config["num_groups"]
    if layers % groups:
        raise ValueError(f"num_layers is {layers}; KerasHub's AlbertBackbone takes multiples of num_groups, {groups}")
    names = ("vocabulary_size", "num_layers", "num_heads", "num_groups", "num_inner_repetitions", "embedding_dim",
             "hidden_dim", "intermediate_dim", "dropout", "max_sequence_length", "num_segments")  # fmt: skip
    return {name: config[name] for name in names}


def _layers(config: dict[str, Any]) -> Iterator[tuple[str, int, int]]:
    """(pyfused's name, group, place in the group) of every stored layer."""
    for group in range(config["num_groups"]):
        for inner in range(config["num_inner_repetitions"]):
            yield f"layers.{group}.{inner}", group, inner


def _embeddings(config: dict[str, Any], names: dict[str, str], ending: str) -> Plan:
    """The plan of the three embedding tables."""
    rows = {"token": "vocabulary_size", "position": "max_sequence_length", "segment": "num_segments"}
    return {
        f"{kind}_embedding.weight": whole((config[rows[kind]], config["embedding_dim"]), name + ending)
        for kind, name in names.items()
    }


def hf_plan(config: dict[str, Any]) -> Plan:
    """pyfused's names from Hugging Face's, without the ``albert.`` prefix of models with a head."""
    width, inner, narrow = config["hidden_dim"], config["intermediate_dim"], config["embedding_dim"]
    tables = {"token": "word", "position": "position", "segment": "token_type"}
    plan = _embeddings(config, {ours: f"embeddings.{theirs}_embeddings" for ours, theirs in tables.items()}, ".weight")

    def norm(ours: str, theirs: str, size: int) -> None:
        for kind in ("weight", "bias"):
            plan[f"{ours}.{kind}"] = whole((size,), f"{theirs}.{kind}")

    def linear(ours: str, theirs: str, out: int, into: int) -> None:
        plan[f"{ours}.weight"] = whole((out, into), f"{theirs}.weight")
        plan[f"{ours}.bias"] = whole((out,), f"{theirs}.bias")

    norm("embedding_norm", "embeddings.LayerNorm", narrow)
    linear("projection", "encoder.embedding_hidden_mapping_in", width, narrow)
    for ours, group, place in _layers(config):
        theirs = f"encoder.albert_layer_groups.{group}.albert_layers.{place}"
        for kind, shape in (("weight", (width, width)), ("bias", (width,))):
            pieces = tuple(Piece(f"{theirs}.attention.{part}.{kind}", shape) for part in ("query", "key", "value"))
            plan[f"{ours}.attention.query_key_value.{kind}"] = Target((3 * width, *shape[1:]), pieces)
        linear(f"{ours}.attention.output", f"{theirs}.attention.dense", width, width)
        norm(f"{ours}.attention_norm", f"{theirs}.attention.LayerNorm", width)
        linear(f"{ours}.feed_forward.inner", f"{theirs}.ffn", inner, width)
        linear(f"{ours}.feed_forward.outer", f"{theirs}.ffn_output", width, inner)
        norm(f"{ours}.feed_forward_norm", f"{theirs}.full_layer_layer_norm", width)
    if config["pooler"]:
        linear("pooler", "pooler", width, width)
    return plan


def keras_plan(config: dict[str, Any]) -> Plan:
    """pyfused's names from h5 paths. Keras numbers the layers through all groups."""
    width, inner, narrow = config["hidden_dim"], config["intermediate_dim"], config["embedding_dim"]
    heads = config["num_heads"]
    size = width // heads  # heads * size may be less than width
    tables = {"token": "reversible_embedding", "position": "position_embedding", "segment": "embedding"}
    plan = _embeddings(config, {ours: f"layers/{theirs}" for ours, theirs in tables.items()}, "/vars/0")

    def norm(ours: str, theirs: str, size: int) -> None:
        for index, kind in enumerate(("weight", "bias")):
            plan[f"{ours}.{kind}"] = whole((size,), f"{theirs}/vars/{index}")

    def dense(ours: str, theirs: str, out: int, into: int, stored: tuple[int, ...] | None = None) -> None:
        plan[f"{ours}.weight"] = transposed((out, into), f"{theirs}/vars/0", stored)
        plan[f"{ours}.bias"] = whole((out,), f"{theirs}/vars/1")

    norm("embedding_norm", "layers/layer_normalization", narrow)
    dense("projection", "layers/dense", width, narrow)
    for count, (ours, _, _) in enumerate(_layers(config)):
        theirs = "layers/transformer_encoder" + (f"_{count}" if count else "")
        attention = f"{theirs}/_self_attention_layer"
        parts = [f"{attention}/{part}_dense/vars" for part in ("query", "key", "value")]
        plan[f"{ours}.attention.query_key_value.weight"] = Target(
            (3 * heads * size, width), tuple(Piece(f"{part}/0", (width, heads, size), True) for part in parts)
        )
        plan[f"{ours}.attention.query_key_value.bias"] = Target(
            (3 * heads * size,), tuple(Piece(f"{part}/1", (heads, size)) for part in parts)
        )
        dense(f"{ours}.attention.output", f"{attention}/output_dense", width, heads * size, (heads, size, width))
        norm(f"{ours}.attention_norm", f"{theirs}/_self_attention_layer_norm", width)
        dense(f"{ours}.feed_forward.inner", f"{theirs}/_feedforward_intermediate_dense", inner, width)
        dense(f"{ours}.feed_forward.outer", f"{theirs}/_feedforward_output_dense", width, inner)
        norm(f"{ours}.feed_forward_norm", f"{theirs}/_feedforward_layer_norm", width)
    dense("pooler", "layers/dense_1", width, width)
    return plan
