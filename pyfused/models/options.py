"""Do a model's constructor arguments have the right types and values? Each name has one rule for all models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..ops.attention import MAX_HEAD_SIZE
from ..rules import FLAG, RATE, SIZE, Rule, check

_RULES: dict[str, Rule] = {
    **dict.fromkeys(
        (
            *("vocabulary_size", "num_layers", "num_heads", "embedding_dim", "hidden_dim", "intermediate_dim"),
            *("key_value_dim", "num_groups", "num_inner_repetitions", "max_sequence_length", "num_segments"),
            *("num_buckets", "max_distance"),
        ),
        SIZE,
    ),
    "num_decoder_layers": Rule(int, "an int", lambda value: value >= 0, "at least 0"),
    "decoder_start_token_id": Rule(int, "a token id"),
    **dict.fromkeys(
        ("dropout", *(f"{s}_dropout" for s in ("embedding", "attention", "residual", "feed_forward"))), RATE
    ),
    "layer_norm_epsilon": Rule((int, float), "a float", lambda value: value >= 0.0, "at least 0"),
    **dict.fromkeys(
        (
            *("scale_attention", "scale_attention_by_inverse_layer_index", "upcast_attention", "cross_attention"),
            *("use_gated_activation", "tie_embedding_weights", "scale_logits", "pooler", "trainable"),
        ),
        FLAG,
    ),
    "name": Rule(str, "a str or None"),
}
# These also take None: the value then follows from another argument, or there is no name.
_NONE = {"key_value_dim", "embedding_dropout", "attention_dropout", "residual_dropout", "feed_forward_dropout", "name"}


def configuration(
    cls: type, named: Mapping[str, Any], options: Mapping[str, Any], keywords: Mapping[str, Any]
) -> dict[str, Any]:
    """A model's constructor arguments as one checked dict. checkpoints/options.py checks the activation.

    Args:
        named: the signature's named arguments. options: the others, with their defaults. keywords: the others as given.
    """
    if unknown := sorted(set(keywords) - set(options)):
        raise TypeError(f"{cls.__name__} got an unknown argument {unknown[0]!r}; it takes {', '.join(options)}")
    config = {**named, **options, **keywords}
    for name, value in config.items():
        if name in _RULES and not (value is None and name in _NONE):
            check(_RULES[name], **{name: value})
    size, width, heads = config.get("key_value_dim"), config["hidden_dim"], config.get("num_heads", 1)
    if size is not None and size > MAX_HEAD_SIZE:
        raise ValueError(f"key_value_dim is {size}; it takes at most {MAX_HEAD_SIZE}")
    if size is None and "num_heads" in config and not 1 <= width // heads <= MAX_HEAD_SIZE:
        raise ValueError(
            f"num_heads is {heads} and hidden_dim {width}; they take 1 <= hidden_dim // num_heads <= {MAX_HEAD_SIZE}"
        )
    start, vocabulary = config.get("decoder_start_token_id", 0), config["vocabulary_size"]
    if not 0 <= start < vocabulary:
        raise ValueError(f"decoder_start_token_id is {start}; it takes a token id below vocabulary_size = {vocabulary}")
    return config


def rate(config: Mapping[str, Any], site: str) -> float:
    """The dropout rate of a site: its own, or else `dropout`."""
    own: float | None = config[f"{site}_dropout"]
    return config["dropout"] if own is None else own


def head_size(config: Mapping[str, Any]) -> int:
    """d, the size of a head."""
    size: int = config.get("key_value_dim") or config["hidden_dim"] // config["num_heads"]
    return size
