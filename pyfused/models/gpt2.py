"""GPT-2 (Radford et al. 2019): what are its layers, and what does one forward pass compute?

    x = token_embedding[ids] + position_embedding[positions]
    for each layer:  x += attention(layer_norm(x));  x += feed_forward(layer_norm(x))      (pre_norm.py)
    layer_norm(x)

B batch, S sequence, D hidden_dim, H heads, d = D // H, F intermediate_dim, V vocabulary, Sk keys: cached tokens plus S.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import CrossAttention, Embedding, KVCache, LayerNorm, Mlp, ReversibleEmbedding, SelfAttention, Visibility
from ..nn.layers import dropped
from ..rules import ACTIVATION_NAME, SIZE, check
from . import inputs as model_inputs
from .backbone import Backbone
from .call import FLAGS, Call, Reader, cache_of
from .dtypes import resolve_dtype
from .evaluation import skips_padding
from .options import configuration, head_size, rate
from .pre_norm import PreNormLayer, through

ENCODER_INPUTS = ("encoder_hidden_states", "encoder_padding_mask")
INPUTS = (
    "token_ids", "padding_mask", "token_type_ids", "position_ids", "inputs_embeds", "attention_mask", "packed",
    *ENCODER_INPUTS, "cache", *FLAGS,
)  # fmt: skip

# What Hugging Face's configuration has beyond KerasHub's constructor, then KerasHub's own keywords.
OPTIONS: dict[str, Any] = {
    "activation": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "embedding_dropout": None,
    "attention_dropout": None,
    "residual_dropout": None,
    "scale_attention": True,
    "scale_attention_by_inverse_layer_index": False,
    "upcast_attention": False,
    "cross_attention": False,
    "tie_embedding_weights": True,
    "name": None,
    "trainable": True,
}


@dataclass(frozen=True)
class GPT2Output:
    """The result of a call that asks for more than the last hidden state.

    last_hidden_state: (B, S, D). hidden_states: the embeddings, then the output of each layer; the final norm is applied
    to the last. attentions, cross_attentions: each layer's probabilities before dropout, (B, H, S, Sk) and (B, H, S, Se).
    """

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None


class GPT2Backbone(Backbone):
    """GPT-2 without a task head, as KerasHub's class of this name and transformers' GPT2Model: ids to hidden states.

    Args:
        vocabulary_size, num_layers, num_heads, hidden_dim, intermediate_dim: V, L, H, D, F. H need not divide D.
        dropout: the rate of every dropout site, in training.
        max_sequence_length: P, rows of the position table.
        dtype: a name or a torch.dtype; torch's default dtype if None.
        activation: "gelu_new" (tanh), "gelu" (exact), "quick_gelu", "relu", "silu", "tanh".
        layer_norm_epsilon: added to the variance in every layer norm.
        embedding_dropout, attention_dropout, residual_dropout: rates that differ from `dropout`.
        scale_attention: False leaves out the factor 1 / sqrt(d).
        scale_attention_by_inverse_layer_index: divides the scores of layer i, counted from 0, by i + 1.
        upcast_attention: scores and softmax in float32. It changes nothing here, as the kernels always do that.
        cross_attention: gives each layer attention to an encoder.
        tie_embedding_weights: False gives token_embedding(x, reverse=True) a matrix of its own.
        name, trainable: KerasHub's; trainable=False freezes the parameters.

    Weights start as transformers': normal with standard deviation 0.02, or 0.02 / sqrt(2 L) for the projections back into
    the residual stream; biases 0, norms 1. (KerasHub: 0.02 throughout, token embedding 0.01.)

    Raises:
        TypeError: an argument of a wrong type, or an unknown one. ValueError: a size or rate that does not fit.
    """

    def __init__(
        self,
        vocabulary_size: int,
        num_layers: int,
        num_heads: int,
        hidden_dim: int,
        intermediate_dim: int,
        dropout: float = 0.1,
        max_sequence_length: int = 1024,
        dtype: str | torch.dtype | None = None,
        **kwargs: Any,
    ):
        super().__init__()
        named = {
            "vocabulary_size": vocabulary_size, "num_layers": num_layers, "num_heads": num_heads,
            "hidden_dim": hidden_dim, "intermediate_dim": intermediate_dim,
            "max_sequence_length": max_sequence_length, "dropout": dropout,
        }  # fmt: skip
        self._config = config = configuration(GPT2Backbone, named, OPTIONS, kwargs)
        check(ACTIVATION_NAME, activation=config["activation"])
        factory: dict[str, Any] = {"dtype": resolve_dtype(dtype)}
        self.name, self.embedding_dropout = config["name"], rate(config, "embedding")
        self.token_embedding = ReversibleEmbedding(
            vocabulary_size, hidden_dim, tie_weights=config["tie_embedding_weights"], **factory
        )
        self.position_embedding = Embedding(max_sequence_length, hidden_dim, **factory)
        self.layers = nn.ModuleList(_layer(config, i, factory) for i in range(num_layers))
        self.final_norm = LayerNorm(hidden_dim, config["layer_norm_epsilon"], **factory)
        self.reset_parameters()
        self.requires_grad_(config["trainable"])

    def _spread(self, name: str, parameter: Tensor) -> float:
        into_residual = name.endswith((".output.weight", ".outer.weight"))
        return 0.02 / math.sqrt(2 * len(self.layers)) if into_residual else 0.02

    def new_cache(self, batch_size: int, capacity: int | None = None) -> KVCache:
        """An empty KV cache for `capacity` tokens per row (max_sequence_length if None), to pass as `cache`."""
        capacity = self._config["max_sequence_length"] if capacity is None else capacity
        check(SIZE, batch_size=batch_size, capacity=capacity)
        return cache_of(self, self.layers, batch_size, capacity)

    def forward(self, inputs: dict[str, Any] | None = None, **keywords: Any) -> Tensor | GPT2Output:
        """Hidden states behind the final norm, (B, S, D).

        Called with a dict, as in Keras, or with the same names as keywords. Values are numpy arrays or tensors, on the
        host or on the model's device. All but the first two are optional:

            token_ids: (B, S) integers in [0, V).
            padding_mask: (B, Sk), nonzero marks a real token (a fraction counts as 0); None: nothing is padding.
            token_type_ids: (B, S), looked up in the token embedding and added, as in transformers.
            position_ids: (B, S) or (1, S) integers in [0, P); cached tokens + 0 .. S-1 if absent, with or without padding.
            inputs_embeds: (B, S, D) instead of token_ids.
            attention_mask: (B, 1 or H, S, Sk), bool (True: may look) or added to the scores. It replaces the causal
                rule; padding_mask still hides keys.
            packed: True says that each row holds several texts. A text starts wherever position_ids does not count on by 1,
                and a token sees only its own text. Needs position_ids.
            encoder_hidden_states: (B, Se, D) for cross-attention, which is skipped without it.
            encoder_padding_mask: (B, Se), as padding_mask.
            cache: from new_cache; holds the earlier tokens and gets the new ones. The result carries no gradient. The cache
                keeps the encoder's keys too, so later calls leave out encoder_hidden_states.
            return_hidden_states, return_attentions: True returns a GPT2Output. Attentions are only then stored.

        A query that sees no key gets zeros from the attention. B = 0 and S = 0 give an empty result. With skip_padding the
        states at padding are zeros.

        Raises:
            ValueError: a missing or unknown input, a wrong shape, a sequence longer than P or than the cache.
            TypeError: a wrong type or dtype. IndexError: an id out of range, where the host holds it.
        """
        given = model_inputs.gather(inputs, keywords, INPUTS)
        with torch.set_grad_enabled(torch.is_grad_enabled() and given.get("cache") is None):
            call = self._read(given)
            if self.skip_padding or skips_padding():
                empty = call.cache is None or call.cache.length == 0
                possible = empty and call.memory is None and call.attentions is None
                call.visible = call.visible.skip_padding(possible)
            x = self.run(call)
        if call.cache is not None:
            call.cache.length += x.shape[1]
        if call.hidden_states is not None:
            call.hidden_states.append(x)
        asked: dict[str, Any] = call.collected()
        return GPT2Output(x, **asked) if asked else x

    def _read(self, given: dict[str, Any]) -> Call:
        config, like = self._config, self.final_norm.weight
        read = Reader(given, config, like)
        call = read.tokens()
        read.segments(call, "token_type_ids", config["vocabulary_size"])
        past, (b, s) = read.cache(call, self.layers), call.size
        padding = read.padding("padding_mask", "(B, Sk)", (b, past + s))
        read.positions(call, past)
        call.visible = _visible(given, call, padding, (b, config["num_heads"], s, past + s), like)
        for name in ENCODER_INPUTS:
            if given.get(name) is not None and not config["cross_attention"]:
                raise ValueError(f"{name} is given to a model without cross-attention; it takes None")
        read.memory(call, ENCODER_INPUTS)
        if call.memory is None and given.get("encoder_padding_mask") is not None:
            raise ValueError("encoder_padding_mask is given without encoder_hidden_states")
        read.collect(call, cross=config["cross_attention"])
        return call

    def text_states(self, token_ids: Tensor, padding_mask: Tensor | None) -> Tensor:
        """(B, S) -> (B, S, D)."""
        return self(token_ids=token_ids, padding_mask=padding_mask)

    def run(self, call: Call, last: Tensor | None = None) -> Tensor:
        """The pass without checks: (B, S, D), or (B, D) at the places `last` (B,). Does not change cache.length."""
        visible = call.visible
        x = visible.packed(self.embed(call))
        x, branch = through(self.layers, x, call)
        if last is None:
            return visible.unpacked(self.final_norm(x, branch)[0])
        if visible.packing is None:
            rows = torch.arange(x.shape[0], device=x.device)
            x, branch = x[rows, last], branch[rows, last]
        else:
            x, branch = (visible.packing.at(t, last) for t in (x, branch))
        return self.final_norm(x, branch)[0]

    def embed(self, call: Call) -> Tensor:
        """(B, S, D): tokens plus positions, plus token types if given."""
        x = call.embedded(self.token_embedding) + self.position_embedding(call.position_ids)
        if call.segment_ids is not None:
            x = x + self.token_embedding(call.segment_ids)
        return dropped(x, self.embedding_dropout if self.training else 0.0)


def _layer(config: dict[str, Any], index: int, factory: dict[str, Any]) -> PreNormLayer:
    d, heads = config["hidden_dim"], config["num_heads"]
    scale = 1.0 / math.sqrt(head_size(config)) if config["scale_attention"] else 1.0
    if config["scale_attention_by_inverse_layer_index"]:
        scale /= index + 1
    attention = {"scale": scale, "dropout": rate(config, "attention"), **factory}
    return PreNormLayer(
        index,
        partial(LayerNorm, d, config["layer_norm_epsilon"], **factory),
        SelfAttention(d, heads, **attention),
        CrossAttention(d, heads, **attention) if config["cross_attention"] else None,
        Mlp(d, config["intermediate_dim"], config["activation"], **factory),
        rate(config, "residual"),
    )


def _visible(
    given: dict[str, Any], call: Call, padding: Tensor | None, size: tuple[int, int, int, int], like: Tensor
) -> Visibility:
    """Which keys a query may see. size: (B, H, S, Sk)."""
    custom, positions = given.get("attention_mask"), call.position_ids
    if not given.get("packed", False):
        if custom is None:
            return Visibility(is_causal=True, padding_mask=padding)
        return Visibility(padding_mask=padding, attn_bias=model_inputs.score_bias(custom, "attention_mask", size, like))
    if given.get("position_ids") is None or positions is None:
        raise ValueError("packed=True needs position_ids; a text starts wherever they do not continue")
    if custom is not None or call.cache is not None:
        raise ValueError("packed=True takes neither attention_mask nor cache")
    text = torch.zeros_like(positions)
    text[:, 1:] = (positions[:, 1:] != positions[:, :-1] + 1).cumsum(1)
    same = (text[:, :, None] == text[:, None, :])[:, None]  # (B, 1, S, S)
    return Visibility(True, padding, model_inputs.score_bias(same, "packed", size, like))
