"""When does a fused decoder's step for one token run as one call of pyfused.decode, and what becomes of its cache?

It does where nothing looks in between: one_token says when. Everything else runs the modules. The caches of transformers get
what their own `update` would have put there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache, StaticCache, StaticLayer
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from ...decode_plan import DecodePlan, DecodeStep, Matrix
from ...kernels.cpu.decode import with_room
from ...ops.decode import is_native, run
from ...own_forward import kept
from ...tracing import profiler_is_on, tracing
from .unchanged import Watch

_LAYERS: dict[type, Any] = {DynamicCache: DynamicLayer, StaticCache: StaticLayer}
_CACHES = {*_LAYERS, EncoderDecoderCache}
_MORE = ("output_attentions", "output_hidden_states", "output_cross_attentions")
_PLAIN_ARGUMENTS = {"return_dict": (None, True), **dict.fromkeys(_MORE, (None, False))}


class Ready(NamedTuple):
    """A plan of a stack, and what tells whether it is still right."""

    plan: DecodePlan
    watch: Watch

    @classmethod
    def of(cls, plan: DecodePlan, watch: Watch) -> Ready | None:
        """None if the sizes do not fit together, as after pruning a layer."""
        try:
            plan.check()
        except ValueError:
            return None
        return cls(plan, watch)


def one_token(
    module: Any,
    make: Callable[[Any], Ready | None],
    input_ids: Any,
    past_key_values: Any,
    attention_mask: Any,
    use_cache: bool | None,
    others: dict[str, Any],
    position_ids: Any = None,
    encoder: tuple[Any, Any] | None = None,
) -> Any:
    """What the forward of transformers' decoder stack returns for one token per row, or None if its modules must run.

    They run for prompts; where a gradient is wanted; in training mode; under torch.compile, a trace, a dispatch mode, the
    profiler, torch.func or autocast; if attentions or hidden states are asked for; for modules with hooks, of other classes, or
    not fused; for caches other than a filled DynamicCache or StaticCache; for masks other than padding.

    Args:
        make: makes the plan of this module; None if it has none.
        others: the call's further arguments.
        encoder: (encoder_hidden_states, encoder_attention_mask) of a decoder with cross-attention.
    """
    cache_position = others.pop("cache_position", None)
    if tracing() or type(input_ids) is not Tensor or input_ids.dim() != 2 or input_ids.shape[1] != 1:
        return None
    if type(past_key_values) not in _CACHES or _is_watched(input_ids) or not _is_plain_call(module, use_cache, others):
        return None
    plans = kept(module)
    if plans is None:
        return None
    # With a cache goes a plan and the number of rows that a kernel runs. A plan of None: this cache's steps run the modules.
    rows = input_ids.shape[0]
    ready, native_rows = plans.get(past_key_values, (None, -1))
    if ready is None and native_rows == rows:
        return None
    if ready is None:
        of_other_caches = list(plans.data.values())  # type: ignore[attr-defined]  # values() could meet another thread's change
        ready = next((other for other, _ in of_other_caches if other is not None), None)
    if ready is None or not ready.watch.holds():
        plans.clear()
        ready, native_rows = make(module), -1
    if ready is None:
        plans[past_key_values] = None, rows
        return None
    call = _Call.of(ready, input_ids, past_key_values, attention_mask, position_ids, encoder, cache_position)
    if call is not None and native_rows != rows:
        if not is_native(ready.plan, call.step):
            ready = None
        native_rows = rows
    plans[past_key_values] = ready, native_rows
    return None if call is None or ready is None else call.run(past_key_values)


def _is_watched(input_ids: Tensor) -> bool:
    return (
        profiler_is_on()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_function_stack() > 0
        or forward_ad._current_level >= 0
        or torch.is_autocast_enabled("cpu" if input_ids.is_cpu else input_ids.device.type)
        or (input_ids.is_cuda and torch.cuda.is_current_stream_capturing())  # a graph would repeat this step's place
    )


def _is_plain_call(module: Any, use_cache: bool | None, others: dict[str, Any]) -> bool:
    """Whether the call asks for the last states and the cache alone."""
    for name, value in others.items():
        if not any(value is plain for plain in _PLAIN_ARGUMENTS.get(name, (None,))):
            return False
    config = module.config
    if (config.use_cache if use_cache is None else use_cache) is not True:
        return False
    settings = vars(config)
    if settings.get("is_causal") is not None or not settings.get("return_dict", True) or settings.get(_MORE[2]):
        return False
    return not (config.output_attentions or config.output_hidden_states)


class _Call(NamedTuple):
    ready: Ready
    step: DecodeStep
    layers: list[Any]  # of the cache
    is_static: bool

    @classmethod
    def of(
        cls,
        ready: Ready,
        input_ids: Tensor,
        cache: Any,
        mask: Any,
        position_ids: Any,
        encoder: Any,
        cache_position: Any,
    ) -> Any:
        """The _Call with the cache as it is. None for what `decode` does not take."""
        plan, rows = ready.plan, input_ids.shape[0]
        crosses = None
        if type(cache) is EncoderDecoderCache:
            if not all(map(cache.is_updated.get, range(len(plan.layers)))):
                return None
            cache, crosses = cache.self_attention_cache, cache.cross_attention_cache
        layers, tensors = _filled(cache, plan, rows)
        if not tensors or not (encoder is None) == (crosses is None) == (not plan.has_cross):
            return None
        is_static, length = type(cache) is StaticCache, tensors[0].shape[2]
        if is_static:
            if not all(hasattr(layer, "cumulative_length") for layer in layers):  # an older transformers
                return None
            places = {int(layer.cumulative_length) for layer in layers}
            place = places.pop()
            if places or not 0 < place < length:
                return None
        else:
            place = length
        if cache_position is not None and cache_position.tolist() != [place]:
            return None
        tokens = _ids(input_ids, rows, plan.token_embedding)
        positions = None
        if plan.position_embedding.weight is not None:
            if position_ids is not None:
                positions = _ids(position_ids, rows, plan.position_embedding)
            fits = place < plan.position_embedding.weight.shape[0] if position_ids is None else positions is not None
            if not fits:
                return None
        cross: list[Tensor] = []
        cross_mask = None
        if encoder is not None:
            states, cross_mask = encoder
            if type(states) is not Tensor or states.dim() != 3:
                return None
            _, cross = _filled(crosses, plan, rows, states.shape[1])
            if not cross:
                return None
            cross_mask = _padding(cross_mask, rows, states.shape[1], states.shape[1])
        mask = _padding(mask, rows, place + 1, length if is_static else place + 1)
        if tokens is None or mask is _UNKNOWN or cross_mask is _UNKNOWN:
            return None
        # A text without tokens gets the mean of all values there.
        if cross_mask is not None and cross_mask.is_cpu and not bool(cross_mask.any(1).all()):
            return None
        if torch.is_grad_enabled() and any(t.requires_grad for t in (*ready.watch.parameters, *tensors, *cross)):
            return None
        step = DecodeStep(tokens, None, positions, mask, place, place + 1, tensors, cross, cross_mask, False)
        return cls(ready, step, layers, is_static)

    def run(self, cache: Any) -> BaseModelOutputWithPastAndCrossAttentions:
        step = self.step
        if self.is_static:
            states, _ = run(self.ready.plan, step)
            for layer in self.layers:
                layer.cumulative_length.add_(1)
        else:
            # The old keys and values may have another owner. As in `update`, a longer copy takes their place; `decode` writes
            # the new token's into it.
            grown = with_room(step.caches)
            states, _ = run(self.ready.plan, step._replace(caches=grown))
            for i, layer in enumerate(self.layers):
                layer.keys, layer.values = grown[2 * i], grown[2 * i + 1]
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=states[:, None], past_key_values=cache)


def _filled(cache: Any, plan: DecodePlan, rows: int, length: int | None = None) -> tuple[list[Any], list[Tensor]]:
    """The cache's layers, and their keys and values, (rows, heads, length, d) each. Nothing for a cache of another kind."""
    kind, layers, like = _LAYERS.get(type(cache)), getattr(cache, "layers", []), plan.dtype_and_device
    if kind is None or len(layers) != len(plan.layers) or cache.offloading or "update" in vars(cache):
        return [], []
    tensors, device = [], like.device
    shape = None if length is None else (rows, plan.heads, length, plan.head_size)
    layer: Any
    for layer in layers:
        if type(layer) is not kind or not layer.is_initialized or "update" in vars(layer):
            return [], []
        for t in (layer.keys, layer.values):
            if type(t) is not Tensor or t.dtype != like.dtype or t.device != device:
                return [], []
            if shape is None and t.dim() == 4:
                shape = (rows, plan.kv_heads, t.shape[2], plan.head_size)
            if t.shape != shape:
                return [], []
            tensors.append(t)
    return layers, tensors if shape is not None and shape[2] > 0 else []


