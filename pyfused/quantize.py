"""How does an existing model get integer weights? quantize_ gives its linear layers and token tables another class, in place.

The modules stay the same objects: names, hooks, training flags, biases and other attributes remain, and whoever holds a module
holds the quantised one. unquantize_ gives the class back. Modules that shared one weight share one copy of the integers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .nn import Embedding, Linear, QuantizedEmbedding, QuantizedLinear, ReversibleEmbedding
from .nn.quantized import Scheme
from .own_forward import Entry, check_module, checked_filter, has_another_forward, summary
from .spread import has_spread_weights
from .weight_format import FORMATS, INT8, WeightFormat

_CONV1D = "transformers.pytorch_utils.Conv1D"  # by name, so that transformers is not imported
_LINEARS = {f"{c.__module__}.{c.__qualname__}" for c in (nn.Linear, Linear)} | {_CONV1D}
_TABLES = {f"{c.__module__}.{c.__qualname__}" for c in (nn.Embedding, Embedding, ReversibleEmbedding)}
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_QUANTIZED = (QuantizedLinear, QuantizedEmbedding)
# Their forwards read the weights of their children.
_READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


class Original(NamedTuple):
    """What unquantize_ restores: the module's class, and whether its weight wanted gradients."""

    kind: type
    requires_grad: bool


@dataclass(frozen=True)
class QuantizeReport:
    """What quantize_ did; print() it. Modules in `replaced` now have integer weights; their notes say of which format, and why
    if it is not the one that was asked for. Those in `left` do not; their notes say why.

    bytes_before, bytes_after: of the model's parameters and buffers, each counted once.
    """

    replaced: tuple[Entry, ...]
    left: tuple[Entry, ...]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        size = f"bytes: {self.bytes_before:,} before, {self.bytes_after:,} after"
        return f"{summary(self.replaced, self.left)}\n{size}"


class _Found(NamedTuple):
    """A layer that may be quantised, or the reason why it may not."""

    name: str
    module: Any
    reason: str


def quantize_(
    model: nn.Module,
    scheme: str = "int8",
    *,
    dynamic: bool = False,
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
) -> QuantizeReport:
    """Stores a model's weights as integers, in place: nn.Linear, transformers' Conv1D, and tables of token embeddings.

    int8: each output has one scale, max|w| / 127. int4: each 32 values of a row have one scale, the one of several candidates
    with the least squared error. A weight takes 4.5 bits. With int4 some layers become int8: token tables, heads, which
    project to the vocabulary, and layers whose K is no multiple of 32. Sums are in float32. It takes pyfused's backbones
    and any model, fused or not. Modules that share a weight, such as a token table and the head, share one copy of the
    integers. Integers get no gradients; biases, norms and inputs do.

    Args:
        model: any module. Layers that are already quantised stay as they are.
        scheme: "int8" or "int4".
        dynamic: lets products of many rows round the rows to int8 too; see pyfused.linear. Only with "int8".
        filter_fn: takes (name in the model, module) and returns whether to quantise it. It is called for every module that
            could be quantised.

    Returns:
        The modules that were replaced, those that were not, with the reasons, and the bytes before and after.

    Raises:
        TypeError: an argument of a wrong type. ValueError: an unknown scheme, a model spread over a mesh.
    """
    check_module(model)
    wanted = Scheme(scheme, dynamic)
    wanted.check()
    chosen = checked_filter(filter_fn)
    if has_spread_weights(model):
        raise ValueError(f"model: its weights are spread over a mesh; {scheme} takes a model on one device")
    before = _bytes(model)
    heads = _heads(model)
    replaced, left = [], []
    for group in _groups(model, chosen):
        reason = _together(group)
        notes = [found.reason or reason for found in group]
        kinds = [type(found.module).__name__ for found in group]
        if not any(notes):
            modules = [found.module for found in group]
            why = "" if scheme == "int8" else _why_int8(modules, scheme, heads)
            _replace(modules, Scheme("int8") if why else wanted)
            notes = [
                _note(found.module) + why + (f", shared with {group[0].name}" if i else "")
                for i, found in enumerate(group)
            ]
            replaced += [Entry(found.name, kind, note) for found, kind, note in zip(group, kinds, notes)]
        else:
            left += [Entry(found.name, kind, note) for found, kind, note in zip(group, kinds, notes)]
    return QuantizeReport(tuple(replaced), tuple(left), before, _bytes(model))


def quantize_all_(model: nn.Module, scheme: str, name: str) -> None:
    """quantize_ for a caller who shows no report. name: of the option that holds the scheme. Raises ValueError for a pyfused
    model that has integers of another format and nothing to quantise."""
    if quantize_(model, scheme).replaced:
        return
    heads = {id(module._modules.get("reverse")) for module in model.modules()}
    for module in model.modules():
        if isinstance(module, QuantizedLinear) and id(module) not in heads:
            form, wanted = module.format, FORMATS[scheme]
            if form is not wanted and not wanted.misfit(form.columns(module.weight)):
                back = "pyfused.unquantize_ undoes that"
                raise ValueError(f"{name} is {scheme!r}, and the model has {form.name} weights already; {back}")


