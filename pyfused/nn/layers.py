"""Which modules is a transformer made of, beside attention? LayerNorm, Linear, FeedForward, ReversibleEmbedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops import ffn, layer_norm, linear
from ..ops.ffn import canonical_activation


class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm, its constructor and its state dict, plus a residual that is added in the same pass."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Any:
        """input (..., *normalized_shape) -> the same shape; with `residual`, of input's shape, the pair (norm(input +
        residual), input + residual). Raises as pyfused.layer_norm does."""
        weight, bias = self.weight, self.bias
        if weight is not None and len(self.normalized_shape) == 1:
            return layer_norm(input, weight, bias, eps=self.eps, residual=residual)
        return self._general(input, weight, bias, residual)

    def _general(self, input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> Any:
        """No weight, or several normalised dimensions: the operator takes a weight and one dimension."""
        dims = len(self.normalized_shape)
        if tuple(input.shape[-dims:]) != tuple(self.normalized_shape):
            raise ValueError(f"input has shape {tuple(input.shape)}; it takes (..., {self.normalized_shape})")
        if residual is not None and residual.shape != input.shape:
            raise ValueError(f"residual has shape {tuple(residual.shape)}; it takes input's, {tuple(input.shape)}")
        flat = input.flatten(-dims)
        weight = flat.new_ones(flat.shape[-1]) if weight is None else weight.flatten()
        bias = None if bias is None else bias.flatten()
        flat_residual = None if residual is None else residual.flatten(-dims)
        out: Any = layer_norm(flat, weight, bias, eps=self.eps, residual=flat_residual)
        if residual is None:
            return out.view(input.shape)
        return out[0].view(input.shape), out[1].view(input.shape)


class Linear(nn.Linear):
    """torch.nn.Linear, its constructor and its state dict, plus a residual that is added in the same pass."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """input (..., in_features), residual (..., out_features) or None -> (..., out_features)."""
        return linear(input, self.weight, self.bias, residual=residual)


class FeedForward(nn.Module):
    """outer(activation(inner(x))), the position-wise feed-forward network of Vaswani et al. 2017, in one operator.

    Args:
        hidden_dim, intermediate_dim: N and F; the parameters are inner.{weight (F, N), bias (F,)} and
            outer.{weight (N, F), bias (N,)}.
        activation: "relu", "silu", "tanh", "gelu" (exact) or "gelu_tanh" (alias "gelu_new").

    Raises:
        ValueError: an activation that is none of these.
    """

    def __init__(
        self,
        hidden_dim: int,
        intermediate_dim: int,
        activation: str = "gelu_tanh",
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.activation = canonical_activation(activation)
        self.inner = Linear(hidden_dim, intermediate_dim, bias, device=device, dtype=dtype)
        self.outer = Linear(intermediate_dim, hidden_dim, bias, device=device, dtype=dtype)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x (..., N), residual (..., N) or None -> (..., N)."""
        i, o = self.inner, self.outer
        return ffn(x, i.weight, i.bias, o.weight, o.bias, activation=self.activation, residual=residual)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


class ReversibleEmbedding(nn.Embedding):
    """torch.nn.Embedding that also projects back to the vocabulary, as KerasHub's layer of this name does.

    Args:
        vocabulary_size, hidden_dim: V and D; the parameter is weight (V, D).
        tie_weights: False gives the projection a matrix of its own, reverse_weight (V, D).
    """

    def __init__(
        self,
        vocabulary_size: int,
        hidden_dim: int,
        tie_weights: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(vocabulary_size, hidden_dim, device=device, dtype=dtype)
        self.tie_weights = tie_weights
        if not tie_weights:
            self.reverse_weight = nn.Parameter(torch.empty_like(self.weight).normal_())

    def forward(self, input: Tensor, reverse: bool = False) -> Tensor:
        """ids (...) -> (..., D); with reverse=True, hidden states (..., D) -> logits (..., V)."""
        if not reverse:
            return super().forward(input)
        return linear(input, self.weight if self.tie_weights else self.reverse_weight)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.tie_weights else ", tie_weights=False")
