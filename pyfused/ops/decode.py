"""decode: one generation step of a whole decoder. Token ids in, logits or the next tokens out.

It is one call of one kernel, without Python between the layers. A plan (pyfused/decode_plan.py) says what the layers are. It
gives no gradient. Each backend's `forward` takes a tensor of the plan's dtype and device, which dispatch looks at, the plan and
a DecodeStep.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import dispatch
from ..decode_plan import DecodePlan, DecodeStep, sizes
from ..rules import FLAG, Rule, check, check_cuts, its_kind
from .call import WATCHERS
from .checks import may_look, name_of
from .cost import COSTS, Cost, size
from .registration import LIBRARY

if TYPE_CHECKING:
    from ..nn import KVCache

_TEMPERATURE = Rule((int, float), "a number", lambda value: 2.0**-126 <= value <= 2.0**126, "2**-126 to 2**126")


def decode(
    plan: DecodePlan,
    tokens: Tensor,
    cache: KVCache,
    *,
    padding_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    choose: bool = False,
    uniform: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """Feeds one token to each row and counts it in the cache.

    Args:
        plan: from pyfused.plan_of(model).
        tokens: (B,) int64 in [0, V), on the plan's device.
        cache: a KVCache of the model, with room for one token. For a model with cross-attention it holds the encoder's keys.
            A row writes at cache.length, or at cache.positions if its rows have places of their own, and sees the places
            up to that one.
        padding_mask: (B, Sk), nonzero for a key that a row sees; Sk counts the new token. None hides none.
        position_ids: (B,) int64, the rows of the position table; None takes the places in the cache.
        choose: return tokens instead of the logits: the likeliest ones, or with `uniform` drawn ones.
        uniform: (B,) float64 in [0, 1). Row b draws a token of softmax(logits / temperature) with uniform[b].
        temperature: of the draws, 2**-126 to 2**126.
        top_k: draws from the k likeliest tokens. top_p: draws from the smallest set of likeliest tokens that holds this much
            probability. With both, top_p cuts the result of top_k. None cuts nothing.

    Returns:
        Logits (B, V) of the plan's dtype, or with `choose` tokens (B,) int64: the first of the largest logits, or drawn ones;
        -1 where the largest is not finite. A plan without a head gives the hidden states behind the final norm, (B, D).

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it. IndexError: an id out of range, where the host
        holds it.
    """
    step = bind(plan, tokens, cache, padding_mask, position_ids, choose, uniform, temperature, top_k, top_p)[2]
    logits, chosen = run(plan, step)
    cache.advance()
    return chosen if choose else logits  # type: ignore[return-value]


def run(plan: DecodePlan, step: DecodeStep) -> tuple[Tensor, Tensor | None]:
    """The logits and the chosen tokens, or None. The arguments fit."""
    if torch.compiler.is_compiling() or any(watcher() for watcher in WATCHERS):
        logits, chosen = torch.ops.pyfused.decode(*plan.leaves(), *step)
        return logits, chosen if step.choose else None
    like = plan.dtype_and_device
    return dispatch.choose("decode", "forward", (like, plan, step))(like, plan, step)  # type: ignore[return-value]


def backend_of(plan: DecodePlan, step: DecodeStep) -> str:
    """The backend that runs the call."""
    args = plan.dtype_and_device, plan, step
    return next(row.backend for row, reason in dispatch.judged("decode", "forward", args) if not reason)


def is_native(plan: DecodePlan, step: DecodeStep) -> bool:
    """Whether a kernel runs the call. The reference is slower than the model's own modules."""
    return backend_of(plan, step) != "reference"


def step_of(
    tokens: Tensor, cache: KVCache, mask: Tensor | None = None, position_ids: Tensor | None = None, choose: bool = False
) -> DecodeStep:
    """The call that feeds tokens (B,) to a cache."""
    cross: list[Tensor] = [] if cache.cross[0] is None else [t for pair in cache.cross for t in pair or ()]
    place, most, places, cross_mask = cache.length, cache.extent, cache.positions, cache.encoder_mask
    if places is not None:
        places = places.contiguous()
    if cross_mask is not None and (cross_mask.dtype != torch.bool or not cross_mask.is_contiguous()):
        cross_mask = (cross_mask != 0).contiguous()
    return DecodeStep(tokens.contiguous(), places, position_ids, mask, place, most, cache.tensors, cross, cross_mask, choose)


