"""How do GPT-2's configuration and weight names in Hugging Face and Keras format map to pyfused's?

Hugging Face stores GPT-2's linear weights as (in, out), Keras as (in, heads, head size). pyfused has nn.Linear's (out, in), and
one matrix for query, key and value, with the rows in that order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pyfused.checkpoints.files import Options
from pyfused.checkpoints.layer_plans import ONLY_HF, Tensors, numbered
from pyfused.checkpoints.names import settle_head
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
from pyfused.checkpoints.storage import Entry

HF_SAVED_PREFIX = "transformer."  # in front of the names that pyfused saves, as in models with a head

# Buffers of older versions, not weights: attn.bias is a causal mask (attn.c_attn.bias is a real bias)
HF_BUFFERS = (r"h\.\d+\.(attn|crossattention)\.(masked_)?bias", r"(.*\.)?position_ids")
# The output matrix, the token embedding, tied copies of it, and a prefix that names may lack
HF_HEAD, HF_EMBEDDING, HF_COPIES, HF_BARE = "lm_head.weight", "wte.weight", (), ""
_SIZED = {"max_sequence_length": 1024}
DEFAULTS = {"tie_embedding_weights": True, "cross_attention": False, **_SIZED}
DEPTHS = ("num_layers",)  # the arguments that count stored layers
KERAS_TASKS = ("CausalLM",)  # KerasHub's classes that take this backbone
_KERAS_SIZES = ("vocabulary_size", "num_layers", "num_heads", "hidden_dim", "intermediate_dim")
_KERAS_FIXED = {
    "activation": "gelu_new", "layer_norm_epsilon": 1e-5, "embedding_dropout": None, "attention_dropout": None,
    "residual_dropout": None, "scale_attention": True, "scale_attention_by_inverse_layer_index": False,
    "upcast_attention": False, "cross_attention": False, "tie_embedding_weights": True,
}  # fmt: skip

# pyfused's argument -> transformers' option, its default and other names
_SIZES: dict[str, Any] = {
    "vocabulary_size": ("vocab_size", 50257), "num_layers": ("n_layer", 12, ["num_hidden_layers"]),
    "num_heads": ("n_head", 12, ["num_attention_heads"]), "hidden_dim": ("n_embd", 768, ["hidden_size"]),
    "max_sequence_length": ("n_positions", 1024, ["max_position_embeddings"]),
}  # fmt: skip
_FLAGS = {
    "scale_attention": ("scale_attn_weights", True),
    "scale_attention_by_inverse_layer_index": ("scale_attn_by_inverse_layer_idx", False),
    "upcast_attention": ("reorder_and_upcast_attn", False), "cross_attention": ("add_cross_attention", False),
    "tie_embedding_weights": ("tie_word_embeddings", True),
}  # fmt: skip


def config_from_hf(raw: dict[str, Any], file: Path) -> dict[str, Any]:
    """GPT2Backbone's constructor arguments. Raises ValueError for an unsupported option that changes the outputs."""
    options = Options(raw, file)
    options.refuse(REFUSED)
    config: dict[str, Any] = {name: options.integer(*theirs) for name, theirs in _SIZES.items()}
    hidden_dim, inner = config["hidden_dim"], options.raw("n_inner", None)
    if hidden_dim % config["num_heads"]:
        raise ValueError(f"{file}: n_embd is {hidden_dim}, not a multiple of n_head, {config['num_heads']}")
    dropout, embedding, attention = (
        options.number(f"{site}_pdrop", 0.1, high=1.0) for site in ("resid", "embd", "attn")
    )
    config |= {
        "intermediate_dim": 4 * hidden_dim if inner is None else Options({"n_inner": inner}, file).integer("n_inner"),
        "activation": read_activation(options, "activation_function"),
        "layer_norm_epsilon": options.number("layer_norm_epsilon", 1e-5),
        # None means `dropout`: from_preset(..., dropout=0.0) then turns all three off
        "dropout": dropout,
        "embedding_dropout": None if embedding == dropout else embedding,
        "attention_dropout": None if attention == dropout else attention,
        "residual_dropout": None,
        **{name: options.boolean(*theirs) for name, theirs in _FLAGS.items()},
    }
    options.finish(SILENT | {"n_ctx"}, ("summary_",))
    return config


