"""How do T5's and mT5's configuration and weight names in Hugging Face and Keras format map to pyfused's?

Hugging Face stores a linear weight as nn.Linear does, Keras as (in, out). pyfused stacks the matrices that are applied to the
same vector: query, key and value, or the key and value of cross-attention.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pyfused.checkpoints import hf
from pyfused.checkpoints.files import Options, Refused
from pyfused.checkpoints.names import settle_head
from pyfused.checkpoints.options import (
    HF_ACTIVATIONS,
    KERAS_GELU,
    REFUSED,
    SILENT,
    activation_name,
    check_activation,
    check_heads,
    check_keras,
    finish_keras,
    read_keras,
)
from pyfused.checkpoints.plan import Piece, Plan, Target, transposed, whole
from pyfused.checkpoints.storage import Entry

HF_SAVED_PREFIX = ""

# The first checkpoints have this table; nothing reads it
HF_BUFFERS = (r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",)
HF_HEAD, HF_EMBEDDING = "lm_head.weight", "shared.weight"
HF_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
HF_BARE = "encoder."  # the names lack it if a T5Stack was saved by itself
DEFAULTS: dict[str, Any] = {
    "key_value_dim": None, "use_gated_activation": True, "tie_embedding_weights": True, "num_decoder_layers": None,
    "num_buckets": 32,
}  # fmt: skip
DEPTHS = ("num_layers", "num_decoder_layers")
FOLLOWS = {"num_decoder_layers": "num_layers", "scale_logits": "tie_embedding_weights"}  # while the two are equal
KERAS_TASKS = ("Seq2SeqLM",)  # KerasHub's classes that take this backbone
_KERAS_SIZES = ("vocabulary_size", "num_layers", "num_heads", "hidden_dim", "intermediate_dim")

# pyfused's argument -> transformers' option, its default and other names
_SIZES: dict[str, Any] = {
    "vocabulary_size": ("vocab_size", 32128), "num_layers": ("num_layers", 6, ["num_hidden_layers"]),
    "num_heads": ("num_heads", 8, ["num_attention_heads"]), "hidden_dim": ("d_model", 512, ["hidden_size"]),
    "intermediate_dim": ("d_ff", 2048), "key_value_dim": ("d_kv", 64, ["head_dim"]),
    "num_buckets": ("relative_attention_num_buckets", 32), "max_distance": ("relative_attention_max_distance", 128),
}  # fmt: skip

# mT5's defaults that differ from T5's, and a setting that its class has whatever the configuration says
_MT5 = {"vocab_size": 250112, "d_ff": 1024, "num_layers": 8, "num_heads": 6, "feed_forward_proj": "gated-gelu"}
_MT5_ALWAYS = {"scale_decoder_outputs": False}
_ENCODERS = re.compile(r"M?T5(EncoderModel|ForTokenClassification)")
_REFUSED = REFUSED | {"scalable_attention": Refused("only UMT5 has it, and pyfused does not read UMT5")}
_SILENT = SILENT | {"initializer_factor", "classifier_dropout", "n_positions"}


def config_from_hf(raw: dict[str, Any], file: Path) -> dict[str, Any]:
    """T5Backbone's constructor arguments. Raises ValueError for an unsupported option that changes the outputs.

    num_decoder_layers is 0 for an encoder without a decoder.
    """
    if hf.model_type(raw) == "mt5":
        raw = _MT5 | raw | _MT5_ALWAYS
    options = Options(raw, file)
    options.refuse(_REFUSED)
    config: dict[str, Any] = {name: options.integer(*theirs) for name, theirs in _SIZES.items()}
    decoder_layers = options.raw("num_decoder_layers", None)
    if decoder_layers is not None:
        decoder_layers = Options({"num_decoder_layers": decoder_layers}, file).integer("num_decoder_layers")
    # A named class decides: T5EncoderModel changes is_encoder_decoder even in a configuration shared with another model
    both, name = options.boolean("is_encoder_decoder", True), hf.class_name(raw)
    if _ENCODERS.fullmatch(name) or not (name or both):
        decoder_layers = 0
    activation, gated = _hf_feed_forward(options, file)
    tied = options.boolean("tie_word_embeddings", True)
    config |= {
        "dropout": options.number("dropout_rate", 0.1, high=1.0),
        "activation": activation,
        "use_gated_activation": gated,
        "layer_norm_epsilon": options.number("layer_norm_epsilon", 1e-6),
        "tie_embedding_weights": tied or decoder_layers == 0,
        "num_decoder_layers": config["num_layers"] if decoder_layers is None else decoder_layers,
        # transformers 4 reads tie_word_embeddings for this; 5 always ties and has this option
        "scale_logits": options.boolean("scale_decoder_outputs", tied),
        "decoder_start_token_id": _start_token(options, file),
    }
    options.finish(_SILENT)
    return config


def _hf_feed_forward(options: Options, file: Path) -> tuple[str, bool]:
    """The activation, and whether there is a gate. "gated-gelu" means the tanh formula, "gelu" the erf formula."""
    projection = options.raw("feed_forward_proj", "relu")
    parts = projection.split("-") if isinstance(projection, str) else []
    if len(parts) not in (1, 2) or (len(parts) == 2 and parts[0] != "gated"):
        raise ValueError(f"{file}: feed_forward_proj is {projection!r}; it takes an activation, or gated-<activation>")
    gated = options.boolean("is_gated_act", len(parts) == 2)
    stated = "gelu_new" if projection == "gated-gelu" else parts[-1]
    stated = options.raw("dense_act_fn", stated)
    if not isinstance(stated, str) or stated not in HF_ACTIVATIONS:
        raise ValueError(
            f"{file}: feed_forward_proj is {projection!r} with the activation {stated!r}; it takes one of "
            f"{', '.join(HF_ACTIVATIONS)}"
        )
    return HF_ACTIVATIONS[stated], gated


def _start_token(options: Options, file: Path) -> int:
    """The decoder's first token: its own option, or else the padding token, as in every published T5."""
    token = options.raw("decoder_start_token_id", None)
    token = options.raw("pad_token_id", None) if token is None else token
    if token is not None and (isinstance(token, bool) or not isinstance(token, int) or token < 0):
        raise ValueError(f"{file}: decoder_start_token_id is {token!r}; it takes a token id")
    return token or 0


