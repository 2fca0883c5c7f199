"""Which modules does a transformer have beside attention? Norms, Linear, the models' feed-forward networks, Fourier mixing
and embeddings."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..activations import ACTIVATIONS, canonical
from ..ops import ffn, fourier_mix, gated_ffn, layer_norm, linear, rms_norm
from ..ops.activation import activated
from ..ops.rms_norm import default_eps
from ..own_forward import is_bare
from .quantized import QuantizedLinear
from .wide import wide_norm, wide_product


class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm, its constructor and its state dict, plus a residual that is added in the same pass."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Any:
        """input (..., *normalized_shape) -> the same shape; with `residual`, of input's shape, the pair (norm(input +
        residual), input + residual). A float16 module also takes a float32 input (nn/wide.py) and then returns a float16 norm
        and a float32 sum. Raises as pyfused.layer_norm does."""
        weight, bias = self.weight, self.bias
        if weight is not None and weight.dim() == 1:
            if weight.dtype == torch.float16 and input.dtype == torch.float32:
                wide_bias = None if bias is None else bias.float()
                return wide_norm(partial(layer_norm, weight=weight.float(), bias=wide_bias, eps=self.eps), input, residual)
            return layer_norm(input, weight, bias, eps=self.eps, residual=residual)
        return _general(partial(layer_norm, eps=self.eps), self.normalized_shape, input, residual, weight, bias)


class RMSNorm(nn.RMSNorm):
    """torch.nn.RMSNorm, its constructor and its state dict, plus a residual that is added in the same pass."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Any:
        """input (..., *normalized_shape) -> the same shape; with `residual`, of input's shape, the pair (norm(input +
        residual), input + residual). A float16 module takes a float32 input as in LayerNorm. Raises as pyfused.rms_norm
        does."""
        eps = default_eps(input.dtype) if self.eps is None else self.eps
        weight: Tensor | None = self.weight
        if weight is not None and weight.dim() == 1:
            if weight.dtype == torch.float16 and input.dtype == torch.float32:
                return wide_norm(partial(rms_norm, weight=weight.float(), eps=eps), input, residual)
            return rms_norm(input, weight, eps=eps, residual=residual)
        return _general(partial(rms_norm, eps=eps), self.normalized_shape, input, residual, weight)


def _general(
    norm: Any, shape: tuple[int, ...], input: Tensor, residual: Tensor | None, *parameters: Tensor | None
) -> Any:
    """The norm of a module without weight, or over several dimensions. The operator `norm` takes a weight and one dimension.
    parameters: weight, then bias where the norm has one."""
    dims = len(shape)
    if tuple(input.shape[-dims:]) != tuple(shape):
        raise ValueError(f"input has shape {tuple(input.shape)}; it takes (..., {shape})")
    if residual is not None and residual.shape != input.shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)}; it takes input's, {tuple(input.shape)}")
    flat = input.flatten(-dims)
    weight, *bias = [None if p is None else p.flatten() for p in parameters]
    weight = flat.new_ones(flat.shape[-1]) if weight is None else weight
    out: Any = norm(flat, weight, *bias, residual=None if residual is None else residual.flatten(-dims))
    if residual is None:
        return out.view(input.shape)
    return out[0].view(input.shape), out[1].view(input.shape)


class Linear(nn.Linear):
    """torch.nn.Linear, its constructor and its state dict, plus a residual that is added in the same pass."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """input (..., in_features), residual (..., out_features) or None -> (..., out_features)."""
        return linear(input, self.weight, self.bias, residual=residual)


def dropped(x: Tensor, rate: float) -> Tensor:
    """Dropout, or x itself if the rate is 0."""
    return F.dropout(x, rate) if rate else x


def must_be_called(*layers: nn.Module) -> bool:
    """Whether one of these layers computes more than its weight and bias say: it has hooks, is quantised, or was replaced,
    as LoRA does. The operators of several products read weights, so layers are called one by one then."""
    for layer in layers:
        forward = layer.__class__.forward
        if forward is not Linear.forward and forward is not nn.Linear.forward:
            return True
    return not is_bare(*layers)


def _call(outer: Any, hidden: Tensor, residual: Tensor | None) -> Tensor:
    """outer(hidden) + residual. pyfused's own layers add it themselves, but a hook is to see what the layer alone gives."""
    found: Tensor
    if residual is None:
        found = outer(hidden)
    elif outer.__class__.forward in (Linear.forward, QuantizedLinear.forward) and is_bare(outer):
        found = outer(hidden, residual)
    else:
        found = outer(hidden) + residual
    return found


def wide_call(outer: Any, hidden: Tensor, residual: Tensor | None) -> Tensor:
    """outer(hidden) + residual in float32 for a float16 layer, quantised or not."""
    if isinstance(outer, QuantizedLinear):
        return outer.wide(hidden, residual)
    if must_be_called(outer):
        found: Tensor = outer(hidden.half()).float()
        return found if residual is None else found + residual
    return wide_product(hidden, outer.weight, outer.bias, residual)


def feed_forward(
    x: Tensor, inner: Any, outer: Any, activation: str, dropout: float, residual: Tensor | None = None
) -> Tensor:
    """outer(dropout(activation(inner(x)))) + residual. It is one operator without dropout, where both layers are plain."""
    if must_be_called(inner, outer):
        return _call(outer, dropped(activated(inner(x), activation), dropout), residual)
    if dropout:
        hidden = F.dropout(ACTIVATIONS[activation].function(linear(x, inner.weight, inner.bias)), dropout)
        return linear(hidden, outer.weight, outer.bias, residual=residual)
    return ffn(x, inner.weight, inner.bias, outer.weight, outer.bias, activation=activation, residual=residual)