def bind(
    plan, tokens, cache, padding_mask=None, position_ids=None, choose=False, uniform=None, temperature=1.0, top_k=None,
    top_p=None,
) -> tuple[Any, ...]:  # fmt: skip
    """Checks the arguments. Returns what dispatch and the backends take."""
    if not isinstance(plan, DecodePlan):
        raise TypeError(f"plan is {its_kind(plan)}; it takes a DecodePlan, from pyfused.plan_of(model)")
    if "checked" not in plan.prepared:
        plan.check()
        plan.prepared["checked"] = True
    like = plan.dtype_and_device
    if not hasattr(cache, "advance"):
        raise TypeError(f"cache is {its_kind(cache)}; it takes what the model's new_cache() returns")
    wanted = len(plan.layers), plan.kv_heads, plan.head_size, like.dtype, like.device
    if cache.signature != wanted:
        meaning = "layers, heads, head size, dtype, device"
        raise ValueError(f"cache is for {cache.signature}; it takes this plan's {wanted}: {meaning}")
    b = cache.batch_size
    _check_ids(tokens, "tokens", b, plan.token_embedding, like)
    if position_ids is not None:
        if plan.position_embedding.weight is None:
            raise ValueError("position_ids is given; a plan without a position table takes None")
        _check_ids(position_ids, "position_ids", b, plan.position_embedding, like)
    _check_cache(plan, cache, b)
    if cache.extent > cache.capacity:
        raise ValueError(f"cache holds {cache.length} tokens and has no room for another; its capacity is {cache.capacity}")
    places = plan.position_embedding.weight
    if places is not None and position_ids is None and cache.extent > places.shape[0]:
        raise ValueError(f"cache holds {cache.extent - 1} tokens; a model of {places.shape[0]} positions takes no more")
    if padding_mask is not None:
        if not isinstance(padding_mask, Tensor):
            raise TypeError(f"padding_mask is {its_kind(padding_mask)}; it takes a torch.Tensor or None")
        if tuple(padding_mask.shape) != (b, cache.extent):
            raise ValueError(f"padding_mask has shape {tuple(padding_mask.shape)}; it takes (B, Sk) = {(b, cache.extent)}")
        padding_mask = (padding_mask != 0).to(like.device).contiguous()
    check(FLAG, choose=choose)
    if choose and plan.head.weight is None:
        raise ValueError("choose is True; a plan without a head gives hidden states and takes False")
    if position_ids is not None:
        position_ids = position_ids.contiguous()
    step = step_of(tokens, cache, padding_mask, position_ids, choose)
    if uniform is not None or (temperature, top_k, top_p) != (1.0, None, None):
        _check_draw(choose, uniform, temperature, top_k, top_p, b, like)
        cut = 1.0 if top_p is None else float(top_p)
        most = min(top_k or 0, plan.outputs)  # backends take 64 bits
        step = step._replace(uniform=uniform.contiguous(), temperature=float(temperature), top_k=most, top_p=cut)
    return like, plan, step


def _check_draw(choose: Any, uniform: Any, temperature: Any, top_k: Any, top_p: Any, rows: int, like: Tensor) -> None:
    if uniform is None:
        raise ValueError("temperature, top_k or top_p is given without uniform; they take numbers to draw with")
    if not isinstance(uniform, Tensor):
        raise TypeError(f"uniform is {its_kind(uniform)}; it takes a torch.Tensor or None")
    if not choose:
        raise ValueError("uniform is given and choose is False; draws take choose=True")
    if uniform.dtype != torch.float64 or tuple(uniform.shape) != (rows,) or uniform.device != like.device:
        what = f"{name_of(uniform.dtype)} {tuple(uniform.shape)} on {uniform.device}"
        raise ValueError(f"uniform is {what}; it takes float64 (B,) = {(rows,)} on {like.device}")
    if may_look(uniform) and not bool(((uniform >= 0) & (uniform < 1)).all()):
        raise ValueError("uniform holds a number outside of [0, 1)")
    check(_TEMPERATURE, temperature=temperature)
    check_cuts(top_k, top_p)


