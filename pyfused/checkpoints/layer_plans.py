"""Which tensors does a family have, and where does each format store them? A family names a layer once, for both formats.

Hugging Face stores a linear map as nn.Linear does, but GPT-2's as (in, out). Keras stores it as (in, out), or with its heads as
one more dimension. Hugging Face's names end in .weight and .bias, Keras's in vars/0 and vars/1.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from pyfused.checkpoints.plan import Piece, Plan, Target, whole

ONLY_HF = ""  # Keras's name of a layer that its model does not have


class Tensors:
    """A plan in the making. The methods add a layer: its name in pyfused, in Hugging Face's and in Keras's format, its sizes.

    is_keras: the format. hf_by_inputs: whether Hugging Face stores linear maps as (in, out).
    """

    def __init__(self, is_keras: bool):
        self.plan: Plan = {}
        self.is_keras = is_keras
        self.hf_by_inputs = False
        self._ours = self._theirs = ""

    def inside(self, ours: str, hf: str, keras: str) -> Tensors:
        """Adds to the same plan. All names given to it lie inside these."""
        found = copy.copy(self)
        found._ours, found._theirs = f"{self._ours}{ours}.", f"{self._name(hf, keras)}{'/' if self.is_keras else '.'}"
        return found

    def _name(self, hf: str, keras: str) -> str:
        return self._theirs + (keras if self.is_keras else hf)

    def whole(self, ours: str, hf: str, keras: str, *shape: int) -> None:
        """One tensor, which both store as pyfused does."""
        self.plan[self._ours + ours] = whole(shape, self._name(hf, keras))

    def norm(self, ours: str, hf: str, keras: str, size: int, *, bias: bool = True) -> None:
        """A norm of `size` features."""
        for i, kind in enumerate(("weight", "bias") if bias else ("weight",)):
            self.whole(f"{ours}.{kind}", f"{hf}.{kind}", f"{keras}/vars/{i}", size)

    def linear(self, ours: str, hf: str, keras: str, out: int, into: int, *, bias: bool = True) -> None:
        """A linear map from `into` to `out` features."""
        self.stacked(ours, [hf], [keras], out, into, bias=bias)

    def stacked(
        self, ours: str, hf: Sequence[str], keras: Sequence[str], out: int, into: int, *, bias: bool = True
    ) -> None:
        """Several linear maps of the same features, which are one in pyfused: the rows of the first, then of the next."""
        names = [self._name(*pair) for pair in zip(hf, keras)]
        weight, of_bias = ("/vars/0", "/vars/1") if self.is_keras else (".weight", ".bias")
        transposed = self.is_keras or self.hf_by_inputs
        shape = (into, out) if transposed else (out, into)
        rows, place = len(names) * out, self._ours + ours
        pieces = tuple(Piece(name + weight, shape, transposed) for name in names)
        self.plan[f"{place}.weight"] = Target((rows, into), pieces)
        if bias:
            self.plan[f"{place}.bias"] = Target((rows,), tuple(Piece(name + of_bias, (out,)) for name in names))

    def attention(self, hf: Sequence[str], output: str, keras: str, width: int, heads: int) -> None:
        """GPT-2's and ALBERT's self-attention. hf, output: the projections in Hugging Face's format. heads * size may be less
        than the width."""
        size = width // heads
        inner, place = heads * size, f"{self._ours}attention"
        if not self.is_keras:
            self.stacked("attention.query_key_value", hf, [keras] * len(hf), 3 * inner // len(hf), width)
            self.linear("attention.output", output, keras, width, inner)
            return
        parts = [f"{self._theirs}{keras}/{part}_dense/vars" for part in ("query", "key", "value")]
        weights = tuple(Piece(f"{part}/0", (width, heads, size), True) for part in parts)
        biases = tuple(Piece(f"{part}/1", (heads, size)) for part in parts)
        self.plan[f"{place}.query_key_value.weight"] = Target((3 * inner, width), weights)
        self.plan[f"{place}.query_key_value.bias"] = Target((3 * inner,), biases)
        last = Piece(f"{self._theirs}{keras}/output_dense/vars/0", (heads, size, width), True)
        self.plan[f"{place}.output.weight"] = Target((width, inner), (last,))
        self.whole("attention.output.bias", "", f"{keras}/output_dense/vars/1", width)

    def embeddings(self, config: Mapping[str, Any]) -> None:
        """ALBERT's and FNet's three tables."""
        width = config.get("embedding_dim", config["hidden_dim"])
        for ours, hf, keras, rows in (
            ("token", "word", "reversible_embedding", "vocabulary_size"),
            ("position", "position", "position_embedding", "max_sequence_length"),
            ("segment", "token_type", "embedding", "num_segments"),
        ):
            theirs = f"embeddings.{hf}_embeddings.weight"
            self.whole(f"{ours}_embedding.weight", theirs, f"layers/{keras}/vars/0", config[rows], width)


def hf_plan(family: Any, config: dict[str, Any]) -> Plan:
    """pyfused's names from Hugging Face's, without the prefix of models with a head. family: its module, such as `gpt2`."""
    return _plan(family, config, is_keras=False)


def keras_plan(family: Any, config: dict[str, Any]) -> Plan:
    """pyfused's names from h5 paths."""
    return _plan(family, config, is_keras=True)


def _plan(family: Any, config: dict[str, Any], is_keras: bool) -> Plan:
    tensors = Tensors(is_keras)
    family.name_tensors(tensors, config)
    return tensors.plan


def numbered(name: str, count: int) -> str:
    """Keras's name of a layer: the first has no number."""
    return f"{name}_{count}" if count else name
