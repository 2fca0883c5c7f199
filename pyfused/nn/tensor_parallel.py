"""How do the models' modules work when their weights are spread over a device mesh? Each rank computes with its own part.

The styles here are for torch.distributed.tensor.parallel.parallelize_module. They make every parameter a DTensor:

    attention       rank r of n has H / n heads: rows of the projections to queries, keys and values, columns of `output`
    feed-forward    F / n rows of `inner` (`gate` and `up`), columns of `outer`
    token table     rows of the vocabulary; lookups are summed over the ranks, logits are gathered
    all else        a copy on every rank

Inside, a module sees plain tensors: its rank's part. So every operator runs as on one device, with its fused kernels. Attention
and feed-forward network end in one sum over the ranks, forward, and one backward.

A packed projection is spread by heads: its weight (parts * H * d, D) becomes (H, parts * d, D), sharded along H, and its bias
(H, parts * d). `full_state_dict` gives the usual names and shapes back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from ..rules import its_kind
from .attention import EVERYTHING, CrossAttention, RelativeSelfAttention, SelfAttention, Visibility
from .layers import GatedMlp, Linear, Mlp, ReversibleEmbedding
from .packed_heads import by_heads, from_heads
from .quantized import QuantizedEmbedding, QuantizedLinear
from .reading import read_through


def spread(x: Tensor, mesh: Any) -> Tensor:
    """x, which is equal on all ranks. Its gradient is the sum of the ranks' gradients."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x
    return DTensor.from_local(x, mesh, (Replicate(),), run_check=False).to_local(grad_placements=(Partial(),))


def summed(y: Tensor, mesh: Any) -> Tensor:
    """The sum of the ranks' y, on every rank."""
    return _everywhere(DTensor.from_local(y, mesh, (Partial(),), run_check=False))


def gathered(y: Tensor, mesh: Any, dim: int, size: int) -> Tensor:
    """The ranks' y one behind the other along `dim`, on every rank; `size` in all."""
    shape = list(y.shape)
    shape[dim] = size
    stride = torch.empty(shape, device="meta").stride()
    return _everywhere(
        DTensor.from_local(y, mesh, (Shard(dim % y.dim()),), run_check=False, shape=torch.Size(shape), stride=stride)
    )


def _everywhere(x: DTensor) -> Tensor:
    return x.redistribute(placements=(Replicate(),)).to_local()


# ---- how a parameter is read -------------------------------------------------------------------------------------------


# fully_shard reads the parameters too, as attributes, while it holds them in pieces. They then have a second mesh dimension,
# and are given as they are. In a call of its module a parameter has the dimension of tensor parallelism alone.


def local(parameter: Any) -> Tensor:
    """This rank's part."""
    found: Tensor = parameter if parameter.device_mesh.ndim > 1 else parameter.to_local()
    return found


def local_rows(parameter: Any) -> Tensor:
    """This rank's part of a projection spread by heads: (H / n, parts * d, ...) -> (H / n * parts * d, ...)."""
    found: Tensor = parameter if parameter.device_mesh.ndim > 1 else parameter.to_local().flatten(0, 1)
    return found


def later(parameter: Any) -> Tensor | None:
    """None: a bias that every rank has is added once, behind the sum over the ranks."""
    found: Tensor | None = parameter if parameter.device_mesh.ndim > 1 else None
    return found


def _with_bias(y: Tensor, linear: Any) -> Tensor:
    """y plus the bias that the layer left out."""
    bias = linear._parameters["bias"]
    return y if bias is None else y + local(bias).to(y.dtype)


# ---- the modules -------------------------------------------------------------------------------------------------------


class _OwnHeads:
    """What the attention classes below share. num_heads counts this rank's heads."""

    mesh: Any
    num_heads: int
    head_size: int
    output: Any

    def _parts(self, projected: Tensor, count: int) -> Tensor:
        b, s, _ = projected.shape
        return projected.view(b, s, self.num_heads, count, self.head_size).transpose(2, 3)

    def _own_heads(self, visible: Visibility) -> Visibility:
        """A bias for all heads becomes one for this rank's."""
        bias, ranks = visible.attn_bias, self.mesh.size()
        if bias is None or ranks == 1 or bias.shape[1] != self.num_heads * ranks:
            return visible
        own = bias.narrow(1, self.mesh.get_local_rank() * self.num_heads, self.num_heads)
        return replace(visible, attn_bias=own)

    def _joined(self, y: Tensor, own: list[Tensor] | None, probabilities: list[Tensor] | None) -> Tensor:
        """The sum of the ranks' outputs, with the bias. Fills `probabilities`, of all heads."""
        if own and probabilities is not None:
            probabilities += [gathered(p, self.mesh, 1, self.num_heads * self.mesh.size()) for p in own]
        return _with_bias(summed(y, self.mesh), self.output)