def _check_cache(plan: DecodePlan, cache: KVCache, rows: int) -> None:
    """Places and the encoder's keys. Kernels trust them."""
    like, places = plan.dtype_and_device, cache.positions
    if places is None and cache.length < 0:
        raise ValueError(f"cache has length {cache.length}; it takes at least 0")
    if places is not None:
        if places.dtype != torch.int64 or tuple(places.shape) != (rows,) or places.device != like.device:
            raise ValueError(f"cache has positions {places.dtype} {tuple(places.shape)}; it takes int64 (B,) = {(rows,)}")
        if may_look(places) and rows:
            low, high = (int(v) for v in torch.aminmax(places))
            if low < 0 or high >= cache.extent:
                raise IndexError(f"cache has a position {low if low < 0 else high}; it takes 0 to {cache.extent - 1}")
    if not plan.has_cross:
        return
    if None in cache.cross:
        raise ValueError("cache has no keys of an encoder; this plan has cross-attention and takes a cache with them")
    first: Any = cache.cross[0]
    sources, length = first[0].shape[0], first[0].shape[2]
    shape = sources, plan.heads, length, plan.head_size
    for t in (t for pair in cache.cross for t in pair or ()):
        if tuple(t.shape) != shape or t.dtype != like.dtype or t.device != like.device:
            raise ValueError(f"cache has the encoder's keys as {t.dtype} {tuple(t.shape)}; it takes {like.dtype} {shape}")
    if not sources or rows % sources:
        raise ValueError(f"cache has keys of {sources} sources for {rows} rows; it takes a divisor of the rows")
    mask = cache.encoder_mask
    if mask is not None and (tuple(mask.shape) != (sources, length) or mask.device != like.device):
        raise ValueError(f"cache has an encoder_mask of shape {tuple(mask.shape)}; it takes {(sources, length)}")


def _check_ids(ids: Any, name: str, rows: int, table: Any, like: Tensor) -> None:
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} is {its_kind(ids)}; it takes a torch.Tensor")
    if ids.dtype != torch.int64:
        raise TypeError(f"{name} is {name_of(ids.dtype)}; it takes int64")
    if tuple(ids.shape) != (rows,):
        raise ValueError(f"{name} has shape {tuple(ids.shape)}; it takes (B,) = {(rows,)}, the rows of the cache")
    if ids.device != like.device:
        raise ValueError(f"{name} is on {ids.device}; it takes the plan's device, {like.device}")
    if may_look(ids) and rows:
        low, high = (int(v) for v in torch.aminmax(ids))
        if low < 0 or high >= table.weight.shape[0]:
            raise IndexError(f"{name} holds {low if low < 0 else high}; it takes 0 to {table.weight.shape[0] - 1}")


# ---- the registered operator: a plan as lists ---------------------------------------------------------------------------

_SCHEMA = (
    "decode(Tensor?[] weights, float[] numbers, str activation, Tensor tokens, Tensor? places, Tensor? position_ids, "
    "Tensor? mask, SymInt place, SymInt most, Tensor(a!)[] caches, Tensor[] cross, Tensor? cross_mask, bool choose, "
    "Tensor? uniform, float temperature, int top_k, float top_p) -> (Tensor logits, Tensor chosen)"
)


def _registered(weights, numbers, activation, *step):
    plan = DecodePlan.of_leaves(weights, numbers, activation)
    like = plan.dtype_and_device
    args = like, plan, DecodeStep(*step)
    logits, chosen = dispatch.choose("decode", "forward", args)(*args)
    return logits, args[2].tokens.new_empty(0) if chosen is None else chosen


def _fake(weights, numbers, activation, *step):
    plan, call = DecodePlan.of_leaves(weights, numbers, activation), DecodeStep(*step)
    like, rows = plan.dtype_and_device, call.tokens.shape[0]
    return like.new_empty(rows, plan.outputs), call.tokens.new_empty(rows if call.choose else 0)


def _cost(weights, numbers, activation, *step):
    """Each weight is read once, also where the head is the token embedding, and each visible key and value."""
    plan, call = DecodePlan.of_leaves(weights, numbers, activation), DecodeStep(*step)
    rows, matrices = call.tokens.shape[0], list(plan.matrices())
    read = sum(size(*matrix) for matrix in matrices)
    keys = sum(t[:, :, : call.most].numel() for t in call.caches) + sum(t.numel() for t in call.cross)
    element = plan.dtype_and_device.element_size()
    written = rows * plan.outputs * element
    flops = 2 * rows * sum(math.prod(sizes(m)) for m in matrices)
    group = plan.heads // plan.kv_heads
    return Cost(read + keys * element + written, flops + 2 * keys * group)


LIBRARY.define(_SCHEMA)
LIBRARY.impl("decode", _registered, "CompositeExplicitAutograd")
torch.library.register_fake("pyfused::decode", _fake, lib=LIBRARY)
COSTS["decode"] = _cost
