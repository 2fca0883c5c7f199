"""How does a padded batch of a transformers encoder cost only its real tokens? fuse_(model, skip_padding=True).

The encoder's own forward runs on one row, (1, T, D), of all real tokens. transformers' arguments for packed texts,
cu_seq_lens_q and its like, tell every attention layer where a text begins. Nothing else in these encoders looks at more than
one token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ...kernels.cpu.mask_structure import structure
from ...nn.packing import Packing, packing_of
from ...own_forward import Adapter, Forward, fused_forward, has_another_forward, original
from . import alike, kin, mpnet, t5
from .attention import collects
from .config import NAME, FusedConfig, interface_layers
from .releases import full_name, named, output_capturing, parameters
from .t5_tables import all_read_tables


@fused_forward
def encoder(module: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
    """as it is, on the real tokens alone"""
    packing = None
    if not _more(args, kwargs) and _runs_packed(module, kwargs):
        packing = _packing(hidden_states, _padding_of(attention_mask))
    if packing is None:
        return original(module, hidden_states, attention_mask, *args, **kwargs)
    found = original(module, packing.pack(hidden_states), None, *args, **kwargs, **_texts(packing))
    found.last_hidden_state = packing.unpack(found.last_hidden_state)
    return found


@fused_forward
def t5_encoder(
    module: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Any = None,
    encoder_attention_mask: Any = None,
    inputs_embeds: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """as it is, on the real tokens alone; hands the table of the bias from layer to layer"""
    given = (encoder_hidden_states, encoder_attention_mask)
    tokens = input_ids if inputs_embeds is None else inputs_embeds
    packing = None
    one = (input_ids is None) != (inputs_embeds is None) and attention_mask is not None
    if one and not _more(given, kwargs) and _runs_packed(module, kwargs) and all_read_tables(module):
        real: Any = attention_mask != 0
        packing = _packing(tokens, real, unbroken=True)  # the bias counts distances
    if packing is None:
        return t5.stack(module, input_ids, attention_mask, *given, inputs_embeds, **kwargs)
    ids = None if input_ids is None else packing.pack(input_ids)
    embeds = None if inputs_embeds is None else packing.pack(inputs_embeds)
    found = t5.stack(module, ids, None, *given, embeds, **kwargs, **_texts(packing))
    if isinstance(found, tuple):  # return_dict=False
        return (packing.unpack(found[0]), *found[1:])
    found.last_hidden_state = packing.unpack(found.last_hidden_state)
    return found


@fused_forward
def mpnet_encoder(module: Any, *args: Any, **kwargs: Any) -> Any:
    """as it is, on the real tokens alone; hands the table of the bias to all layers"""
    given, packing = named(module, args, kwargs), None
    heads = given.pop("head_mask", None)  # in older releases a list, of None if there is none
    if heads is not None and any(mask is not None for mask in heads):
        return original(module, *args, **kwargs)
    x, mask, return_dict = (
        given.pop("hidden_states"),
        given.pop("attention_mask", None),
        given.pop("return_dict", False),
    )
    plain = given.keys() <= {"output_attentions", "output_hidden_states"}
    if plain and _runs_packed(module, given) and mpnet.reads_table(module):
        packing = _packing(x, _padding_of(mask), unbroken=True)
    if packing is None:
        return original(module, *args, **kwargs)
    return mpnet.run_packed(module, x, packing, return_dict)


vars(mpnet_encoder)["methods"] = mpnet.METHODS


def _more(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call is more than an encoder's: it has a cache, another model's states, or texts that are packed already."""
    names = ("encoder_hidden_states", "encoder_attention_mask", "past_key_values", "cu_seq_lens_q", "head_mask")
    return any(a is not None for a in args) or any(kwargs.get(name) is not None for name in names)