def config_to_hf(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """transformers' configuration for T5Backbone's arguments. Raises ValueError for one that it has no option for."""
    config = {"decoder_start_token_id": 0, "max_distance": 128, "scale_logits": None} | DEFAULTS | config
    activation, gated = check_activation(config, "relu", "transformers' T5"), config["use_gated_activation"]
    # transformers reads "gated-gelu" as the tanh formula, so a gate with the erf formula is "gated-gelu_python"
    spelled = {"gelu_new": "gelu", "gelu": "gelu_python"}.get(activation, activation) if gated else activation
    scaled = config["tie_embedding_weights"] if config["scale_logits"] is None else config["scale_logits"]
    alone = config["num_decoder_layers"] == 0
    return {
        "architectures": ["T5EncoderModel" if alone else "T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": not alone,
        "dtype": dtype,
        **{theirs[0]: config[name] for name, theirs in _SIZES.items()},
        "num_decoder_layers": config["num_decoder_layers"] or config["num_layers"],  # transformers has no 0
        "d_kv": config["key_value_dim"] or config["hidden_dim"] // config["num_heads"],
        "dropout_rate": config.get("dropout", 0.1),
        "feed_forward_proj": f"gated-{spelled}" if gated else spelled,
        "layer_norm_epsilon": config.get("layer_norm_epsilon", 1e-6),
        "tie_word_embeddings": scaled,
        "scale_decoder_outputs": scaled,
        "decoder_start_token_id": config["decoder_start_token_id"],
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


def config_from_keras(raw: dict[str, Any], file: Path) -> dict[str, Any]:
    """T5Backbone's constructor arguments from the ``config`` of a serialised KerasHub T5Backbone."""
    options = Options(raw, file)
    config = read_keras(options, _KERAS_SIZES, {})
    size = options.raw("key_value_dim", None)
    if size is not None:
        size = Options({"key_value_dim": size}, file).integer("key_value_dim")
    else:
        check_heads(config, file)
    stated = options.raw("activation", "relu")
    activation = activation_name(stated)
    if activation is None:
        raise ValueError(
            f"{file}: activation is {stated!r}; it takes one of {', '.join(HF_ACTIVATIONS)}, or gelu_approximate of KerasHub"
        )
    config |= {
        "key_value_dim": size,
        "activation": activation,
        "use_gated_activation": options.boolean("use_gated_activation", True),
        "layer_norm_epsilon": options.number("layer_norm_epsilon", 1e-6),
        "tie_embedding_weights": options.boolean("tie_embedding_weights", True),
    }
    return config | finish_keras(options, _keras_fixed(config))


def config_to_keras(config: dict[str, Any]) -> dict[str, Any]:
    """KerasHub's arguments for T5Backbone's. Raises ValueError for one that its class does not have."""
    config = {"dropout": 0.1, "layer_norm_epsilon": 1e-6} | DEFAULTS | config
    stated = {name: value for name, value in config.items() if value is not None}
    check_keras(stated, _keras_fixed(config), "T5Backbone")
    activation = check_activation(config, "relu", "KerasHub's T5Backbone")
    if activation == "quick_gelu":
        raise ValueError(
            "activation is 'quick_gelu', which KerasHub's T5Backbone does not have; save it with format='hf'"
        )
    shared = ("key_value_dim", "dropout", "use_gated_activation", "layer_norm_epsilon", "tie_embedding_weights")
    # "gelu" is the erf formula in Keras too
    return {name: config[name] for name in (*_KERAS_SIZES, *shared)} | {
        "activation": KERAS_GELU if activation == "gelu_new" else activation
    }


def _keras_fixed(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that KerasHub's class has no argument for."""
    return {
        "num_decoder_layers": config["num_layers"],
        "num_buckets": 32,
        "max_distance": 128,
        "scale_logits": config["tie_embedding_weights"],
        "decoder_start_token_id": 0,
    }


def settle(config: dict[str, Any], entries: dict[str, Entry]) -> tuple[dict[str, Any], dict[str, Entry]]:
    """Sets ``num_decoder_layers`` and ``tie_embedding_weights`` from the weight files; see `settle_head`."""
    if not any(name.startswith("decoder.") for name in entries):
        config = config | {"num_decoder_layers": 0, "tie_embedding_weights": True}
        entries = {name: entry for name, entry in entries.items() if name != HF_HEAD}
    return settle_head(config, entries, HF_HEAD, HF_EMBEDDING)


def _sizes(config: dict[str, Any]) -> tuple[int, int, int, int]:
    """Hidden width, feed-forward width, heads * head size, and heads."""
    width, heads = config["hidden_dim"], config["num_heads"]
    return width, config["intermediate_dim"], heads * (config["key_value_dim"] or width // heads), heads


def hf_plan(config: dict[str, Any]) -> Plan:
    """pyfused's names from Hugging Face's."""
    width, inner, heads_width, heads = _sizes(config)
    plan: Plan = {"token_embedding.weight": whole((config["vocabulary_size"], width), HF_EMBEDDING)}
    if not config["tie_embedding_weights"]:
        plan["token_embedding.reverse_weight"] = whole((config["vocabulary_size"], width), HF_HEAD)

    def stacked(ours: str, theirs: str, parts: str) -> None:
        pieces = tuple(Piece(f"{theirs}.{part}.weight", (heads_width, width)) for part in parts)
        plan[f"{ours}.weight"] = Target((len(parts) * heads_width, width), pieces)

    for stack, depth in _stacks(config):
        for i in range(depth):
            ours, theirs = f"{stack}.layers.{i}", f"{stack}.block.{i}.layer"
            plan[f"{ours}.attention_norm.weight"] = whole((width,), f"{theirs}.0.layer_norm.weight")
            attention = f"{theirs}.0.SelfAttention"
            if not i:
                table = (config["num_buckets"], heads)
                plan[f"{ours}.attention.relative_bias"] = whole(table, f"{attention}.relative_attention_bias.weight")
            stacked(f"{ours}.attention.query_key_value", attention, "qkv")
            plan[f"{ours}.attention.output.weight"] = whole((width, heads_width), f"{attention}.o.weight")
            if stack == "decoder":
                plan[f"{ours}.cross_attention_norm.weight"] = whole((width,), f"{theirs}.1.layer_norm.weight")
                attention = f"{theirs}.1.EncDecAttention"
                stacked(f"{ours}.cross_attention.query", attention, "q")
                stacked(f"{ours}.cross_attention.key_value", attention, "kv")
                plan[f"{ours}.cross_attention.output.weight"] = whole((width, heads_width), f"{attention}.o.weight")
            last = f"{theirs}.{2 if stack == 'decoder' else 1}"
            plan[f"{ours}.feed_forward_norm.weight"] = whole((width,), f"{last}.layer_norm.weight")
            names = {"gate": "wi_0", "up": "wi_1"} if config["use_gated_activation"] else {"inner": "wi"}
            for name, matrix in names.items():
                plan[f"{ours}.feed_forward.{name}.weight"] = whole(
                    (inner, width), f"{last}.DenseReluDense.{matrix}.weight"
                )
            plan[f"{ours}.feed_forward.outer.weight"] = whole((width, inner), f"{last}.DenseReluDense.wo.weight")
        plan[f"{stack}.final_norm.weight"] = whole((width,), f"{stack}.final_layer_norm.weight")
    return plan


def keras_plan(config: dict[str, Any]) -> Plan:
    """pyfused's names from h5 paths. Keras numbers the layers through both stacks."""
    width, inner, heads_width, heads = _sizes(config)
    embedding = "layers/reversible_embedding/vars"
    plan: Plan = {"token_embedding.weight": whole((config["vocabulary_size"], width), f"{embedding}/0")}
    if not config["tie_embedding_weights"]:
        plan["token_embedding.reverse_weight"] = transposed((config["vocabulary_size"], width), f"{embedding}/1")

    def stacked(ours: str, theirs: str, *parts: str) -> None:
        pieces = tuple(Piece(f"{theirs}/{part}_projector/vars/0", (width, heads_width), True) for part in parts)
        plan[f"{ours}.weight"] = Target((len(parts) * heads_width, width), pieces)

    def matrix(ours: str, theirs: str, out: int, into: int) -> None:
        plan[f"{ours}.weight"] = transposed((out, into), f"{theirs}_projector/vars/0")

    count = 0
    for index, (stack, depth) in enumerate(_stacks(config)):
        for i in range(depth):
            ours, theirs = f"{stack}.layers.{i}", "layers/t5_transformer_layer" + (f"_{count}" if count else "")
            plan[f"{ours}.attention_norm.weight"] = whole((width,), f"{theirs}/self_attention_layer_norm/vars/0")
            attention = f"{theirs}/self_attention"
            if not i:
                plan[f"{ours}.attention.relative_bias"] = whole((config["num_buckets"], heads), f"{attention}/vars/0")
            stacked(f"{ours}.attention.query_key_value", attention, "query", "key", "value")
            matrix(f"{ours}.attention.output", f"{attention}/output", width, heads_width)
            if stack == "decoder":
                plan[f"{ours}.cross_attention_norm.weight"] = whole(
                    (width,), f"{theirs}/cross_attention_layer_norm/vars/0"
                )
                attention = f"{theirs}/cross_attention"
                stacked(f"{ours}.cross_attention.query", attention, "query")
                stacked(f"{ours}.cross_attention.key_value", attention, "key", "value")
                matrix(f"{ours}.cross_attention.output", f"{attention}/output", width, heads_width)
            plan[f"{ours}.feed_forward_norm.weight"] = whole((width,), f"{theirs}/layer_norm/vars/0")
            names = {"gate": "input", "up": "gate"} if config["use_gated_activation"] else {"inner": "input"}
            for name, projector in names.items():
                matrix(f"{ours}.feed_forward.{name}", f"{theirs}/{projector}", inner, width)
            matrix(f"{ours}.feed_forward.outer", f"{theirs}/output", width, inner)
            count += 1
        norm = "layers/t5_layer_norm" + (f"_{index}" if index else "")
        plan[f"{stack}.final_norm.weight"] = whole((width,), f"{norm}/vars/0")
    return plan


def _stacks(config: dict[str, Any]) -> tuple[tuple[str, int], ...]:
    """(name, number of layers) of each stack. A decoder without layers is left out."""
    depth, decoder_depth = config["num_layers"], config["num_decoder_layers"]
    if decoder_depth == 0:
        return (("encoder", depth),)
    return ("encoder", depth), ("decoder", depth if decoder_depth is None else decoder_depth)
