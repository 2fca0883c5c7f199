"""What is a decoder as data? Layers of norms and matrices, in the form that the operator `decode` reads.

    x = token_embedding[tokens] + position_embedding[positions]
    for each layer:  x += attention(norm(x));  x += cross_attention(norm(x));  x += feed_forward(norm(x))
    logits = logits_scale * head(norm(x))

pyfused.generation.plans makes plans of GPT-2 and T5. A plan holds the weights' memory: it sees a later change in place, but
not a model that moved to another device or dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .weight_format import format_of


class Matrix(NamedTuple):
    """x weight^T + bias. Without a weight the layer has no such matrix."""

    weight: Tensor | None = None  # (N, K), or integers with a scale, as weight_format.py says
    bias: Tensor | None = None  # (N,)
    scale: Tensor | None = None

    @classmethod
    def of(cls, module: Any, *, by_inputs: bool = False) -> Matrix:
        """Of a linear layer or an embedding. by_inputs: the module's weight is (K, N)."""
        weight, bias, scale = (_held(module, name) for name in cls._fields)
        return cls(weight.t() if by_inputs and weight is not None else weight, bias, scale)

    def split(self, parts: int) -> list[Matrix]:
        """The matrices that lie one below the other in this one."""
        rows: list[Any] = [(None,) * parts if t is None else t.chunk(parts) for t in self]
        return [Matrix(*row) for row in zip(*rows)]


def sizes(matrix: Matrix) -> tuple[int, int]:
    """(N, K) of a matrix that exists."""
    weight = matrix.weight
    assert weight is not None
    form = format_of(matrix.scale)
    return weight.shape[0], weight.shape[1] if form is None else form.columns(weight)


class Norm(NamedTuple):
    """A layer norm, or an RMS norm, which has no bias. Without a weight the layer has no such norm."""

    weight: Tensor | None = None  # (D,)
    bias: Tensor | None = None
    eps: float = 0.0

    @classmethod
    def of(cls, module: Any) -> Norm:
        """Of a norm of torch, pyfused or transformers."""
        eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
        return cls(_held(module, "weight"), _held(module, "bias"), eps)


def _held(module: Any, name: str) -> Tensor | None:
    """The module's tensor, detached, so that the plan keeps this memory if the module gets another."""
    tensor: Tensor | None = getattr(module, name, None)
    return None if tensor is None else tensor.detach()


class DecodeLayer(NamedTuple):
    """One layer. H heads and Hkv key heads of size d."""

    attention_norm: Norm
    query: Matrix  # (H d, D)
    key: Matrix  # (Hkv d, D), as value
    value: Matrix
    output: Matrix  # (D, H d)
    feed_forward_norm: Norm
    inner: Matrix  # (F, D)
    outer: Matrix  # (D, F)
    gate: Matrix = Matrix()  # with it activation(gate(x)) * inner(x), else activation(inner(x))
    cross_norm: Norm = Norm()
    cross_query: Matrix = Matrix()  # (H d, D)
    cross_output: Matrix = Matrix()
    scale: float = 1.0  # of self-attention's scores
    cross_scale: float = 1.0


_NO_MATRIX = Matrix()
_NESTED: dict[str, Any] = {"Matrix": Matrix, "Norm": Norm}