def _runs_packed(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether all attention is pyfused's at present, nobody asked for states on the way, and no hook would see packed rows."""
    if collects(kwargs) or torch.compiler.is_compiling() or torch_module._has_any_global_hook():
        return False
    for m in list(module.modules())[1:]:
        attributes = vars(m)
        if not _looks_at_one_token(m) or attributes.get("chunk_size_feed_forward"):  # chunks need a length of theirs
            return False
        config = attributes.get("config")
        if isinstance(config, FusedConfig) and config._attn_implementation != NAME:
            return False
        if has_another_forward(m) or any(not _captures(hook) for name in _HOOKS for hook in attributes[name].values()):
            return False
    return True


_KNOWN = ("torch", "transformers", "pyfused", "peft", "bitsandbytes", "torchao")


def _looks_at_one_token(module: Any) -> bool:
    """Whether a module is of a class that these encoders may hold. Another may have attention of its own, or mix tokens."""
    root = getattr(module.__class__.forward, "__module__", "").partition(".")[0]
    return root in _KNOWN or isinstance(module, nn.Linear)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _captures(hook: Any) -> bool:
    """Whether a hook is one of those that transformers installs to collect outputs. It leaves them there, idle."""
    return output_capturing is not None and getattr(hook, "__module__", None) == output_capturing.__name__


def _padding_of(mask: Tensor | None) -> Tensor | None:
    """(B, S), True at a real token: what a mask (B, 1, S, S) holds if every query sees the same keys. None if it holds more."""
    if mask is None or type(mask) is not Tensor or mask.dim() != 4 or mask.shape[1] != 1 or mask.requires_grad:
        return None
    last = mask[:, 0, -1]
    if mask.is_cpu:
        found = structure(mask, all_see=mask.dtype != torch.bool)
        if found is None or found[0] or not found[1]:
            return None
    elif mask.dtype != torch.bool or not bool((mask == mask[:, :, -1:]).all()):
        return None
    return last if mask.dtype == torch.bool else last == 0


def _packing(tokens: Tensor | None, real: Tensor | None, *, unbroken: bool = False) -> Packing | None:
    """The packing of a batch whose mask hides some of it."""
    if real is None or tokens is None or real.shape != tokens.shape[:2] or real.device != tokens.device:
        return None
    packing = packing_of(real, unbroken=unbroken)
    return None if packing is None or packing.rows.numel() == real.numel() else packing


def _texts(packing: Packing) -> dict[str, Any]:
    """transformers' arguments for several texts in one row."""
    ends, longest = packing.cu_seqlens, packing.max_seqlen
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def _encoder(module: nn.Module) -> Forward | str:
    layers = interface_layers(module)
    if not layers or not all(isinstance(layer.config, FusedConfig) for layer in layers):
        return "skip_padding: an attention layer in it does not run on pyfused"
    if any(getattr(layer, "is_causal", True) for layer in layers):
        return "skip_padding: it is a decoder"
    if "kwargs" not in parameters(type(module)):
        return "skip_padding: in this release of transformers it takes no packed texts"
    return _unfit(module) or encoder


def _t5_encoder(module: Any) -> Forward | str:
    if reason := alike.reason(module.__class__, "Stack"):
        return f"skip_padding: {reason}"
    return t5.decoder_stack if module.is_decoder else _unfit(module) or t5_encoder


def _unfit(module: nn.Module) -> str:
    for m in list(module.modules())[1:]:
        if not _looks_at_one_token(m):
            return f"skip_padding: {type(m).__name__} in it may look at more than one token"
        if vars(m).get("chunk_size_feed_forward"):
            return "skip_padding: chunk_size_feed_forward is set, and packed rows have any length"
    return ""


# The encoders whose layers look at one token at a time, but for the attention.
_ROWS = (
    "albert.AlbertTransformer",
    "bert.BertEncoder",
    "camembert.CamembertEncoder",
    "data2vec:data2vec_text.Data2VecTextEncoder",
    "distilbert.Transformer",
    "electra.ElectraEncoder",
    "ernie.ErnieEncoder",
    "roberta.RobertaEncoder",
    "roberta_prelayernorm.RobertaPreLayerNormEncoder",
    "xlm_roberta.XLMRobertaEncoder",
    "xlm_roberta_xl.XLMRobertaXLEncoder",
)


ENCODERS: dict[str, Adapter] = {
    **{full_name(row): _encoder for row in _ROWS},
    **(kin.stacks(_t5_encoder) if alike.HAS_INTERFACE else {}),  # without it T5 takes no packed texts
    full_name("mpnet.MPNetEncoder"): lambda module: mpnet.changed(module) or mpnet_encoder,
}
