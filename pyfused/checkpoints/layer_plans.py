"""How does each format store the layers that several families have? Parts of a plan, for one layer each.

A linear map is stored by Hugging Face as nn.Linear does, by Keras as (in, out), or with its heads as one more dimension.
Hugging Face's names end in .weight and .bias, Keras's in vars/0 and vars/1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyfused.checkpoints.plan import Piece, Plan, Target, transposed, whole


def embeddings(config: Mapping[str, Any], names: Mapping[str, str]) -> Plan:
    """ALBERT's and FNet's three tables. names: what each, "token", "position" and "segment", is called in the file."""
    width = config.get("embedding_dim", config["hidden_dim"])
    rows = {"token": "vocabulary_size", "position": "max_sequence_length", "segment": "num_segments"}
    return {f"{kind}_embedding.weight": whole((config[rows[kind]], width), name) for kind, name in names.items()}


def hf_norm(ours: str, theirs: str, size: int) -> Plan:
    """A layer norm of `size` features in Hugging Face's format. ours, theirs: the layer's name in pyfused and in the file."""
    return {f"{ours}.{kind}": whole((size,), f"{theirs}.{kind}") for kind in ("weight", "bias")}


def hf_linear(ours: str, theirs: str, out: int, into: int) -> Plan:
    """A linear map in Hugging Face's format: (out, into), as pyfused stores it."""
    return {f"{ours}.weight": whole((out, into), f"{theirs}.weight"), f"{ours}.bias": whole((out,), f"{theirs}.bias")}


def keras_norm(ours: str, theirs: str, size: int) -> Plan:
    """A layer norm of `size` features in Keras's format."""
    return {f"{ours}.{kind}": whole((size,), f"{theirs}/vars/{i}") for i, kind in enumerate(("weight", "bias"))}


def keras_linear(ours: str, theirs: str, out: int, into: int, stored: tuple[int, ...] | None = None) -> Plan:
    """A linear map in Keras's format: (into, out). stored: its shape in the file, if one side is split into dimensions."""
    return {
        f"{ours}.weight": transposed((out, into), f"{theirs}/vars/0", stored),
        f"{ours}.bias": whole((out,), f"{theirs}/vars/1"),
    }


def keras_attention(ours: str, theirs: str, width: int, heads: int) -> Plan:
    """Self-attention. pyfused has one matrix for query, key and value. heads * size may be less than the width."""
    size = width // heads
    parts = [f"{theirs}/{part}_dense/vars" for part in ("query", "key", "value")]
    weights = tuple(Piece(f"{part}/0", (width, heads, size), True) for part in parts)
    biases = tuple(Piece(f"{part}/1", (heads, size)) for part in parts)
    return {
        f"{ours}.query_key_value.weight": Target((3 * heads * size, width), weights),
        f"{ours}.query_key_value.bias": Target((3 * heads * size,), biases),
        **keras_linear(f"{ours}.output", f"{theirs}/output_dense", width, heads * size, (heads, size, width)),
    }
