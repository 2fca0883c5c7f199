"""Which options of a configuration have no effect or are refused, whatever the model, and what are activations called?

An option that is in neither table and that no model reads causes a warning.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pyfused.activations import ACTIVATIONS, SPELLINGS
from pyfused.checkpoints.files import Options, Refused

# Hugging Face's name -> pyfused's
HF_ACTIVATIONS = {spelling: row.spellings[0] for spelling, row in SPELLINGS.items()}

# Keras writes functions of KerasHub (formerly KerasNLP) by their registered names
_KERAS_FUNCTIONS = dict.fromkeys(
    (f"{package}>gelu_approximate" for package in ("keras_hub", "keras_nlp")), HF_ACTIVATIONS["gelu_new"]
)

# The form in which Keras serialises its function of the tanh formula
KERAS_GELU = {
    "module": "builtins",
    "class_name": "function",
    "config": "keras_hub>gelu_approximate",
    "registered_name": "function",
}

# Options that some version of transformers writes into any configuration and that do not affect the outputs
SILENT = {
    # about the file
    "architectures", "model_type", "transformers_version", "_name_or_path", "name_or_path", "_commit_hash", "dtype",
    "torch_dtype", "transformers.js_config", "attn_implementation", "_attn_implementation",
    "_attn_implementation_autoset", "_attn_implementation_internal", "tokenizer_class", "prefix", "finetuning_task",
    "task_specific_params",
    # initialisation, training and return values
    "initializer_range", "use_cache", "gradient_checkpointing", "output_attentions", "output_hidden_states",
    "output_past", "return_dict", "return_dict_in_generate", "output_scores", "torchscript", "is_decoder",
    "is_encoder_decoder", "tf_legacy_loss", "keys_to_ignore_at_inference", "chunk_size_feed_forward",
    "remove_invalid_values",
    # heads
    "id2label", "label2id", "num_labels", "_num_labels", "problem_type",
    # generation
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id", "decoder_start_token_id",
    "do_sample", "max_length", "min_length", "early_stopping", "num_beams", "num_beam_groups",
    "num_return_sequences", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty",
    "diversity_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids",
    "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens",
    "exponential_decay_length_penalty",
}  # fmt: skip

_QUANTISED = (
    "the weights are quantised, but pyfused reads floating-point weights: load the checkpoint that they were quantised from"
)
REFUSED = {
    "quantization_config": Refused(_QUANTISED),
    "compression_config": Refused(_QUANTISED),
    "pruned_heads": Refused("pyfused does not support layers with different numbers of heads"),
    "auto_map": Refused("the checkpoint needs its own code, which pyfused does not run"),
    "cross_attention_hidden_size": Refused("pyfused supports only encoder states of the decoder's width"),
    "tie_encoder_decoder": Refused("pyfused does not share weights between encoder and decoder"),
    "use_bfloat16": Refused("pass dtype='bfloat16' and drop the option"),
    "position_embedding_type": Refused("pyfused supports only absolute positions", "absolute"),
}


def read_keras(
    options: Options, sizes: Iterable[str], defaults: Mapping[str, int], dropout: float = 0.1
) -> dict[str, Any]:
    """The sizes and the rate of dropout in a configuration of Keras. defaults: of the sizes that it may lack."""
    config: dict[str, Any] = {name: options.integer(name) for name in sizes}
    config |= {name: options.integer(name, default) for name, default in defaults.items()}
    config["dropout"] = options.number("dropout", dropout, high=1.0)
    return config


def check_heads(config: Mapping[str, Any], file: Path) -> None:
    """Raises ValueError if a head would have no size. In KerasHub num_heads need not divide hidden_dim."""
    if config["num_heads"] > config["hidden_dim"]:
        raise ValueError(f"{file}: num_heads is {config['num_heads']}, more than hidden_dim, {config['hidden_dim']}")


def finish_keras(options: Options, fixed: dict[str, Any]) -> dict[str, Any]:
    """Checks the options that are left, and returns ``fixed``: settings that KerasHub's class has no argument for. A
    configuration from a later version may state one of them, with the same value. Other options cause a warning.
    ``trainable`` comes along where it is False: KerasHub then freezes the weights, and so does pyfused."""
    for name, value in fixed.items():
        stated = options.raw(name, value)
        if (activation_name(stated) if name == "activation" else stated) != value:
            raise ValueError(f"{options.file}: {name}={stated!r:.200}, but KerasHub's class always has {value!r}")
    options.refuse({"quantization_config": REFUSED["quantization_config"]})
    frozen = {} if options.boolean("trainable", True) else {"trainable": False}
    options.finish({"name", "dtype"})
    return fixed | frozen


def check_keras(config: dict[str, Any], fixed: dict[str, Any], whose: str) -> None:
    """Raises ValueError for a backbone's argument that differs from ``fixed``, the settings that KerasHub's class has no
    argument for. A rate of None there means `dropout`. ``whose``: the name of KerasHub's class."""
    for name, value in fixed.items():
        stated = config.get(name, value)
        shown, takes = stated, value
        if name == "activation":
            stated = activation_name(stated)
        elif value is None:
            stated, value = (config["dropout"] if stated is None else stated), config["dropout"]
            takes = f"dropout, {value}; load the model with {name}=None, or save it with format='hf'"
        if stated != value:
            raise ValueError(f"{name} is {shown!r}; KerasHub's {whose} always has {takes!s}")


def activation_name(value: Any) -> str | None:
    """pyfused's name for an activation in Hugging Face's or Keras's form. None if pyfused does not have it.

    ``value`` is a name that both use ("gelu" is the erf formula in both), or the registered name of a KerasHub function,
    bare or inside Keras's serialised function object.
    """
    if isinstance(value, dict) and value.get("class_name") == "function":
        value = value.get("config")
        if isinstance(value, dict):  # some versions of Keras nest the name once more
            value = value.get("name")
    if not isinstance(value, str):
        return None
    if value in ACTIVATIONS:
        return ACTIVATIONS[value].spellings[0]
    return (HF_ACTIVATIONS | _KERAS_FUNCTIONS).get(value)


def read_activation(options: Options, name: str) -> str:
    """pyfused's name for the activation in an option of a Hugging Face configuration. Raises ValueError if pyfused lacks it."""
    stated = options.raw(name, "gelu_new")
    if not isinstance(stated, str) or stated not in HF_ACTIVATIONS:
        raise ValueError(f"{options.file}: {name} is {stated!r}; it takes one of {', '.join(HF_ACTIVATIONS)}")
    return HF_ACTIVATIONS[stated]


def check_activation(config: dict[str, Any], default: str = "gelu_new", whose: str = "it") -> str:
    """pyfused's name for the activation in a backbone's arguments. Raises ValueError if pyfused lacks it."""
    stated = config.get("activation", default)
    name = activation_name(stated)
    if name is None:
        raise ValueError(f"activation is {stated!r}; {whose} takes {', '.join(HF_ACTIVATIONS)}")
    return name