class _OwnHeadsOfSelf(_OwnHeads):
    def forward(self, x, visible=EVERYTHING, cache=None, layer=0, probabilities=None):
        own: list[Tensor] | None = None if probabilities is None else []
        forward: Any = super().forward  # type: ignore[misc]
        y = forward(spread(x, self.mesh), self._own_heads(visible), cache, layer, own)
        return self._joined(y, own, probabilities)


class ParallelSelfAttention(_OwnHeadsOfSelf, SelfAttention):
    """SelfAttention with this rank's heads."""


class ParallelRelativeSelfAttention(_OwnHeadsOfSelf, RelativeSelfAttention):
    """RelativeSelfAttention with this rank's heads and their columns of the table."""


class ParallelCrossAttention(_OwnHeads, CrossAttention):
    """CrossAttention with this rank's heads."""

    def project(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        return super().project(spread(memory, self.mesh))

    def forward(self, x, key_value, visible=EVERYTHING, probabilities=None):
        own: list[Tensor] | None = None if probabilities is None else []
        y = super().forward(spread(x, self.mesh), key_value, self._own_heads(visible), own)
        return self._joined(y, own, probabilities)


class _OwnFeatures:
    mesh: Any
    outer: Any

    def forward(self, x, residual=None, *, wide=False):
        forward: Any = super().forward  # type: ignore[misc]
        y = _with_bias(summed(forward(spread(x, self.mesh), wide=wide), self.mesh), self.outer)
        return y if residual is None else y + residual


class ParallelMlp(_OwnFeatures, Mlp):
    """Mlp with this rank's part of F."""


class ParallelGatedMlp(_OwnFeatures, GatedMlp):
    """GatedMlp with this rank's part of F."""


class ParallelReversibleEmbedding(ReversibleEmbedding):
    """ReversibleEmbedding with this rank's rows of the vocabulary."""

    mesh: Any

    def forward(self, input: Tensor, reverse: bool = False) -> Tensor:  # type: ignore[override]
        if reverse:
            return gathered(super().forward(spread(input, self.mesh), True), self.mesh, -1, self.num_embeddings)
        table: Any = self._parameters["weight"]
        ids = DTensor.from_local(input, self.mesh, (Replicate(),), run_check=False)
        return _everywhere(F.embedding(ids, table)).to(self.weight.dtype)  # type: ignore[arg-type]


_ATTENTIONS = {
    SelfAttention: ParallelSelfAttention,
    RelativeSelfAttention: ParallelRelativeSelfAttention,
    CrossAttention: ParallelCrossAttention,
}
_FEED_FORWARDS = {Mlp: ParallelMlp, GatedMlp: ParallelGatedMlp}


# ---- the styles --------------------------------------------------------------------------------------------------------


class _Style(ParallelStyle):
    """must_divide: the model's sizes, by name, that the number of ranks must divide. Each style checks all of them, so that the
    first one refuses before anything has changed."""

    def __init__(self, must_divide: Mapping[str, int] | None = None):
        self.must_divide = dict(must_divide or {})

    def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
        if device_mesh.ndim != 1:
            raise ValueError(f"device_mesh has {device_mesh.ndim} dimensions; it takes one, such as mesh['tp']")
        ranks = device_mesh.size()
        for name, size in self.must_divide.items():
            if size % ranks:
                raise ValueError(f"{name} is {size}; tensor parallelism over {ranks} ranks takes a multiple of {ranks}")
        for m in module.modules():
            if isinstance(m, (QuantizedLinear, QuantizedEmbedding)):
                raise ValueError(
                    f"module: {its_kind(m)} in it has {m.format.name} weights; it takes floats: call unquantize_"
                )
        if any(isinstance(p, DTensor) for p in module.parameters()):
            raise ValueError(f"module: the weights of this {type(module).__name__} are spread over a mesh already")
        self._spread(module, device_mesh)
        return module

    def _spread(self, module: Any, mesh: Any) -> None:
        raise NotImplementedError

    def _distribute(
        self, module: Any, name: str, mesh: Any, placement: Placement, parts: int = 1, heads: int = 1
    ) -> None:
        """Makes a parameter a DTensor. parts, heads: of a packed projection."""
        parameter = module._parameters.get(name)
        if parameter is None:
            return
        value = parameter.detach()
        if parts > 1:
            value = by_heads(value, parts, heads).contiguous()
        found = distribute_tensor(value, mesh, (placement,), src_data_rank=self.src_data_rank)
        module._parameters[name] = nn.Parameter(found, parameter.requires_grad)

    def _columns(self, linear: Linear, mesh: Any, parts: int = 1, heads: int = 1) -> None:
        """Spreads a layer's outputs."""
        for name in ("weight", "bias"):
            self._distribute(linear, name, mesh, Shard(0), parts, heads)
        linear.__dict__["packed"] = (parts, heads)
        read_through(linear, local_rows if parts > 1 else local)

    def _rows(self, linear: Linear, mesh: Any) -> None:
        """Spreads a layer's inputs. Its results are to be summed, and its bias to be added behind that."""
        self._distribute(linear, "weight", mesh, Shard(1))
        self._distribute(linear, "bias", mesh, Replicate())
        read_through(linear, local, "weight")
        read_through(linear, later, "bias")


class HeadsParallel(_Style):
    """For SelfAttention, RelativeSelfAttention and CrossAttention: each rank has some of the heads."""

    def _spread(self, module: Any, mesh: Any) -> None:
        kind, heads = _known(module, _ATTENTIONS), module.num_heads
        if heads % mesh.size():
            raise ValueError(f"num_heads is {heads}; over {mesh.size()} ranks it takes a multiple of {mesh.size()}")
        for name, parts in module.projects:
            self._columns(getattr(module, name), mesh, parts, heads)
        self._rows(module.output, mesh)
        module.__class__, module.mesh, module.num_heads = kind, mesh, heads // mesh.size()
        if "relative_bias" in module._parameters:
            self._distribute(module, "relative_bias", mesh, Shard(1))
            read_through(module, local, "relative_bias")


class FeedForwardParallel(_Style):
    """For Mlp and GatedMlp: each rank has some of the intermediate features."""

    def _spread(self, module: Any, mesh: Any) -> None:
        kind, size = _known(module, _FEED_FORWARDS), module.outer.in_features
        if size % mesh.size():
            raise ValueError(
                f"intermediate_dim is {size}; over {mesh.size()} ranks it takes a multiple of {mesh.size()}"
            )
        for name in ("inner", "gate", "up"):
            if hasattr(module, name):
                self._columns(getattr(module, name), mesh)
        self._rows(module.outer, mesh)
        module.__class__, module.mesh = kind, mesh


class VocabularyParallel(_Style):
    """For ReversibleEmbedding: each rank has some of the vocabulary's rows. Any vocabulary can be divided."""

    def _spread(self, module: Any, mesh: Any) -> None:
        kind = _known(module, {ReversibleEmbedding: ParallelReversibleEmbedding})
        for name in module._parameters:
            self._distribute(module, name, mesh, Shard(0))
        module.__class__, module.mesh = kind, mesh
        read_through(module, local)


class Replicated(_Style):
    """For any module: each rank has a copy of its own parameters. They are DTensors like all others, because optimisers do not
    take both kinds."""

    def _spread(self, module: Any, mesh: Any) -> None:
        for name in module._parameters:
            self._distribute(module, name, mesh, Replicate())
        read_through(module, local)


def _known(module: nn.Module, kinds: Mapping[Any, Any]) -> Any:
    """The parallel form of the module's class."""
    if type(module) not in kinds:
        names = ", ".join(kind.__name__ for kind in kinds)
        changed = any(kind in kinds for kind in type(module).__mro__)
        hint = ", before a mixed dtype or fully_shard changes its class" if changed else ""
        raise TypeError(f"module is {its_kind(module)}; this style takes {names}{hint}")
    return kinds[type(module)]


def styles_of(model: nn.Module, must_divide: Mapping[str, int]) -> dict[str, ParallelStyle]:
    """The plan of a model made of pyfused's modules: {a module's name: its style}."""
    plan: dict[str, ParallelStyle] = {}
    inside = ""
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        styles = {**dict.fromkeys(_ATTENTIONS, HeadsParallel), **dict.fromkeys(_FEED_FORWARDS, FeedForwardParallel)}
        styles[ReversibleEmbedding] = VocabularyParallel
        style = next((styles[kind] for kind in type(module).__mro__ if kind in styles), Replicated)
        if style is not Replicated or module._parameters or module._buffers:
            plan[name], inside = style(must_divide), f"{name}."
    return plan


def full_state_dict(model: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """The whole tensors on the CPU, under the names and in the shapes of the same model on one device. All ranks must call it:
    they gather one tensor after the other. keep=False returns an empty dict: for the ranks that write no file."""
    found = {}
    for name, tensor in model.state_dict().items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            owner = model.get_submodule(name.rpartition(".")[0])
            found[name] = from_heads(whole, *getattr(owner, "packed", (1, 1))).cpu()
    return found