def _ids(ids: Any, rows: int, table: Matrix) -> Tensor | None:
    """(rows,), or None: the modules take the call, and raise where an id is out of range. Looking waits for a GPU; generate()
    waits for each token too."""
    assert table.weight is not None
    if type(ids) is not Tensor or ids.dtype != torch.int64 or ids.dim() != 2 or ids.shape[1] != 1:
        return None
    if (ids.shape[0] != rows and ids.shape[0] != 1) or ids.device != table.weight.device:
        return None
    size = table.weight.shape[0]
    if not all(0 <= row[0] < size for row in ids.tolist()):
        return None
    return ids[:, 0].expand(rows).contiguous()


_UNKNOWN: Any = object()  # a mask that holds more than padding


def _padding(mask: Any, rows: int, most: int, length: int) -> Tensor | None:
    """(rows, most) bool. Takes such a mask of numbers, or a bool mask (rows or 1, 1, 1, length) that hides what is behind."""
    if mask is None:
        return None
    if type(mask) is not Tensor or mask.is_floating_point():
        return _UNKNOWN
    if mask.shape == (rows, most):
        return (mask if mask.dtype == torch.bool else mask != 0).contiguous()
    if mask.dtype != torch.bool or mask.shape not in ((1, 1, 1, length), (rows, 1, 1, length)):
        return _UNKNOWN
    flat = mask[:, 0, 0]
    if length > most and bool(flat[:, most:].any()):
        return _UNKNOWN
    return flat[:, :most].expand(rows, -1).contiguous()


def same(values: Any) -> bool:
    """Whether the layers agree."""
    return len(set(values)) == 1
