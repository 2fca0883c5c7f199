"""Which options of a configuration mean the same for every model: those without effect, and those that are refused?

And by which names do Hugging Face and Keras call an activation?
"""

from __future__ import annotations

from typing import Any

# Several Hugging Face names for the tanh formula, two for the erf one
HF_ACTIVATIONS = {
    "gelu_new": "gelu_new", "gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new", "gelu_accurate": "gelu_new",
    "gelu": "gelu", "gelu_python": "gelu", "relu": "relu", "silu": "silu", "swish": "silu", "tanh": "tanh",
}  # fmt: skip

# Keras writes a function of KerasHub's, or of KerasNLP's, as it was called, by its registered name
_KERAS_FUNCTIONS = {f"{package}>gelu_approximate": "gelu_new" for package in ("keras_hub", "keras_nlp")}

HARMLESS = {
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
    "id2label", "label2id", "num_labels", "_num_labels", "problem_type", "predict_special_tokens",
    # generation
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id", "decoder_start_token_id",
    "do_sample", "max_length", "min_length", "early_stopping", "num_beams", "num_beam_groups",
    "num_return_sequences", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty",
    "diversity_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids",
    "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens",
    "exponential_decay_length_penalty",
}  # fmt: skip

REFUSED = {
    "quantization_config": "quantised weights are not read; load the model the weights were quantised from",
    "pruned_heads": "pruned attention heads are not read",
    "auto_map": "the checkpoint belongs to code of its own, which pyfused does not run",
    "cross_attention_hidden_size": "encoder states of another width are not read",
    "tie_encoder_decoder": "the decoder's weights would be those of an encoder",
    "use_bfloat16": "pass dtype='bfloat16' and drop the option",
}


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
    return (HF_ACTIVATIONS | {"gelu_tanh": "gelu_new"} | _KERAS_FUNCTIONS).get(value)
