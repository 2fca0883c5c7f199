"""What does fuse_ replace in attention classes that call torch's scaled_dot_product_attention themselves? That call.

The class's forward runs as a copy that calls `attended` in its place. All else in it stays: projections, rotations, caches,
biases, code of its own for other cases. The classes in ROWS have been tried.
"""

from __future__ import annotations

import ast
import copy
from typing import Any
from weakref import WeakKeyDictionary

import torch.nn.functional as F
from torch import Tensor, nn

from ...own_forward import Adapter, Forward, fused_forward, original
from .attention import attend
from .releases import full_name
from .statements import CALL, Source, source_of

ROWS = (
    "data2vec:data2vec_vision.Data2VecVisionSdpaSelfAttention",
    "falcon.FalconAttention",
    "sam.SamVisionSdpaAttention",
)


def attended(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's function, on pyfused.attention where they agree. Torch counts causality from the first key, the kernels from the
    last."""
    fits = not is_causal or (attn_mask is None and query.shape[-2] == key.shape[-2])
    if query.dim() != 4 or query.shape[0] != key.shape[0] or enable_gqa or not fits:
        options: dict[str, Any] = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
        return F.scaled_dot_product_attention(query, key, value, attn_mask, **options, enable_gqa=enable_gqa)
    if attn_mask is not None:
        attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
    seen, _ = attend(module, query, key, value, attn_mask, dropout=dropout_p, scaling=scale, is_causal=is_causal)
    return seen.transpose(1, 2)


@fused_forward
def attention(module: Any, *args: Any, **kwargs: Any) -> Any:
    """pyfused.attention"""
    of, forward = _known.get(type(module), (None, None))
    if forward is None or of is not type(module).forward:
        return original(module, *args, **kwargs)
    return forward(module, *args, **kwargs)


# By class: its forward, and the forward with calls of `attended`
_known: WeakKeyDictionary[type, tuple[Any, Any]] = WeakKeyDictionary()


def _ready(module: nn.Module) -> None:
    kind: Any = type(module)
    if _known.get(kind, (None, None))[0] is not kind.forward:
        source = source_of(kind.forward)
        _known[kind] = kind.forward, None if source is None else _with_calls(source)


vars(attention)["prepare"] = _ready


def _with_calls(source: Source) -> Any:
    """None for a forward that does not call torch's function."""
    calls = _Calls(source)
    definition = calls.visit(copy.deepcopy(source.definition))
    return source.remade(definition, attended) if calls.found else None


class _Calls(ast.NodeTransformer):
    def __init__(self, source: Source):
        self.source, self.found = source, False

    def visit_Call(self, node: ast.Call) -> ast.Call:
        self.generic_visit(node)
        if self.source.called(node) is F.scaled_dot_product_attention:
            self.found = True
            node.func = ast.copy_location(ast.Name(CALL, ast.Load()), node.func)
            node.args.insert(0, ast.copy_location(ast.Name(self.source.own, ast.Load()), node.func))
        return node


def _attention(module: Any) -> Forward | str:
    _ready(module)
    if _known[type(module)][1] is None:
        return "in this release of transformers its attention is code that fuse_ does not know"
    now = getattr(getattr(module, "config", None), "_attn_implementation", "sdpa")
    return (
        attention
        if now == "sdpa"
        else f'its attention for "{now}" is code that fuse_ does not know; set "sdpa", then fuse'
    )


ADAPTERS: dict[str, Adapter] = {full_name(row): _attention for row in ROWS}