def unquantize_(model: nn.Module) -> nn.Module:
    """Undoes quantize_: gives the modules their classes back, with the weights that the integers stand for. What rounding took
    does not come back. The dtype is the module's, the original one unless the model was cast since.

    Returns:
        The model itself.

    Raises:
        TypeError: model is not a torch.nn.Module.
    """
    check_module(model)
    shared: dict[int, nn.Parameter] = {}
    for module in list(model.modules()):
        if isinstance(module, _QUANTIZED):
            _restore(module, shared)
    return model


def format_for(module: nn.Module, scheme: str) -> WeightFormat:
    """The format that quantize_ gives a layer of a pyfused model."""
    return INT8 if scheme == "int8" or _why_int8([module], scheme, set()) else FORMATS[scheme]


def hold_integers_(model: nn.Module, modules: Mapping[str, Scheme]) -> None:
    """Gives the named modules of a model on the meta device integer weights, which a checkpoint then fills.

    modules: name -> scheme, of every quantised module. Raises ValueError for a module that cannot hold such weights.
    """
    held = dict(model.named_modules())
    heads = {f"{name}.reverse" for name in modules}  # made with their tables
    for name, scheme in modules.items():
        if name not in heads:
            module = held.get(name)
            if module is None or _kind(module) not in _LINEARS | _TABLES:
                raise ValueError(f"{name!r} is no linear layer or token table of this {type(model).__name__}")
            if scheme.name != "int8" and (why := _why_int8([module], scheme.name, set())):
                raise ValueError(f"{name!r} cannot be {scheme.name}{why}")
            _replace([module], scheme)


# ---- which modules ----------------------------------------------------------------------------------------------------


def _groups(model: nn.Module, wanted: Callable[[str, nn.Module], bool]) -> list[list[_Found]]:
    """The layers of the model, those that share a weight together."""
    owners: dict[int, list[str]] = {}
    parents: dict[int, nn.Module] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{name}.{key}" if name else key)
        parents |= {id(child): module for child in module.children() if isinstance(module, _READERS)}
    tables = _token_tables(model)
    groups: dict[int, list[_Found]] = {}
    for name, module in model.named_modules():
        kind = _kind(module)
        if kind:
            reason = _reason(module, kind, parents.get(id(module)), tables)
            reason = reason or ("" if wanted(name, module) else "filter_fn says no")
            weight = module._parameters.get("weight")
            groups.setdefault(id(module if weight is None else weight), []).append(_Found(name, module, reason))
    for key, group in groups.items():
        others = set(owners.get(key, ())) - {f"{found.name}.weight" if found.name else "weight" for found in group}
        if others:
            reason = f"its weight is {' and '.join(sorted(others))} too"
            groups[key] = [found._replace(reason=found.reason or reason) for found in group]
    return list(groups.values())


def _kind(module: nn.Module) -> str:
    """The full name of the class that makes this a layer which could be quantised; "" if there is none."""
    if isinstance(module, _QUANTIZED):
        return "quantised"
    names = (f"{base.__module__}.{base.__qualname__}" for base in type(module).__mro__)
    return next((name for name in names if name in _LINEARS or name in _TABLES), "")


def _token_tables(model: nn.Module) -> set[int]:
    """The ids of the parameters that embed tokens: the models' own input embeddings, and weights that a linear layer shares.
    Tables of positions or of a relative bias are small, and some are read directly."""
    shared = [m for m in model.modules() if isinstance(m, ReversibleEmbedding) or _kind(m) in _LINEARS]
    return {id(module._parameters.get("weight")) for module in (*shared, *_told_by(model, "get_input_embeddings"))}


def _heads(model: nn.Module) -> set[int]:
    """The ids of the models' output embeddings, as transformers' models name them."""
    return {id(module) for module in _told_by(model, "get_output_embeddings")}


def _told_by(model: nn.Module, getter: str) -> Iterator[nn.Module]:
    """The modules that this method of the model's modules returns."""
    for module in model.modules():
        found = None
        if callable(method := getattr(module, getter, None)):
            with suppress(NotImplementedError, AttributeError):
                found = method()
        if isinstance(found, nn.Module):
            yield found


def _why_int8(modules: list[Any], scheme: str, heads: set[int]) -> str:
    """Why modules that share a weight are int8 in place of the scheme; "" if they are not."""
    if any(isinstance(m, nn.Embedding) or id(m) in heads for m in modules):
        return ": tables of tokens and heads are"
    n, k = modules[0].weight.shape
    misfit = FORMATS[scheme].misfit(n if _kind(modules[0]) == _CONV1D else k)
    return misfit and f": {misfit}"


