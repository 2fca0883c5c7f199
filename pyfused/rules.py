"""Does an argument have the right type and value? Each rule stands here once, with the words of its error."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """The values that an argument takes."""

    kind: Any  # its type, or several
    takes: str  # the type in words
    fits: Callable[[Any], bool] = lambda value: True
    bounds: str = ""  # which values fit, in words


SIZE = Rule(int, "an int", lambda value: value >= 1, "at least 1")
FLAG = Rule(bool, "True or False")
RATE = Rule((int, float), "a float", lambda value: 0.0 <= value < 1.0, "0 <= {name} < 1")
NUMBER = Rule((int, float), "a number", lambda value: -math.inf < value < math.inf, "a finite number")
SEED = Rule(int, "an int or None", lambda value: value >= 0, "at least 0")
ACTIVATION_NAME = Rule(str, "a name such as 'gelu_new'")
_TOP_K = Rule(int, "an int or None", lambda value: value >= 1, "at least 1")
_TOP_P = Rule((int, float), "a number or None", lambda value: 0.0 < value <= 1.0, "0 < {name} <= 1")


def with_article(name: str) -> str:
    """ "a list", "an int", "an FNetBackbone": as one says the name aloud."""
    spelled = name[:2].isupper() and name[0] in "FHLMNRSX"  # its first letter is said alone, as in MT5
    return f"{'an' if spelled or name[0] in 'AEIOaeio' else 'a'} {name}"


def its_kind(value: Any) -> str:
    """A value's class with its article, for errors."""
    return with_article(type(value).__name__)


def check(rule: Rule, **values: Any) -> None:
    """Raises TypeError or ValueError for the first value that breaks the rule. `values`: by argument name."""
    for name, value in values.items():
        if not isinstance(value, rule.kind) or (isinstance(value, bool) and rule.kind is not bool):
            raise TypeError(f"{name} is {value!r}; it takes {rule.takes}")
        if not rule.fits(value):
            raise ValueError(f"{name} is {value}; it takes {rule.bounds.format(name=name)}")


def check_cuts(top_k: int | None, top_p: float | None) -> None:
    """Checks which tokens a draw may take; see `Generator.generate`. None cuts nothing."""
    if top_k is not None:
        check(_TOP_K, top_k=top_k)
    if top_p is not None:
        check(_TOP_P, top_p=top_p)
