"""GPT-2 (Radford et al. 2019): what are its layers, and what does one forward pass compute?

    x = token_embedding[ids] + position_embedding[positions]
    for each layer:  x += attention(layer_norm(x));  x += feed_forward(layer_norm(x))
    layer_norm(x)

B batch, S sequence, D hidden_dim, H heads, d = D // H, F intermediate_dim, V vocabulary, Sk keys: cached tokens plus S.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import CrossAttention, Embedding, KVCache, LayerNorm, Mlp, ReversibleEmbedding, SelfAttention, Visibility
from . import inputs as model_inputs
from .backbone import Backbone, resolve_dtype
from .evaluation import skips_padding
from .gpt2_call import INPUTS, Call, read
from .options import check_heads, check_known, check_rates, check_rest, check_sizes

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
    """What a call returns that asks for more than the last hidden state.

    last_hidden_state: (B, S, D). hidden_states: the embeddings, then the output of each layer; the last one is behind
    the final norm. attentions, cross_attentions: the probabilities of each layer before dropout, (B, H, S, Sk) and
    (B, H, S, Se).
    """

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None


class GPT2Block(nn.Module):
    """One layer. The residual stream x and the branch that is still to be added to it travel as a pair, so that each
    addition happens inside the next layer norm."""

    def __init__(self, config: dict[str, Any], index: int, factory: dict[str, Any]):
        super().__init__()
        d, heads, eps = config["hidden_dim"], config["num_heads"], config["layer_norm_epsilon"]
        scale = 1.0 / math.sqrt(d // heads) if config["scale_attention"] else 1.0
        if config["scale_attention_by_inverse_layer_index"]:
            scale /= index + 1
        attention = {"scale": scale, "dropout": _rate(config, "attention"), **factory}
        self.index, self.residual_dropout = index, _rate(config, "residual")
        self.attention_norm = LayerNorm(d, eps, **factory)
        self.attention = SelfAttention(d, heads, **attention)
        self.cross_attention: CrossAttention | None = None
        if config["cross_attention"]:
            self.cross_attention_norm = LayerNorm(d, eps, **factory)
            self.cross_attention = CrossAttention(d, heads, **attention)
        self.feed_forward_norm = LayerNorm(d, eps, **factory)
        self.feed_forward = Mlp(d, config["intermediate_dim"], config["activation"], **factory)

    def forward(self, x: Tensor, branch: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
        """x, branch (B, S, D) -> the same pair behind this layer; the layer's output is their sum."""
        y, x = (self.attention_norm(x), x) if branch is None else self.attention_norm(x, branch)
        branch = self._drop(self.attention(y, call.visible, call.cache, self.index, call.attentions))
        if self.cross_attention is not None and (key_value := self._encoder_keys(call)) is not None:
            y, x = self.cross_attention_norm(x, branch)
            real = Visibility(padding_mask=call.memory_mask)
            branch = self._drop(self.cross_attention(y, key_value, real, call.cross_attentions))
        y, x = self.feed_forward_norm(x, branch)
        return x, self._drop(self.feed_forward(y))

    def _encoder_keys(self, call: Call) -> tuple[Tensor, Tensor] | None:
        """Projected once, and kept in the cache if there is one."""
        key_value = None if call.cache is None else call.cache.cross[self.index]
        if key_value is None and call.memory is not None and self.cross_attention is not None:
            key_value = self.cross_attention.project(call.memory)
            if call.cache is not None:
                call.cache.cross[self.index] = key_value
        return key_value

    def _drop(self, branch: Tensor) -> Tensor:
        return F.dropout(branch, self.residual_dropout) if self.training and self.residual_dropout else branch