def gated_feed_forward(
    x: Tensor, gate: Any, up: Any, outer: Any, activation: str, dropout: float, residual: Tensor | None = None
) -> Tensor:
    """outer(dropout(activation(gate(x)) * up(x))) + residual, without biases. It is one operator without dropout,
    where all layers are plain."""
    if must_be_called(gate, up, outer):
        hidden = dropped(activated(gate(x), activation, up(x)), dropout)
        if x.dtype == torch.float16:  # hidden is float32
            return wide_call(outer, hidden, residual).to(x.dtype)
        return _call(outer, hidden, residual)
    if dropout:
        hidden = ACTIVATIONS[activation].function(linear(x, gate.weight)) * linear(x, up.weight)
        return linear(F.dropout(hidden, dropout), outer.weight, residual=residual)
    return gated_ffn(x, gate.weight, up.weight, outer.weight, activation=activation, residual=residual)


class Mlp(nn.Module):
    """outer(activation(inner(x))), the position-wise feed-forward network of Vaswani et al. 2017, in one operator. pyfused's
    models use this class and its parameter names; FeedForward has transformers'.

    Args:
        hidden_dim, intermediate_dim: N and F; the parameters are inner.{weight (F, N), bias (F,)} and
            outer.{weight (N, F), bias (N,)}.
        activation: "relu", "silu", "tanh", "gelu" (exact), "gelu_tanh" (alias "gelu_new") or "quick_gelu".
        dropout: of the activation's output, in training; it then takes three operators.

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
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.activation, self.dropout = canonical(activation), dropout
        self.inner = Linear(hidden_dim, intermediate_dim, bias, device=device, dtype=dtype)
        self.outer = Linear(intermediate_dim, hidden_dim, bias, device=device, dtype=dtype)

    def forward(self, x: Tensor, residual: Tensor | None = None, *, wide: bool = False) -> Tensor:
        """x (..., N), residual (..., N) or None -> (..., N). With `wide`, a float16 module returns float32, because float16
        may not hold the result."""
        dropout = self.dropout if self.training else 0.0
        if not wide:
            return feed_forward(x, self.inner, self.outer, self.activation, dropout, residual)
        hidden = activated(self.inner(x).float(), self.activation)
        return wide_call(self.outer, dropped(hidden, dropout), residual)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}" + (f", dropout={self.dropout}" if self.dropout else "")


class GatedMlp(nn.Module):
    """outer(activation(gate(x)) * up(x)), the gated feed-forward network of Shazeer 2020 (arXiv:2002.05202), in one
    operator. pyfused's models use this class; GatedFeedForward has transformers' parameter names.

    Args:
        hidden_dim, intermediate_dim: N and F; the parameters are gate.weight (F, N), up.weight (F, N) and
            outer.weight (N, F).
        activation, dropout: as Mlp's.

    Raises:
        ValueError: an unknown activation.
    """

    def __init__(
        self,
        hidden_dim: int,
        intermediate_dim: int,
        activation: str = "gelu_tanh",
        *,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.activation, self.dropout = canonical(activation), dropout
        self.gate = Linear(hidden_dim, intermediate_dim, False, device=device, dtype=dtype)
        self.up = Linear(hidden_dim, intermediate_dim, False, device=device, dtype=dtype)
        self.outer = Linear(intermediate_dim, hidden_dim, False, device=device, dtype=dtype)

    def forward(self, x: Tensor, residual: Tensor | None = None, *, wide: bool = False) -> Tensor:
        """As Mlp's."""
        dropout = self.dropout if self.training else 0.0
        if not wide:
            return gated_feed_forward(x, self.gate, self.up, self.outer, self.activation, dropout, residual)
        hidden = activated(self.gate(x), self.activation, self.up(x)).float()
        return wide_call(self.outer, dropped(hidden, dropout), residual)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}" + (f", dropout={self.dropout}" if self.dropout else "")


class FourierMixing(nn.Module):
    """FNet's token mixing (Lee-Thorp et al. 2021, arXiv:2105.03824). It has no parameters.

    It replaces transformers' FNetBasicFourierTransform, whose forward returns a tuple of one tensor; this one returns the
    tensor.

    Args:
        config: transformers' FNetConfig, or None. Only the refused option is read.

    Raises:
        ValueError: config.use_tpu_fourier_optimizations, which uses matrices of tpu_short_seq_length rows.
    """

    def __init__(self, config: Any = None):
        super().__init__()
        if getattr(config, "use_tpu_fourier_optimizations", False):
            raise ValueError(
                "config.use_tpu_fourier_optimizations is True; it takes False: the kernels have no TPU form"
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, N) -> (B, S, N): the real part of the Fourier transform over both. Raises as pyfused.fourier_mix does."""
        return fourier_mix(x)


class Embedding(nn.Embedding):
    """torch.nn.Embedding, its constructor and its state dict. Without max_norm it does not read norm_type, so a compiled
    program does not guard on it: that saves two Python functions per embedding."""

    def forward(self, input: Tensor) -> Tensor:
        """ids (...) -> (..., D)."""
        if self.max_norm is not None:
            return super().forward(input)
        return F.embedding(
            input, self.weight, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq, sparse=self.sparse
        )


class ReversibleEmbedding(Embedding):
    """Embedding that also projects back to the vocabulary, as KerasHub's layer of this name does.

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

    def forward(self, input: Tensor, reverse: bool = False) -> Tensor:  # type: ignore[override]
        """ids (...) -> (..., D); with reverse=True, hidden states (..., D) -> logits (..., V)."""
        if not reverse:
            return super().forward(input)
        return linear(input, self.weight if self.tie_weights else self.reverse_weight)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.tie_weights else ", tie_weights=False")
