"""What does fuse_ replace in attention that a class computes by hand? The scores, the softmax and the product with the values.

scores.py finds these statements. The rest of the class's forward runs as it is: projections, caches, rotations, DeBERTa's
biases. A call that wants attention weights runs the class's own forward, and so does one whose dropout has a hook. The classes
in ROWS have been tried.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.wavlm import modeling_wavlm

from ... import notices
from ...nn.attention import additive
from ...ops import attention as attend_with_kernels
from ...ops.attention import MAX_HEAD_SIZE
from ...own_forward import Adapter, Forward, fused_forward, is_bare, is_own, original
from ...tracing import tracing
from ..torch_nn import takes
from .attention import attend, attentions_wanted, original_telling
from .blind import mean_of
from .masks import may_look
from .plain_modules import overridden
from .releases import full_name, named
from .scores import ByHand, by_hand
from .statements import source_of

# Folder (and file, where it has another name), then the class.
ROWS = (
    "big_bird.BigBirdSelfAttention",
    "bigbird_pegasus.BigBirdPegasusSelfAttention",
    "blip.BlipAttention",
    "bloom.BloomAttention",
    "canine.CanineSelfAttention",
    "clap.ClapAudioSelfAttention",
    "convbert.ConvBertSelfAttention",
    "deberta.DisentangledSelfAttention",
    "deberta_v2.DisentangledSelfAttention",
    "donut:donut_swin.DonutSwinSelfAttention",
    "flaubert.MultiHeadAttention",
    "flava.FlavaSelfAttention",
    "git.GitSelfAttention",
    "groupvit.GroupViTAttention",
    "led.LEDDecoderAttention",
    "lxmert.LxmertAttention",
    "megatron_bert.MegatronBertSelfAttention",
    "mobilevit.MobileViTSelfAttention",
    "mpt.MptAttention",
    "mvp.MvpAttention",
    "pvt.PvtEfficientSelfAttention",
    "rembert.RemBertSelfAttention",
    "roformer.RoFormerSelfAttention",
    "speecht5.SpeechT5Attention",
    "swinv2.Swinv2SelfAttention",
    "tapas.TapasSelfAttention",
    "trocr.TrOCRAttention",
    "visual_bert.VisualBertSelfAttention",
    "xglm.XGLMAttention",
    "xlm.MultiHeadAttention",
)
# Classes whose forward calls this method for it.
METHOD = "_attn"
ROWS_OF_METHODS = ("codegen.CodeGenAttention", "gpt_neo.GPTNeoSelfAttention", "gptj.GPTJAttention")
# Classes whose attention, or feed-forward, is of another shape, and why.
LEFT = {
    "funnel.FunnelRelMultiheadAttention": "scores by position are shifted from row to row, which the kernels do not do",
    "led.LEDEncoderSelfAttention": "attention in local windows, which the kernels do not have",
    "lilt.LiltSelfAttention": "scores of text and of layout are added to each other",
    "longformer.LongformerSelfAttention": "attention in local windows, which the kernels do not have",
    "luke.LukeSelfAttention": "words and entities may have queries of their own for each other",
    "mobilebert.MobileBertLayer": "its last feed-forward has two residuals",
    "nystromformer.NystromformerSelfAttention": "attention by landmarks, which the kernels do not have",
    "xlnet.XLNetRelativeAttention": "scores by position are shifted from row to row, which the kernels do not do",
}


class Added(NamedTuple):
    """What is added to the scores, in place of the scores.

    heads: how many, where heads and batch are one dimension, else 0. batch: of the queries, heads left out. mask: (B or 1, 1,
    Tq or 1, Sk), alike for all heads, without a gradient. bias: all else, (B or 1, H or 1, Tq or 1, Sk). hidden: True where the
    scores become the least number, broadcasts to (B, H, Tq, Sk).
    """

    heads: int
    batch: int
    mask: Tensor | None = None
    bias: Tensor | None = None
    hidden: Tensor | None = None

    def plus(self, x: Any) -> Added:
        """Adds a tensor. A number changes no probability."""
        if not isinstance(x, Tensor) or x.dim() == 0:
            return self
        x = self._four(x)
        if x.shape[1] > 1 or x.requires_grad:
            return self._replace(bias=_sum(self.bias, x))
        if self.hidden is None:
            return self._replace(mask=_sum(self.mask, x))
        return self._replace(mask=_hidden_before(self.hidden, _sum(self.mask, x)), hidden=None)

    def scaled(self, by: Any) -> Added:
        """Multiplies what is added so far. The least number stays: what it hides stays hidden, and is known as a mask."""
        mask = self.mask
        if mask is not None:
            mask = torch.where(mask == torch.finfo(mask.dtype).min, mask, mask * by)
        return self._replace(mask=mask, bias=None if self.bias is None else self.bias * by)

    def filled(self, hidden: Tensor) -> Added:
        """Hides places behind the least number: a query that sees no key attends to all of them alike, without a gradient."""
        hidden = self._four(hidden != 0)
        return self._replace(hidden=hidden if self.hidden is None else self.hidden | hidden)

    def clamped(self) -> Added:
        """Turns -inf into the least number."""
        mask, bias = (x if x is None else x.clamp(min=torch.finfo(x.dtype).min) for x in (self.mask, self.bias))
        return self._replace(mask=mask, bias=bias)

    def _four(self, x: Tensor) -> Tensor:
        if x.dim() == 5:  # windows of a picture are rows of the batch
            return x.expand(self.batch // x.shape[1], -1, -1, -1, -1).flatten(0, 1)
        if x.dim() == 3 and self.heads:
            return x.unflatten(0, (-1, self.heads))
        return x[(None,) * (4 - x.dim())]


# Scores of a call in float32 on a CPU. With fewer of them the class's own operations take less time than it takes to find out
# what is added to the scores. From 1 << 15 on the kernel is faster: 4 heads of 16 numbers and 12 of 64 agree in that.
WORTH_THE_KERNEL = 1 << 15
_CACHES = ("past_key_values", "past_key_value", "layer_past", "cache")


class _Call:
    """The functions that a copy of a forward calls, see scores.py."""

    @staticmethod
    def begin(module: Any, query: Tensor, flat: bool) -> Added:
        heads = _heads(module) if flat else 0
        return Added(heads, query.shape[0] // heads if heads else query.shape[0])

    @staticmethod
    def end(
        module: Any, query: Tensor, key: Tensor, value: Tensor, added: Added, scale: float | Tensor, dropout: str
    ) -> Tensor:
        """softmax(scale * query key^T + what is added) value, in the shape of a product with the values."""
        q, k, v = (x.to(value.dtype) for x in (query, key, value))
        if added.heads:
            q, k, v = (x.unflatten(0, (-1, added.heads)) for x in (q, k, v))
        p = _probability(module, dropout)
        q, mask, bias, blind = _without_hidden(q, added, p)
        seen, _ = attend(module, q, k, v, mask, dropout=p, scaling=scale, is_causal=False, position_bias=bias)
        if blind is not None:
            seen = torch.where(blind.transpose(1, 2), mean_of(v, seen.shape[2]), seen)
        seen = seen.transpose(1, 2)
        return seen.flatten(0, 1) if added.heads else seen


def _without_hidden(
    query: Tensor, added: Added, dropout: float
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(query, mask, bias, blind): the hidden places are in the mask, or in the bias. blind is True for queries that see no key,
    (B, H, Tq, 1) or what broadcasts to it; they attend to all keys alike, without a gradient of the scores. It is None if there
    are none. Where dropout drops some keys, and beside a dense bias, they get zeros as queries instead, and see all keys."""
    mask, bias, hidden = added.mask, added.bias, added.hidden
    look = may_look() and (hidden is None or hidden.is_cpu)
    if hidden is None or (look and not bool(hidden.any())):
        return query, mask, bias, None
    blind = hidden.all(-1, keepdim=True)
    some = not look or bool(blind.any())
    if mask is None and (bias is None or bias.shape[2] == 1) and not (some and dropout):
        return query, ~hidden, bias, blind if some else None
    total = _sum(mask, query.new_zeros(()) if bias is None else bias).masked_fill(hidden, torch.finfo(query.dtype).min)
    if some:
        query = query.masked_fill(blind.expand(*query.shape[:2], -1, -1), 0.0)
        total = total.masked_fill(blind, 0.0)
    return (query, total, None, None) if bias is None else (query, None, total, None)