class GPT2Backbone(Backbone):
    """GPT-2 without a task head, as KerasHub's class of this name and transformers' GPT2Model: ids to hidden states.

    Args:
        vocabulary_size, num_layers, num_heads, hidden_dim, intermediate_dim: V, L, H, D, F. H need not divide D.
        dropout: the rate of every dropout site, in training.
        max_sequence_length: P, rows of the position table.
        dtype: a name or a torch.dtype; torch's default dtype if None.
        activation: "gelu_new" (tanh), "gelu" (exact), "relu", "silu", "tanh".
        layer_norm_epsilon: added to the variance in every layer norm.
        embedding_dropout, attention_dropout, residual_dropout: rates that differ from `dropout`.
        scale_attention: False leaves out the factor 1 / sqrt(d).
        scale_attention_by_inverse_layer_index: divides the scores of layer i, counted from 0, by i + 1.
        upcast_attention: scores and softmax in float32. The kernels always do that, so it changes nothing here.
        cross_attention: gives each layer attention to an encoder.
        tie_embedding_weights: False gives token_embedding(x, reverse=True) a matrix of its own.
        name, trainable: KerasHub's; trainable=False freezes the parameters.

    Weights start as transformers': normal with standard deviation 0.02, the projections back into the residual stream
    with 0.02 / sqrt(2 L), biases 0, norms 1. (KerasHub: 0.02 throughout, token embedding 0.01.)

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
        check_known(GPT2Backbone, kwargs, OPTIONS)
        sizes = {"vocabulary_size": vocabulary_size, "num_layers": num_layers, "num_heads": num_heads}
        sizes |= {"hidden_dim": hidden_dim, "intermediate_dim": intermediate_dim}
        sizes |= {"max_sequence_length": max_sequence_length}
        config = {**sizes, "dropout": dropout, **OPTIONS, **kwargs}
        _check_config(config, sizes)
        factory: dict[str, Any] = {"dtype": torch.get_default_dtype() if dtype is None else resolve_dtype(dtype)}
        self._config = config
        self.name, self.embedding_dropout = config["name"], _rate(config, "embedding")
        self.token_embedding = ReversibleEmbedding(
            vocabulary_size, hidden_dim, tie_weights=config["tie_embedding_weights"], **factory
        )
        self.position_embedding = Embedding(max_sequence_length, hidden_dim, **factory)
        self.layers = nn.ModuleList(GPT2Block(config, i, factory) for i in range(num_layers))
        self.final_norm = LayerNorm(hidden_dim, config["layer_norm_epsilon"], **factory)
        self.reset_parameters()
        self.requires_grad_(config["trainable"])

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws new weights, as the class says."""
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith(".bias"):
                parameter.zero_()
            else:
                into_residual = name.endswith((".output.weight", ".outer.weight"))
                parameter.normal_(0.0, 0.02 / math.sqrt(2 * len(self.layers)) if into_residual else 0.02)

    def new_cache(self, batch_size: int, capacity: int | None = None) -> KVCache:
        """An empty KV cache for `capacity` tokens per row (max_sequence_length if None), to pass as `cache`."""
        for name, value in (("batch_size", batch_size), ("capacity", capacity)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it takes at least 1")
        c = self._config
        heads, capacity = c["num_heads"], capacity or c["max_sequence_length"]
        size = c["hidden_dim"] // heads
        return KVCache(len(self.layers), batch_size, heads, capacity, size, dtype=self.dtype, device=self.device)

    def forward(self, inputs: dict[str, Any] | None = None, **keywords: Any) -> Tensor | GPT2Output:
        """Hidden states behind the final norm, (B, S, D).

        Called with a dict, as in Keras, or with the same names as keywords. Values are numpy arrays or tensors, on the
        host or on the model's device. All but the first two are optional:

            token_ids: (B, S) integers in [0, V).
            padding_mask: (B, Sk), nonzero marks a real token (a fraction counts as 0); None: nothing is padding.
            token_type_ids: (B, S), looked up in the token embedding and added, as in transformers.
            position_ids: (B, S) or (1, S) integers in [0, P); cached tokens + 0 .. S-1 if absent, whatever the padding.
            inputs_embeds: (B, S, D) instead of token_ids.
            attention_mask: (B, 1 or H, S, Sk), bool (True: may look) or added to the scores. It replaces the causal
                rule; padding_mask still hides keys.
            packed: True says that each row holds several texts, and that a text starts wherever position_ids does not
                continue; a token sees only its own text. Needs position_ids.
            encoder_hidden_states: (B, Se, D) for cross-attention, which is skipped without it.
            encoder_padding_mask: (B, Se), as padding_mask.
            cache: from new_cache; holds the earlier tokens and gets these. The result carries no gradient. It keeps the
                encoder's keys too, so that later calls leave out encoder_hidden_states.
            return_hidden_states, return_attentions: True returns a GPT2Output; attentions are materialised for it.

        A query that sees no key gets zeros from the attention. B = 0 and S = 0 give an empty result. With skip_padding the
        states at padding are zeros.

        Raises:
            ValueError: a missing or unknown input, a wrong shape, a sequence longer than P or than the cache.
            TypeError: a wrong type or dtype. IndexError: an id out of range, where the host holds it.
        """
        given = model_inputs.gather(inputs, keywords, INPUTS)
        with torch.set_grad_enabled(torch.is_grad_enabled() and given.get("cache") is None):
            call = read(given, self._config, self.final_norm.weight)
            if self.skip_padding or skips_padding():
                empty = call.cache is None or call.cache.length == 0
                possible = empty and call.memory is None and call.attentions is None
                call.visible = call.visible.skip_padding(possible)
            x = self.run(call)
        if call.cache is not None:
            call.cache.length += x.shape[1]
        if call.hidden_states is None and call.attentions is None:
            return x
        states, attentions, cross = call.hidden_states, call.attentions, call.cross_attentions
        return GPT2Output(
            x,
            None if states is None else (*states, x),
            None if attentions is None else tuple(attentions),
            None if cross is None else tuple(cross),
        )

    def text_states(self, token_ids: Tensor, padding_mask: Tensor | None) -> Tensor:
        """(B, S) -> (B, S, D)."""
        return self(token_ids=token_ids, padding_mask=padding_mask)

    def run(self, call: Call, last: Tensor | None = None) -> Tensor:
        """The pass itself, unchecked: (B, S, D), or (B, D) at the places `last` (B,). Leaves cache.length alone."""
        visible = call.visible
        x = visible.packed(self.embed(call))
        branch: Any = None
        for layer in self.layers:
            if call.hidden_states is not None:
                call.hidden_states.append(visible.unpacked(x if branch is None else x + branch))
            x, branch = layer(x, branch, call)
        if last is None:
            return visible.unpacked(self.final_norm(x, branch)[0])
        if visible.packing is None:
            rows = torch.arange(x.shape[0], device=x.device)
            x, branch = x[rows, last], branch[rows, last]
        else:
            x, branch = (visible.packing.at(t, last) for t in (x, branch))
        return self.final_norm(x, branch)[0]

    def embed(self, call: Call) -> Tensor:
        """(B, S, D): tokens plus positions, plus token types where there are any."""
        tokens = self.token_embedding(call.token_ids) if call.inputs_embeds is None else call.inputs_embeds
        x = tokens + self.position_embedding(call.position_ids)
        if call.token_type_ids is not None:
            x = x + self.token_embedding(call.token_type_ids)
        return F.dropout(x, self.embedding_dropout) if self.training and self.embedding_dropout else x


def _rate(config: dict[str, Any], site: str) -> float:
    rate = config[f"{site}_dropout"]
    return config["dropout"] if rate is None else rate


def _check_config(config: dict[str, Any], sizes: dict[str, int]) -> None:
    check_sizes(sizes)
    check_heads(sizes["hidden_dim"], sizes["num_heads"])
    rates = {name: config[name] for name in ("embedding_dropout", "attention_dropout", "residual_dropout")}
    check_rates({"dropout": config["dropout"]} | {name: rate for name, rate in rates.items() if rate is not None})
    check_rest(config, OPTIONS)
    if not isinstance(config["activation"], str):
        raise TypeError(f"activation is {config['activation']!r}; it takes a name such as 'gelu_new'")
