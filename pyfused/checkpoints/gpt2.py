"""How do GPT-2's configuration and weight names in Hugging Face and Keras format map to pyfused's?

Both directions for Hugging Face, reading only for Keras. Hugging Face keeps GPT-2's linear weights as (in, out),
Keras as (in, heads, head size); pyfused has nn.Linear's (out, in), with query, key and value as one matrix, rows in
that order.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from pyfused.checkpoints.files import Options
from pyfused.checkpoints.plan import Piece, Plan, Target, transposed, whole
from pyfused.checkpoints.storage import Entry, same_values

KERAS_CLASS = "GPT2Backbone"
HF_PREFIX = "transformer."

# Buffers of older versions that carry no weights: attn.bias is a causal mask (attn.c_attn.bias is a real bias)
HF_IGNORED = (r"h\.\d+\.(attn|crossattention)\.(masked_)?bias", r"(.*\.)?position_ids")
HF_HEAD = "lm_head.weight"

# Four Hugging Face names for the tanh formula, two for the erf one
HF_ACTIVATIONS = {
    "gelu_new": "gelu_new", "gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new", "gelu_accurate": "gelu_new",
    "gelu": "gelu", "gelu_python": "gelu", "relu": "relu", "silu": "silu", "swish": "silu", "tanh": "tanh",
}  # fmt: skip

_HF_HARMLESS = {
    # about the file
    "architectures", "model_type", "transformers_version", "_name_or_path", "name_or_path", "_commit_hash", "dtype",
    "torch_dtype", "transformers.js_config", "attn_implementation", "_attn_implementation",
    "_attn_implementation_autoset", "_attn_implementation_internal", "tokenizer_class", "prefix", "finetuning_task",
    "task_specific_params", "n_ctx",
    # how it is initialised, trained, or returns
    "initializer_range", "use_cache", "gradient_checkpointing", "output_attentions", "output_hidden_states",
    "output_past", "return_dict", "return_dict_in_generate", "output_scores", "torchscript", "is_decoder",
    "is_encoder_decoder", "tf_legacy_loss", "keys_to_ignore_at_inference", "chunk_size_feed_forward",
    "remove_invalid_values",
    # heads
    "id2label", "label2id", "num_labels", "_num_labels", "problem_type", "predict_special_tokens",
    # generation
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id", "decoder_start_token_id",
    "do_sample", "max_length", "min_length", "early_stopping", "num_beams", "num_beam_groups",
    "num_return_sequences", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty",
    "diversity_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids",
    "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens",
    "exponential_decay_length_penalty",
}  # fmt: skip

_HF_REFUSED = {
    "quantization_config": "quantised weights are not read; load the model the weights were quantised from",
    "pruned_heads": "pruned attention heads are not read",
    "auto_map": "the checkpoint belongs to code of its own, which pyfused does not run",
    "cross_attention_hidden_size": "encoder states of another width are not read",
    "tie_encoder_decoder": "the decoder's weights would be those of an encoder",
    "use_bfloat16": "pass dtype='bfloat16' and drop the option",
}


def config_from_hf(raw: dict[str, Any], file: Path) -> dict[str, Any]:
    """GPT2Backbone's constructor arguments. An option that would change the outputs is carried or refused by name."""
    options = Options(raw, file)
    for name, why in _HF_REFUSED.items():
        options.refuse([name], why)
    hidden_dim = options.integer("n_embd", 768, ["hidden_size"])
    inner = options.raw("n_inner", None)
    dropout = options.number("resid_pdrop", 0.1, high=1.0)
    config: dict[str, Any] = {
        "vocabulary_size": options.integer("vocab_size", 50257),
        "num_layers": options.integer("n_layer", 12, ["num_hidden_layers"]),
        "num_heads": options.integer("n_head", 12, ["num_attention_heads"]),
        "hidden_dim": hidden_dim,
        "intermediate_dim": 4 * hidden_dim if inner is None else Options({"n_inner": inner}, file).integer("n_inner"),
        "dropout": dropout,
        "max_sequence_length": options.integer("n_positions", 1024, ["max_position_embeddings"]),
    }
    if hidden_dim % config["num_heads"]:
        raise ValueError(f"{file}: n_embd is {hidden_dim}, which n_head, {config['num_heads']}, does not divide")
    activation = options.raw("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in HF_ACTIVATIONS:
        raise ValueError(f"{file}: activation_function is {activation!r}; it takes one of {', '.join(HF_ACTIVATIONS)}")
    embedding = options.number("embd_pdrop", 0.1, high=1.0)
    attention = options.number("attn_pdrop", 0.1, high=1.0)
    config |= {
        "activation": HF_ACTIVATIONS[activation],
        "layer_norm_epsilon": options.number("layer_norm_epsilon", 1e-5),
        # None follows `dropout`, so that from_preset(..., dropout=0.0) turns all three off in the usual case
        "embedding_dropout": None if embedding == dropout else embedding,
        "attention_dropout": None if attention == dropout else attention,
        "residual_dropout": None,
        "scale_attention": options.boolean("scale_attn_weights", True),
        "scale_attention_by_inverse_layer_index": options.boolean("scale_attn_by_inverse_layer_idx", False),
        "upcast_attention": options.boolean("reorder_and_upcast_attn", False),
        "cross_attention": options.boolean("add_cross_attention", False),
        "tie_embedding_weights": options.boolean("tie_word_embeddings", True),
    }
    options.finish(_HF_HARMLESS, ("summary_",))
    return config


def settle_head(config: dict[str, Any], entries: dict[str, Entry]) -> tuple[dict[str, Any], dict[str, Entry]]:
    """Decides from the files whether the output matrix is the token embedding, and drops a redundant head.

    Files of a bare GPT2Model have no head whatever the configuration says. Where the configuration ties but the
    file holds two different matrices, the file is right, as it is for transformers; that is worth a warning.
    """
    head, embedding = entries.get(HF_HEAD), entries.get("wte.weight")
    untied = head is not None and not config["tie_embedding_weights"]
    if head is not None and embedding is not None and not untied:
        untied = not same_values(head, embedding)
        if untied:
            warnings.warn(
                f"{head} differs from {embedding.name!r} although the configuration ties them; it is used", stacklevel=4
            )
    if not untied:
        entries = {name: entry for name, entry in entries.items() if name != HF_HEAD}
    return config | {"tie_embedding_weights": not untied}, entries


def config_to_hf(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """transformers' configuration for GPT2Backbone's arguments. Raises ValueError for what it cannot say."""
    hidden_dim, num_heads = config["hidden_dim"], config["num_heads"]
    if hidden_dim % num_heads:
        raise ValueError(f"hidden_dim is {hidden_dim}; transformers' GPT-2 takes multiples of num_heads, {num_heads}")
    activation = {"gelu_tanh": "gelu_new"}.get(
        config.get("activation", "gelu_new"), config.get("activation", "gelu_new")
    )
    if activation not in HF_ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; transformers' GPT-2 takes one of {', '.join(HF_ACTIVATIONS)}")
    dropout = config.get("dropout", 0.1)
    rates = {name: config.get(f"{name}_dropout") for name in ("embedding", "attention", "residual")}
    rates = {name: dropout if rate is None else rate for name, rate in rates.items()}
    # transformers' default, which lies outside a smaller vocabulary.
    end = 50256 if config["vocabulary_size"] > 50256 else None
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "dtype": dtype,
        "vocab_size": config["vocabulary_size"],
        "bos_token_id": end,
        "eos_token_id": end,
        "n_positions": config.get("max_sequence_length", 1024),
        "n_embd": hidden_dim,
        "n_layer": config["num_layers"],
        "n_head": num_heads,
        "n_inner": config["intermediate_dim"],
        "activation_function": activation,
        "layer_norm_epsilon": config.get("layer_norm_epsilon", 1e-5),
        "embd_pdrop": rates["embedding"],
        "attn_pdrop": rates["attention"],
        "resid_pdrop": rates["residual"],
        "scale_attn_weights": config.get("scale_attention", True),
        "scale_attn_by_inverse_layer_idx": config.get("scale_attention_by_inverse_layer_index", False),
        "reorder_and_upcast_attn": config.get("upcast_attention", False),
        "add_cross_attention": config.get("cross_attention", False),
        "tie_word_embeddings": config.get("tie_embedding_weights", True),
    }


def config_from_keras(raw: dict[str, Any], file: Path) -> dict[str, Any]:
    """GPT2Backbone's constructor arguments from the ``config`` of a serialised KerasHub GPT2Backbone."""
    options = Options(raw, file)
    config: dict[str, Any] = {
        name: options.integer(name)
        for name in ("vocabulary_size", "num_layers", "num_heads", "hidden_dim", "intermediate_dim")
    }
    config["dropout"] = options.number("dropout", 0.1, high=1.0)
    config["max_sequence_length"] = options.integer("max_sequence_length", 1024)
    options.finish({"name", "trainable", "dtype"})
    if config["num_heads"] > config["hidden_dim"]:
        raise ValueError(f"{file}: num_heads is {config['num_heads']}, more than hidden_dim, {config['hidden_dim']}")
    return config | {
        "activation": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "embedding_dropout": None,
        "attention_dropout": None,
        "residual_dropout": None,
        "scale_attention": True,
        "scale_attention_by_inverse_layer_index": False,
        "upcast_attention": False,
        "cross_attention": False,
        "tie_embedding_weights": True,
    }


def hf_plan(config: dict[str, Any]) -> Plan:
    """pyfused names from Hugging Face names, without the ``transformer.`` prefix of models with a head."""
    width, inner = config["hidden_dim"], config["intermediate_dim"]
    heads = width // config["num_heads"] * config["num_heads"]
    plan: Plan = {"token_embedding.weight": whole((config["vocabulary_size"], width), "wte.weight")}
    if not config["tie_embedding_weights"]:
        plan["token_embedding.reverse_weight"] = whole((config["vocabulary_size"], width), HF_HEAD)
    plan["position_embedding.weight"] = whole((config["max_sequence_length"], width), "wpe.weight")

    def norm(ours: str, theirs: str) -> None:
        for kind in ("weight", "bias"):
            plan[f"{ours}.{kind}"] = whole((width,), f"{theirs}.{kind}")

    def linear(ours: str, theirs: str, out: int, into: int) -> None:
        plan[f"{ours}.weight"] = transposed((out, into), f"{theirs}.weight")
        plan[f"{ours}.bias"] = whole((out,), f"{theirs}.bias")

    for i in range(config["num_layers"]):
        ours, theirs = f"layers.{i}", f"h.{i}"
        norm(f"{ours}.attention_norm", f"{theirs}.ln_1")
        linear(f"{ours}.attention.query_key_value", f"{theirs}.attn.c_attn", 3 * heads, width)
        linear(f"{ours}.attention.output", f"{theirs}.attn.c_proj", width, heads)
        if config["cross_attention"]:
            norm(f"{ours}.cross_attention_norm", f"{theirs}.ln_cross_attn")
            linear(f"{ours}.cross_attention.query", f"{theirs}.crossattention.q_attn", heads, width)
            linear(f"{ours}.cross_attention.key_value", f"{theirs}.crossattention.c_attn", 2 * heads, width)
            linear(f"{ours}.cross_attention.output", f"{theirs}.crossattention.c_proj", width, heads)
        norm(f"{ours}.feed_forward_norm", f"{theirs}.ln_2")
        linear(f"{ours}.feed_forward.inner", f"{theirs}.mlp.c_fc", inner, width)
        linear(f"{ours}.feed_forward.outer", f"{theirs}.mlp.c_proj", width, inner)
    norm("final_norm", "ln_f")
    return plan


def keras_plan(config: dict[str, Any]) -> Plan:
    """pyfused names from h5 paths; query, key and value are three datasets there."""
    width, inner, heads = config["hidden_dim"], config["intermediate_dim"], config["num_heads"]
    size = width // heads
    plan: Plan = {
        "token_embedding.weight": whole((config["vocabulary_size"], width), "layers/reversible_embedding/vars/0"),
        "position_embedding.weight": whole((config["max_sequence_length"], width), "layers/position_embedding/vars/0"),
    }

    def norm(ours: str, theirs: str) -> None:
        for index, kind in enumerate(("weight", "bias")):
            plan[f"{ours}.{kind}"] = whole((width,), f"{theirs}/vars/{index}")

    for i in range(config["num_layers"]):
        ours, theirs = f"layers.{i}", "layers/transformer_decoder" + (f"_{i}" if i else "")
        attention = f"{theirs}/_self_attention_layer"
        norm(f"{ours}.attention_norm", f"{theirs}/_self_attention_layer_norm")
        parts = [f"{attention}/{part}_dense/vars" for part in ("query", "key", "value")]
        plan[f"{ours}.attention.query_key_value.weight"] = Target(
            (3 * heads * size, width), tuple(Piece(f"{part}/0", (width, heads, size), True) for part in parts)
        )
        plan[f"{ours}.attention.query_key_value.bias"] = Target(
            (3 * heads * size,), tuple(Piece(f"{part}/1", (heads, size)) for part in parts)
        )
        output = f"{attention}/output_dense/vars"
        plan[f"{ours}.attention.output.weight"] = transposed((width, heads * size), f"{output}/0", (heads, size, width))
        plan[f"{ours}.attention.output.bias"] = whole((width,), f"{output}/1")
        norm(f"{ours}.feed_forward_norm", f"{theirs}/_feedforward_layer_norm")
        for name, dense, out, into in (("inner", "intermediate", inner, width), ("outer", "output", width, inner)):
            variables = f"{theirs}/_feedforward_{dense}_dense/vars"
            plan[f"{ours}.feed_forward.{name}.weight"] = transposed((out, into), f"{variables}/0")
            plan[f"{ours}.feed_forward.{name}.bias"] = whole((out,), f"{variables}/1")
    norm("final_norm", "layers/layer_normalization")
    return plan
