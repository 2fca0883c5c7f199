"""Which options of a configuration mean the same for every model: those without effect, and those that are refused?

What is in neither table, nor read by a model, is named in a warning. And by which names do Hugging Face and Keras call an
activation?
"""

from __future__ import annotations

from typing import Any

from pyfused.activations import ACTIVATIONS, SPELLINGS
from pyfused.checkpoints.files import Options, Refused

# By each of Hugging Face's names the one that pyfused writes
HF_ACTIVATIONS = {spelling: row.spellings[0] for spelling, row in SPELLINGS.items()}

# Keras writes a function of KerasHub's, or of KerasNLP's, as it was called, by its registered name
_KERAS_FUNCTIONS = dict.fromkeys(
    (f"{package}>gelu_approximate" for package in ("keras_hub", "keras_nlp")), HF_ACTIVATIONS["gelu_new"]
)

# What some version of transformers writes into any configuration, and what has no effect on the outputs
SILENT = {
    # about the file
    "architectures", "model_type", "transformers_version", "_name_or_path", "name_or_path", "_commit_hash", "dtype",
    "torch_dtype", "transformers.js_config", "attn_implementation", "_attn_implementation",
    "_attn_implementation_autoset", "_attn_implementation_internal", "tokenizer_class", "prefix", "finetuning_task",
    "task_specific_params",
    # how it is initialised, trained, or returns
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
    "the weights are quantised, and pyfused reads floating-point weights: load the checkpoint that they were quantised from"
)
REFUSED = {
    "quantization_config": Refused(_QUANTISED),
    "compression_config": Refused(_QUANTISED),
    "pruned_heads": Refused("attention heads were taken out, so that layers have fewer of them"),
    "auto_map": Refused("the checkpoint belongs to code of its own, which pyfused does not run"),
    "cross_attention_hidden_size": Refused("the encoder's states would have another width"),
    "tie_encoder_decoder": Refused("the decoder's weights would be those of the encoder"),
    "use_bfloat16": Refused("pass dtype='bfloat16' and drop the option"),
    "position_embedding_type": Refused("positions would enter in another way than pyfused computes", "absolute"),
}


def finish_keras(options: Options, fixed: dict[str, Any]) -> dict[str, Any]:
    """``fixed``: what KerasHub's class computes and has no argument for. An option of such a name, from a later version or
    another library, must say the same. The rest is named in a warning, as `Options.finish` does."""
    for name, value in fixed.items():
        stated = options.raw(name, value)
        if (activation_name(stated) if name == "activation" else stated) != value:
            raise ValueError(f"{options.file}: {name}={stated!r:.200}, but KerasHub's class computes {value!r}")
    options.refuse({"quantization_config": REFUSED["quantization_config"]})
    options.finish({"name", "trainable", "dtype"})
    return fixed


def activation_name(value: Any) -> str | None:
    """pyfused's name for an activation as Hugging Face or Keras writes it; None for one that pyfused does not have.

    A string is one of Hugging Face's names, which are also Keras's where Keras has them ("gelu" is the erf formula in
    both), or a registered function of KerasHub's, bare or inside the object that Keras serialises a function to.
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


def read_activation(options: Options, name: str, default: str = "gelu_new") -> str:
    """pyfused's name for the activation that an option of a Hugging Face configuration states. Raises ValueError for one that
    pyfused does not have."""
    stated = options.raw(name, default)
    if not isinstance(stated, str) or stated not in HF_ACTIVATIONS:
        raise ValueError(f"{options.file}: {name} is {stated!r}; it takes one of {', '.join(HF_ACTIVATIONS)}")
    return HF_ACTIVATIONS[stated]


def check_activation(config: dict[str, Any], default: str = "gelu_new", whose: str = "it") -> str:
    """pyfused's name for the activation of a backbone's arguments. Raises ValueError for one that pyfused does not have."""
    stated = config.get("activation", default)
    found = activation_name(stated)
    if found is None:
        raise ValueError(f"activation is {stated!r}; {whose} takes {', '.join(HF_ACTIVATIONS)}")
    return found