def _reason(module: Any, kind: str, reader: nn.Module | None, tables: set[int]) -> str:
    """Why a layer must stay as it is; "" if it may be quantised."""
    if kind == "quantised":
        return "is quantised already"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed at every call"
    if module.weight is not weight:
        return "reads its weight in another dtype (a mixed policy)"
    cls = type(module)
    if f"{cls.__module__}.{cls.__qualname__}" != kind:
        return f"its class is {cls.__name__}, which may compute something else than {kind.rpartition('.')[2]}"
    if reader is not None:
        return f"{type(reader).__name__} reads its weight directly"
    if has_another_forward(module):
        return "this instance has a forward of its own already"
    if kind in _TABLES and id(weight) not in tables:
        return "only tables of tokens are quantised"
    if getattr(module, "max_norm", None) is not None:
        return "max_norm changes its table"
    if module._buffers:
        return f"has the buffers {', '.join(module._buffers)}"
    for parameter in module._parameters.values():
        if reason := "" if parameter is None else _unfit(parameter):
            return reason
    return ""


def _unfit(parameter: Tensor) -> str:
    if type(parameter) is not nn.Parameter:
        return f"has a parameter of class {type(parameter).__name__}, such as sharded models have"
    if parameter.dtype not in _DTYPES:
        return f"is {str(parameter.dtype).removeprefix('torch.')}; integers replace float32, float16 and bfloat16"
    if parameter.is_meta:
        return "is on the meta device and has no values"
    if not parameter.numel():
        return "is empty"
    return "" if parameter.isfinite().all() else "holds NaN or infinity"


def _together(group: list[_Found]) -> str:
    """Why modules that share a weight stay as they are; "" if they all may be quantised."""
    for found in group:
        if found.reason:
            return f"shares its weight with {found.name}, which stays as it is"
    if len({_kind(found.module) == _CONV1D for found in group}) > 1:
        return "a Conv1D and another layer share one weight"
    return ""


def _note(module: Any) -> str:
    form = module.format
    n, k = module.weight.shape[0], form.columns(module.weight)
    return f"{form.name} ({n}, {k}), a scale for {f'each {form.group} values' if form.group else 'each output'}"


# ---- the exchange -----------------------------------------------------------------------------------------------------


def _replace(modules: list[Any], scheme: Scheme) -> None:
    """Quantises modules that share one weight. They share the dict of buffers, so that it stays one copy after .to(device)."""
    weight, form = modules[0].weight, FORMATS[scheme.name]
    matrix = weight.t() if _kind(modules[0]) == _CONV1D else weight
    n, k = matrix.shape
    integers, scale = form.unfilled(n, k, weight.device) if weight.is_meta else form.quantized(matrix)
    buffers = {"weight": integers, "scale": scale}
    for module in modules:
        is_table = isinstance(module, nn.Embedding)
        original = Original(type(module), weight.requires_grad)
        if "reverse_weight" in module._parameters:
            module.add_module("reverse", _head(module, scheme))
        del module._parameters["weight"]
        module._buffers = buffers
        module.__class__ = QuantizedEmbedding if is_table else QuantizedLinear
        module.dtype, module.dynamic, module.original = weight.dtype, scheme.dynamic, original


def _head(table: Any, scheme: Scheme) -> nn.Module:
    """The projection of a ReversibleEmbedding with a matrix of its own."""
    weight = table._parameters.pop("reverse_weight")
    head = Linear(weight.shape[1], weight.shape[0], False, device="meta", dtype=weight.dtype)
    head.weight = weight
    _replace([head], scheme)
    return head


def _restore(module: Any, shared: dict[int, nn.Parameter]) -> None:
    """shared: the parameters made so far, by the id of the buffers."""
    default = Original(ReversibleEmbedding if isinstance(module, QuantizedEmbedding) else Linear, True)
    kind, requires_grad = vars(module).pop("original", default)
    key = id(module._buffers)
    if key not in shared:
        weight = module.dequantized()
        is_transposed = f"{kind.__module__}.{kind.__qualname__}" == _CONV1D
        shared[key] = nn.Parameter(weight.t().contiguous() if is_transposed else weight, requires_grad)
    module._buffers = {}
    module._parameters = {"weight": shared[key], **module._parameters}
    for name in ("dtype", "dynamic"):
        del vars(module)[name]
    if (head := module._modules.pop("reverse", None)) is not None:
        _restore(head, shared)
        module._parameters["reverse_weight"] = head.weight
    module.__class__ = kind
    if issubclass(kind, nn.Embedding):  # a QuantizedEmbedding made by its constructor lacks them
        defaults = {
            "padding_idx": None,
            "max_norm": None,
            "norm_type": 2.0,
            "scale_grad_by_freq": False,
            "sparse": False,
        }
        vars(module).update({**defaults, **vars(module)})


def _bytes(model: nn.Module) -> int:
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers()) if not is_lazy(t)}
    return sum(t.numel() * t.element_size() for t in tensors.values())
