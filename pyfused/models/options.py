"""Are a model's constructor arguments of the right types and in range? The checks that all models share."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ..ops.attention import MAX_HEAD_SIZE


def check_known(cls: type, keywords: Collection[str], options: Collection[str]) -> None:
    """Keywords beyond the named arguments."""
    if unknown := sorted(set(keywords) - set(options)):
        raise TypeError(f"{cls.__name__} got an unknown argument {unknown[0]!r}; it takes {', '.join(options)}")


def check_sizes(sizes: Mapping[str, Any]) -> None:
    """Integers of at least 1."""
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} is {value!r}; it takes an int")
        if value < 1:
            raise ValueError(f"{name} is {value}; it takes at least 1")


def check_heads(hidden_dim: int, num_heads: int) -> None:
    """Heads that share the hidden dimension."""
    if not 1 <= hidden_dim // num_heads <= MAX_HEAD_SIZE:
        raise ValueError(
            f"num_heads is {num_heads} and hidden_dim {hidden_dim}; "
            f"they take 1 <= hidden_dim // num_heads <= {MAX_HEAD_SIZE}"
        )


def check_rates(rates: Mapping[str, Any]) -> None:
    """Dropout rates."""
    for name, value in rates.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} is {value!r}; it takes a float")
        if not 0.0 <= value < 1.0:
            raise ValueError(f"{name} is {value}; it takes 0 <= {name} < 1")


def check_rest(config: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """The epsilon, the name, and the flags: options whose default is a bool."""
    epsilon = config["layer_norm_epsilon"]
    if isinstance(epsilon, bool) or not isinstance(epsilon, (int, float)):
        raise TypeError(f"layer_norm_epsilon is {epsilon!r}; it takes a float")
    if not epsilon >= 0.0:
        raise ValueError(f"layer_norm_epsilon is {epsilon}; it takes at least 0")
    for name, default in options.items():
        if isinstance(default, bool) and not isinstance(config[name], bool):
            raise TypeError(f"{name} is {config[name]!r}; it takes True or False")
    if config["name"] is not None and not isinstance(config["name"], str):
        raise TypeError(f"name is {config['name']!r}; it takes a str or None")
