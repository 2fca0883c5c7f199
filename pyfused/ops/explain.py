"""Which backend would run a call, and why would the others not? explain() reports dispatch's decision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .. import dispatch, evidence
from . import MODULES


@dataclass(frozen=True)
class Verdict:
    """One backend's row in an explanation: does it run, and if not, why not."""

    backend: str
    runs: bool
    reason: str


@dataclass(frozen=True)
class Explanation:
    """The result of explain(): `backend` would run; str() is a table with every backend's reason."""

    operator: str
    backend: str
    verdicts: tuple[Verdict, ...]

    def __str__(self) -> str:
        rows = [f"{self.operator}: {self.backend}"]
        rows += [f"  {'->' if v.runs else '  '} {v.backend:<10} {v.reason}" for v in self.verdicts]
        return "\n".join(rows)


def verdicts(operator: str, function: str, args: tuple[Any, ...]) -> tuple[Verdict, ...]:
    """Every backend's verdict on one call, in the order of dispatch."""
    asked = dispatch.forced()
    rows: list[Verdict] = []
    found = False
    for candidate, reason in dispatch.judged(operator, function, args):
        name, runs = candidate.backend, not reason and not found
        if not reason:
            more = evidence.found(name, operator, function, args) if runs or name not in ("cpu", "reference") else ""
            reason = "fits, and comes later"
            if runs:
                reason = "forced" if asked and asked[0] == name else "first that fits"
                by_library = getattr(
                    dispatch.kernel(name, operator), f"left_to_library_{function}", lambda *args: None
                )(*args)
                more = f"by PyTorch's own code: {by_library}" if by_library else more
                remark = getattr(dispatch.kernel(name, operator), f"remark_{function}", lambda *args: None)(*args)
                more = "; ".join(filter(None, (more, remark)))
            reason = f"{reason}; {more}" if more else reason
        found = found or runs
        rows.append(Verdict(name, runs, reason))
    return tuple(rows)


def explain(operator: str, *args: Any, **kwargs: Any) -> Explanation:
    """Says which backend would run an operator for these arguments, and why the others would not. Runs no kernel.

    Args:
        operator: its name, such as "attention".
        args, kwargs: the operator's own arguments.

    Example:
        print(pyfused.explain("layer_norm", x, weight, bias))
    """
    module = MODULES.get(operator)
    if module is None:
        raise ValueError(f"operator={operator!r} is unknown; there are {', '.join(MODULES)}")
    rows = verdicts(operator, "forward", module.bind(*args, **kwargs))
    return Explanation(operator, next(v.backend for v in rows if v.runs), rows)
