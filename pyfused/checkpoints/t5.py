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
from pyfused.checkpoints.layer_plans import Tensors, numbered
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
from pyfused.checkpoints.plan import transposed
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


def name_tensors(tensors: Tensors, config: dict[str, Any]) -> None:
    """The tensors of both formats. Keras numbers the layers through both stacks."""
    vocabulary, width = config["vocabulary_size"], config["hidden_dim"]
    embedding, head = "layers/reversible_embedding/vars", "token_embedding.reverse_weight"
    tensors.whole("token_embedding.weight", HF_EMBEDDING, f"{embedding}/0", vocabulary, width)
    if not config["tie_embedding_weights"]:
        tensors.whole(head, HF_HEAD, "", vocabulary, width)
        if tensors.is_keras:
            tensors.plan[head] = transposed((vocabulary, width), f"{embedding}/1")
    count = 0
    for index, (stack, depth) in enumerate(_stacks(config)):
        for i in range(depth):
            keras = numbered("layers/t5_transformer_layer", count)
            layer = tensors.inside(f"{stack}.layers.{i}", f"{stack}.block.{i}.layer", keras)
            _plan_layer(layer, config, has_table=i == 0, is_decoder=stack == "decoder")
            count += 1
        norm = numbered("layers/t5_layer_norm", index)
        tensors.norm(f"{stack}.final_norm", f"{stack}.final_layer_norm", norm, width, bias=False)


def _plan_layer(layer: Tensors, config: dict[str, Any], *, has_table: bool, is_decoder: bool) -> None:
    width, inner, heads = config["hidden_dim"], config["intermediate_dim"], config["num_heads"]
    heads_width = heads * (config["key_value_dim"] or width // heads)

    def attend(ours: str, hf: str, keras: str, *projections: str) -> None:
        layer.norm(f"{ours}_norm", f"{hf[0]}.layer_norm", f"{keras}_layer_norm", width, bias=False)
        if has_table and ours == "attention":
            table = f"{hf}.relative_attention_bias.weight"
            layer.whole("attention.relative_bias", table, f"{keras}/vars/0", config["num_buckets"], heads)
        for name in projections:
            parts = name.split("_")
            theirs = [f"{hf}.{part[0]}" for part in parts], [f"{keras}/{part}_projector" for part in parts]
            layer.stacked(f"{ours}.{name}", *theirs, heads_width, width, bias=False)
        layer.linear(f"{ours}.output", f"{hf}.o", f"{keras}/output_projector", width, heads_width, bias=False)

    attend("attention", "0.SelfAttention", "self_attention", "query_key_value")
    if is_decoder:
        attend("cross_attention", "1.EncDecAttention", "cross_attention", "query", "key_value")
    last = 2 if is_decoder else 1
    layer.norm("feed_forward_norm", f"{last}.layer_norm", "layer_norm", width, bias=False)
    dense, gated = f"{last}.DenseReluDense", config["use_gated_activation"]
    names = (("gate", "wi_0", "input"), ("up", "wi_1", "gate")) if gated else (("inner", "wi", "input"),)
    for ours, theirs, keras in names:
        layer.linear(f"feed_forward.{ours}", f"{dense}.{theirs}", f"{keras}_projector", inner, width, bias=False)
    layer.linear("feed_forward.outer", f"{dense}.wo", "output_projector", width, inner, bias=False)


def _stacks(config: dict[str, Any]) -> tuple[tuple[str, int], ...]:
    """(name, number of layers) of each stack. A decoder without layers is left out."""
    depth, decoder_depth = config["num_layers"], config["num_decoder_layers"]
    if decoder_depth == 0:
        return (("encoder", depth),)
    return ("encoder", depth), ("decoder", depth if decoder_depth is None else decoder_depth)