def _hidden_before(hidden: Tensor, mask: Tensor) -> Tensor:
    """A mask that was added to scores with hidden places. Of keys that only the mask hides a query that sees no other one sees
    all alike; it never sees the hidden places."""
    look = hidden.is_cpu and may_look()
    if look and not bool(hidden.any()):
        return mask
    least = torch.finfo(mask.dtype).min
    total = torch.where(hidden, mask.new_full((), least), mask)
    if look and not bool((total <= least).all(-1).any()):
        return total
    return torch.where(hidden, mask + least, mask)


def _sum(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a + b


def _heads(module: Any) -> int:
    attributes = vars(module)  # asking the module for a name that it lacks takes a microsecond
    for name in ("num_heads", "num_attention_heads", "n_heads"):
        heads = attributes.get(name) or getattr(type(module), name, None)
        if isinstance(heads, int):
            return heads
    return 0


def _probability(module: Any, dropout: str) -> float:
    """The chance that a probability becomes 0."""
    found = getattr(module, dropout) if dropout else 0.0
    if isinstance(found, nn.Module):
        return found.p if isinstance(found, nn.Dropout) and found.training else 0.0
    return float(found) if module.training else 0.0


@fused_forward
def attention(module: Any, *args: Any, **kwargs: Any) -> Any:
    """pyfused.attention"""
    of, found, forward = _known.get(type(module), (None, None, None))
    if forward is None or of is not type(module).forward:
        return original(module, *args, **kwargs)
    given = named(module, args, kwargs)
    if _few(module, given) or _keeps_own(module, found, given):
        return original(module, *args, **kwargs)
    return forward(module, *args, **kwargs)


@fused_forward
def method(module: Any, *args: Any, **kwargs: Any) -> Any:
    """pyfused.attention"""
    own: Any = getattr(type(module), METHOD)
    of, found, made = _known.get(type(module), (None, None, None))
    if made is None or of is not own or _few_between(*args[:2]) or _keeps_own(module, found, {}):
        return own(module, *args, **kwargs)
    return made(module, *args, **kwargs)


@fused_forward
def calls_method(module: Any, *args: Any, **kwargs: Any) -> Any:
    """pyfused.attention"""
    return original_telling(module, args, kwargs)


@fused_forward
def tells(module: Any, *args: Any, **kwargs: Any) -> Any:
    """as it is; its attention hears whether weights are wanted"""
    return original_telling(module, args, kwargs)


# By class: its forward or method, what was found in it, and the same with calls of _Call
_known: WeakKeyDictionary[type, tuple[Any, Any, Any]] = WeakKeyDictionary()


def _ready(module: nn.Module, function: str = "forward") -> None:
    kind: Any = type(module)
    own = getattr(kind, function)
    if _known.get(kind, (None, None, None))[0] is own:
        return
    source = source_of(own)
    found = None if source is None else by_hand(source)
    made = None if source is None or found is None else source.remade(found.definition, _Call)
    _known[kind] = own, found, made


vars(attention)["prepare"] = _ready
vars(calls_method)["prepare"] = functools.partial(_ready, function=METHOD)
vars(calls_method)["methods"] = {METHOD: method}


def _few(module: Any, given: dict[str, Any]) -> bool:
    """Whether a call has few scores: all that it says of its keys are the tensors that they are made of, and their mask."""
    x, keys, masked, cached = None, 0, False, False
    for name, value in given.items():
        if isinstance(value, Tensor):
            shape = value.shape
            if x is None:
                if len(shape) != 3:
                    return False
                x = value
            if "mask" in name and shape:
                keys, masked = max(keys, shape[-1]), True
            elif len(shape) == 3:
                keys = max(keys, shape[1])
        elif value is not None and name in _CACHES:
            cached = True
    return x is not None and (masked or not cached) and _few_in(x, _heads(module), keys)


def _few_between(query: Any = None, key: Any = None, *_: Any) -> bool:
    """The same of queries (B, H, Tq, D) and keys (B, H, Sk, D)."""
    plain = isinstance(query, Tensor) and isinstance(key, Tensor) and query.dim() == key.dim() == 4
    return plain and _few_in(query, query.shape[1], key.shape[2])


def _few_in(x: Tensor, heads: int, keys: int) -> bool:
    """Whether the queries of x, (B, Tq, N) or (B, H, Tq, D), have few scores, which plain PyTorch computes as exactly."""
    if x.dtype != torch.float32 or not x.is_cpu or tracing():
        return False
    return 0 < x.shape[0] * x.shape[-2] * heads * keys < WORTH_THE_KERNEL


def _keeps_own(module: Any, found: ByHand, given: dict[str, Any]) -> bool:
    """Whether a call runs the class's own forward."""
    if attentions_wanted(module, given):
        notices.once("output_attentions: attention runs in transformers' own code, which has the probabilities")
        return True
    dropout = getattr(module, found.dropout) if found.dropout else None
    if isinstance(dropout, nn.Module) and not (type(dropout) in (nn.Dropout, nn.Identity) and is_bare(dropout)):
        return True
    return any(getattr(module, name) is not None for name in found.absent)


def _attention(module: Any) -> Forward | str:
    return _found(module, "forward") or attention


def _method(module: Any) -> Forward | str:
    own = vars(module).get(METHOD)
    if own is not None and not is_own(own):
        return f"this instance has an {METHOD} of its own already"
    return _found(module, METHOD) or calls_method


def _found(module: Any, function: str) -> str:
    """Why the attention in this function of the module's class is left; "" if it is fused."""
    _ready(module, function)
    found: ByHand | None = _known[type(module)][1]
    if found is None or (found.flat and not _heads(module)):
        return "in this release of transformers its attention is code that fuse_ does not know"
    for name in found.absent:
        if getattr(module, name) is not None:
            return f"its attention has a {name}"
    return ""


@fused_forward
def heads_with_bias(
    module: Any, hidden_states: Tensor, attention_mask: Any, gated_position_bias: Tensor, *more: Any, **kwargs: Any
) -> Any:
    """pyfused.attention"""
    own = attentions_wanted(module, kwargs) or any(more) or module.head_dim > MAX_HEAD_SIZE
    if own or not takes(hidden_states, module.q_proj.weight):
        kind = type(module)
        return kind.torch_multi_head_self_attention(
            module, hidden_states, attention_mask, gated_position_bias, *more, **kwargs
        )
    # Like torch's function, this reads the weights and calls no projection.
    q, k, v = (
        F.linear(hidden_states, m.weight, m.bias).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
        for m in (module.q_proj, module.k_proj, module.v_proj)
    )
    seen = attend_with_kernels(
        *(q, k, v),
        padding_mask=None if attention_mask is None else attention_mask == 1,
        attn_bias=additive(gated_position_bias.unflatten(0, (-1, module.num_heads)), q.dtype),
        dropout_p=module.dropout if module.training else 0.0,
    )
    return F.linear(seen.transpose(1, 2).flatten(2), module.out_proj.weight, module.out_proj.bias), None


@fused_forward
def wavlm_attention(module: Any, *args: Any, **kwargs: Any) -> Any:
    """pyfused.attention, with the gated bias of positions"""
    return original(module, *args, **kwargs)


vars(wavlm_attention)["methods"] = {"torch_multi_head_self_attention": heads_with_bias}


def _wavlm(module: Any) -> Forward | str:
    base = modeling_wavlm.WavLMAttention
    return overridden(module, base, "torch_multi_head_self_attention") or wavlm_attention


def _left(row: str) -> Adapter:
    return lambda module: LEFT[row]


ADAPTERS: dict[str, Adapter] = {
    **{full_name(row): _attention for row in ROWS},
    **{full_name(row): _method for row in ROWS_OF_METHODS},
    full_name("wavlm.WavLMAttention"): _wavlm,
    full_name("mpt.MptBlock"): lambda module: tells,
    **{full_name(row): _left(row) for row in LEFT},
}