@dataclass(eq=False, frozen=True)
class DecodePlan:
    """A decoder. All tensors but scales have one dtype and one device."""

    layers: tuple[DecodeLayer, ...]
    token_embedding: Matrix  # (V, D)
    head: Matrix  # (V, D); without it `decode` returns the final norm, (B, D), in place of logits
    final_norm: Norm
    heads: int
    kv_heads: int
    head_size: int
    is_rms: bool
    activation: str
    position_embedding: Matrix = _NO_MATRIX  # (P, D)
    logits_scale: float = 1.0
    bias_table: Tensor | None = None  # (num_buckets, H), T5's bias of a decoder
    max_distance: int = 128
    prepared: dict[str, Any] = field(default_factory=dict, init=False, repr=False)  # by backend: what it made of the plan

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles. What backends prepared holds the addresses of this plan's tensors."""
        return {**vars(self), "prepared": {}}

    @property
    def dtype_and_device(self) -> Tensor:
        """A tensor with the plan's dtype and device."""
        assert self.final_norm.weight is not None
        return self.final_norm.weight

    @property
    def hidden(self) -> int:
        """D."""
        return self.dtype_and_device.shape[0]

    @property
    def outputs(self) -> int:
        """The width of the result: V, or D without a head."""
        return self.hidden if self.head.weight is None else self.head.weight.shape[0]

    @property
    def has_cross(self) -> bool:
        """Whether the layers have cross-attention."""
        return any(layer.cross_query.weight is not None for layer in self.layers)

    def check(self) -> None:
        """Raises ValueError if tensors do not fit together: their shapes, as in a model with a pruned layer, their dtypes or
        devices. Kernels trust them."""
        own, keys, hidden = self.heads * self.head_size, self.kv_heads * self.head_size, self.hidden
        wide = next((m.weight.shape[0] for m in (layer.inner for layer in self.layers) if m.weight is not None), 0)
        sizes = {"query": (own, hidden), "key": (keys, hidden), "value": (keys, hidden), "output": (hidden, own)}
        sizes |= {"inner": (wide, hidden), "gate": (wide, hidden), "outer": (hidden, wide)}
        sizes |= {"cross_query": (own, hidden), "cross_output": (hidden, own)}
        for i, layer in enumerate(self.layers):
            for name, size in sizes.items():
                self._check_matrix(getattr(layer, name), f"{name} of layer {i}", size)
            for name in ("attention_norm", "cross_norm", "feed_forward_norm"):
                self._check_norm(getattr(layer, name), f"{name} of layer {i}")
        self._check_norm(self.final_norm, "final_norm")
        for name in ("token_embedding", "position_embedding", "head"):
            matrix = getattr(self, name)
            rows = 0 if matrix.weight is None else matrix.weight.shape[0]
            self._check_matrix(matrix, name, (rows, hidden))
        if self.position_embedding.scale is not None:
            raise ValueError("plan: position_embedding holds integers; it takes the plan's dtype")
        table = self.bias_table
        if table is not None and (table.dim() != 2 or table.shape[1] != self.heads):
            raise ValueError(f"plan: bias_table has shape {tuple(table.shape)}; it takes (num_buckets, {self.heads})")
        if table is not None:
            self._check_like(table, "bias_table", torch.float32 if table.dtype == torch.float32 else None)

    def _check_matrix(self, matrix: Matrix, name: str, size: tuple[int, int]) -> None:
        weight, bias, scale = matrix
        if weight is None:
            return
        form = format_of(scale)
        if sizes(matrix) != size:
            raise ValueError(f"plan: {name} has shape {sizes(matrix)}; it takes {size}")
        self._check_like(weight, name, None if form is None else torch.int8)
        self._check_dense(bias, f"the bias of {name}", (size[0],))
        if form is not None:
            is_truth = self.dtype_and_device.dtype == torch.float64
            dtype = torch.float64 if is_truth else form.scale_dtype
            self._check_dense(scale, f"the scale of {name}", form.scale_shape(*size), dtype)

    def _check_norm(self, norm: Norm, name: str) -> None:
        self._check_dense(norm.weight, name, (self.hidden,))
        self._check_dense(norm.bias, f"the bias of {name}", (self.hidden,))

    def _check_dense(
        self, tensor: Tensor | None, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> None:
        if tensor is None:
            return
        if tuple(tensor.shape) != shape or not tensor.is_contiguous():
            what = f"shape {tuple(tensor.shape)} and strides {tensor.stride()}"
            raise ValueError(f"plan: {name} has {what}; it takes a contiguous {shape}")
        self._check_like(tensor, name, dtype)

    def _check_like(self, tensor: Tensor, name: str, dtype: torch.dtype | None = None) -> None:
        like = self.dtype_and_device
        wanted = like.dtype if dtype is None else dtype
        if tensor.dtype != wanted or tensor.device != like.device:
            raise ValueError(f"plan: {name} is {tensor.dtype} on {tensor.device}; it takes {wanted} on {like.device}")
        if tensor.is_neg():
            raise ValueError(f"plan: {name} is a view with the other sign; it takes a copy, {name}.resolve_neg()")

    def matrices(self) -> Iterator[Matrix]:
        """All matrices of the layers and the head that exist."""
        for layer in (*self.layers, (self.head,)):
            yield from (m for m in layer if isinstance(m, Matrix) and m.weight is not None)

    def leaves(self) -> tuple[list[Tensor | None], list[float], str]:
        """Its tensors and its numbers as flat lists, and the activation: the form that torch.library takes."""
        tensors: list[Tensor | None] = []
        numbers: list[float] = []
        _flatten([getattr(self, f.name) for f in fields(self) if f.init], tensors, numbers)
        return tensors, numbers, self.activation

    @classmethod
    def of_leaves(cls, tensors: list[Tensor | None], numbers: list[float], activation: str) -> DecodePlan:
        """The inverse of leaves()."""
        rest, figures = iter(tensors), iter(numbers)
        values: dict[str, Any] = {}
        for f in fields(cls):
            if f.name == "layers":
                values[f.name] = tuple(_rebuilt(DecodeLayer, rest, figures) for _ in range(int(next(figures))))
            elif f.name == "activation":
                values[f.name] = activation
            elif f.init:
                values[f.name] = _leaf(f.type, rest, figures)
        return cls(**values)


def _flatten(value: Any, tensors: list[Tensor | None], numbers: list[float]) -> None:
    if value is None or isinstance(value, Tensor):
        tensors.append(value)
    elif isinstance(value, (list, tuple)):
        if type(value) is tuple:
            numbers.append(len(value))
        for item in value:
            _flatten(item, tensors, numbers)
    elif not isinstance(value, str):
        numbers.append(float(value))


def _leaf(kind: Any, tensors: Iterator[Tensor | None], numbers: Iterator[float]) -> Any:
    if kind in _NESTED:
        return _rebuilt(_NESTED[kind], tensors, numbers)
    if kind == "Tensor | None":
        return next(tensors)
    return {"int": int, "bool": bool, "float": float}[kind](next(numbers))


def _rebuilt(kind: Any, tensors: Iterator[Tensor | None], numbers: Iterator[float]) -> Any:
    kinds = (getattr(k, "__forward_arg__", k) for k in kind.__annotations__.values())
    return kind(*[_leaf(k, tensors, numbers) for k in kinds])


class DecodeStep(NamedTuple):
    """One call. B rows get one token each; row b writes its key and value at its place and sees the places up to it."""

    tokens: Tensor  # (B,) int64
    places: Tensor | None  # (B,) int64; None: `place` for all rows
    position_ids: Tensor | None  # (B,) int64; None: the places
    mask: Tensor | None  # (B, >= most) bool, True for a visible key
    place: int
    most: int  # the largest place + 1
    caches: list[Tensor]  # each layer's keys, then its values, (B, Hkv, capacity, d)
    cross: list[Tensor]  # the same of the encoder, (sources, H, Se, d); B / sources rows share a source
    cross_mask: Tensor | None  # (sources, Se) bool
    choose: bool  # whether to return the likeliest tokens too
    uniform: Tensor | None = None  # (B,) float64 in [0, 1): `choose` draws with these, in place of the likeliest tokens
    temperature: float = 1.0  # of the draw, as top_k and top_p; kernels/shared/draw.py says what they mean
    top_k: int = 0
    top_p: float = 1.0
