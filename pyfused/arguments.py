"""What are attention's arguments, and in which order? Its schemas, its backends and their launches share this order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

# In both classes the arguments from bias_table on have defaults: torch's dispatcher leaves out trailing arguments that have
# their default values.


class AttentionForward(NamedTuple):
    """The forward's arguments, in the order of its schema."""

    query: Tensor  # (B, H, Sq, D)
    key: Tensor  # (B, Hkv, Sk, D), as value
    value: Tensor
    is_causal: bool
    padding_mask: Tensor | None  # (B, Sk) bool
    attn_bias: Tensor | None  # (B, H, Sq, Sk)
    scale: float
    dropout_p: float
    seed: Tensor | None  # (1,) int64, of dropout
    save: bool  # whether to return lse, for a backward
    bias_table: Tensor | None = None  # (num_buckets, H) of T5's bias
    bidirectional: bool = True
    max_distance: int = 128
    cu_seqlens: Tensor | None = None  # (N + 1,) int32
    max_seqlen: int = 0

    def backward(
        self, grad_out: Tensor, out: Tensor, lse: Tensor, wants_bias: bool, wants_table: bool
    ) -> AttentionBackward:
        """The arguments of this call's backward."""
        own = {name: value for name, value in self._asdict().items() if name in AttentionBackward._fields}
        return AttentionBackward(
            grad_out=grad_out, out=out, lse=lse, wants_bias=wants_bias, wants_table=wants_table, **own
        )


class AttentionBackward(NamedTuple):
    """The backward's arguments, in the order of its schema."""

    grad_out: Tensor  # as out
    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor  # of the forward, (B, H, Sq, D)
    lse: Tensor  # of the forward, (B, H, Sq) float32
    is_causal: bool
    padding_mask: Tensor | None
    attn_bias: Tensor | None
    scale: float
    dropout_p: float
    seed: Tensor | None
    wants_bias: bool  # whether to return attn_bias's gradient
    bias_table: Tensor | None = None
    bidirectional: bool = True
    max_distance: int = 128
    wants_table: bool = False  # whether to return bias_table's gradient
    cu_seqlens: Tensor | None = None
    max_seqlen: int = 0


def taking(arguments: Any) -> Callable[[Callable[[Any], Any]], Callable[..., Any]]:
    """Turns f(call) into f(*args), the form that an operator calls. `arguments` is the class of `call`."""

    def decorate(function: Callable[[Any], Any]) -> Callable[..., Any]:
        return lambda *args, **names: function(arguments(*args, **names))

    return decorate


_SYMBOLIC = {"max_seqlen"}  # integers that depend on sizes


def schema(arguments: Any) -> str:
    """The arguments as torch.library.define takes them."""
    kinds = {"Tensor | None": "Tensor?"}
    rows = []
    for name, kind in arguments.__annotations__.items():
        written = getattr(kind, "__forward_arg__", kind)
        default = f"={arguments._field_defaults[name]}" if name in arguments._field_defaults else ""
        rows.append(f"{'SymInt' if name in _SYMBOLIC else kinds.get(written, written)} {name}{default}")
    return f"({', '.join(rows)})"


def _of_tensors(arguments: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Turns a function of the tensors, in their order, into a launch, which takes all arguments. The launch is generated as
    source: calling it takes 0.05 us, making a named tuple 0.4."""
    defaults = arguments._field_defaults
    names = [f"{name}={defaults[name]!r}" if name in defaults else name for name in arguments._fields]
    tensors = [name for name, kind in arguments.__annotations__.items() if "Tensor" in str(kind)]
    made: Any = eval(f"lambda run: lambda {', '.join(names)}: run({', '.join(tensors)})")
    return made  # type: ignore[no-any-return]


forward_launch = _of_tensors(AttentionForward)
backward_launch = _of_tensors(AttentionBackward)