def config_to_hf(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """transformers' configuration for GPT2Backbone's arguments. Raises ValueError for one that it has no option for."""
    config = {name: default for name, (_, default) in _FLAGS.items()} | DEFAULTS | config
    hidden_dim, num_heads = config["hidden_dim"], config["num_heads"]
    if hidden_dim % num_heads:
        raise ValueError(f"hidden_dim is {hidden_dim}; transformers' GPT-2 takes multiples of num_heads, {num_heads}")
    dropout = config.get("dropout", 0.1)
    rates = {name: config.get(f"{name}_dropout") for name in ("embedding", "attention", "residual")}
    rates = {name: dropout if rate is None else rate for name, rate in rates.items()}
    # transformers' default, if the vocabulary is large enough
    end = 50256 if config["vocabulary_size"] > 50256 else None
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "dtype": dtype,
        "bos_token_id": end,
        "eos_token_id": end,
        **{theirs[0]: config[name] for name, theirs in (_SIZES | _FLAGS).items()},
        "n_inner": config["intermediate_dim"],
        "activation_function": check_activation(config, whose="transformers' GPT-2"),
        "layer_norm_epsilon": config.get("layer_norm_epsilon", 1e-5),
        "embd_pdrop": rates["embedding"],
        "attn_pdrop": rates["attention"],
        "resid_pdrop": rates["residual"],
    }


def config_from_keras(raw: dict[str, Any], file: Path) -> dict[str, Any]:
    """GPT2Backbone's constructor arguments from the ``config`` of a serialised KerasHub GPT2Backbone."""
    options = Options(raw, file)
    config = read_keras(options, _KERAS_SIZES, _SIZED)
    check_heads(config, file)
    return config | finish_keras(options, _KERAS_FIXED)


def config_to_keras(config: dict[str, Any]) -> dict[str, Any]:
    """KerasHub's arguments for GPT2Backbone's. Raises ValueError for one that its class does not have."""
    config = {"dropout": 0.1} | DEFAULTS | config
    check_keras(config, _KERAS_FIXED, "GPT2Backbone")
    return {name: config[name] for name in (*_KERAS_SIZES, *_SIZED, "dropout")}


def settle(config: dict[str, Any], entries: dict[str, Entry]) -> tuple[dict[str, Any], dict[str, Entry]]:
    """Sets ``tie_embedding_weights`` from the weight files; see `settle_head`."""
    return settle_head(config, entries, HF_HEAD, HF_EMBEDDING)


def name_tensors(tensors: Tensors, config: dict[str, Any]) -> None:
    """The tensors of both formats. Keras stores query, key and value as three datasets."""
    tensors.hf_by_inputs = True
    vocabulary, width, inner = config["vocabulary_size"], config["hidden_dim"], config["intermediate_dim"]
    heads = width // config["num_heads"] * config["num_heads"]  # their width
    tensors.whole("token_embedding.weight", "wte.weight", "layers/reversible_embedding/vars/0", vocabulary, width)
    if not config["tie_embedding_weights"]:
        tensors.whole("token_embedding.reverse_weight", HF_HEAD, ONLY_HF, vocabulary, width)
    places = config["max_sequence_length"]
    tensors.whole("position_embedding.weight", "wpe.weight", "layers/position_embedding/vars/0", places, width)
    for i in range(config["num_layers"]):
        layer = tensors.inside(f"layers.{i}", f"h.{i}", numbered("layers/transformer_decoder", i))
        layer.norm("attention_norm", "ln_1", "_self_attention_layer_norm", width)
        layer.attention(["attn.c_attn"], "attn.c_proj", "_self_attention_layer", width, config["num_heads"])
        if config["cross_attention"]:
            layer.norm("cross_attention_norm", "ln_cross_attn", ONLY_HF, width)
            layer.linear("cross_attention.query", "crossattention.q_attn", ONLY_HF, heads, width)
            layer.linear("cross_attention.key_value", "crossattention.c_attn", ONLY_HF, 2 * heads, width)
            layer.linear("cross_attention.output", "crossattention.c_proj", ONLY_HF, width, heads)
        layer.norm("feed_forward_norm", "ln_2", "_feedforward_layer_norm", width)
        layer.linear("feed_forward.inner", "mlp.c_fc", "_feedforward_intermediate_dense", inner, width)
        layer.linear("feed_forward.outer", "mlp.c_proj", "_feedforward_output_dense", width, inner)
    tensors.norm("final_norm", "ln_f", "layers/layer_normalization", width)
