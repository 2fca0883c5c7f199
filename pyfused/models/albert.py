"""ALBERT (Lan et al. 2019, arXiv:1909.11942): what are its layers, and what does one forward pass compute?

    e = token_embedding[ids] + position_embedding[positions] + segment_embedding[segments]
    x = projection(layer_norm(e))
    for i in 0 .. L-1, for each layer of group int(i / (L / G)):
        x = layer_norm(x + attention(x));  x = layer_norm(x + feed_forward(x))
    pooled = tanh(pooler(x[:, 0]))

Layers share weights: there are G groups of I layers, and L group applications. Every token sees every real token.
B batch, S sequence, E embedding_dim, D hidden_dim, H heads, F intermediate_dim, V vocabulary, P max_sequence_length.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.options import check_activation
from ..nn import Embedding, LayerNorm, Linear, Mlp, ReversibleEmbedding, SelfAttention, Visibility
from ..nn.layers import dropped
from . import inputs as model_inputs
from .backbone import Backbone
from .call import FLAGS, Call, Reader, embed_segmented
from .dtypes import resolve_dtype
from .evaluation import skips_padding
from .options import configuration, rate

INPUTS = ("token_ids", "segment_ids", "padding_mask", "position_ids", "inputs_embeds", *FLAGS)

# What Hugging Face's configuration has beyond KerasHub's constructor, then KerasHub's own keywords.
OPTIONS: dict[str, Any] = {
    "activation": "gelu_new",
    "layer_norm_epsilon": 1e-12,
    "attention_dropout": None,
    "feed_forward_dropout": None,
    "pooler": True,
    "name": None,
    "trainable": True,
}


class AlbertLayer(nn.Module):
    """One layer. Each norm adds the residual itself, which is faster than adding it in the projection before."""

    def __init__(self, config: dict[str, Any], factory: dict[str, Any]):
        super().__init__()
        d, eps = config["hidden_dim"], config["layer_norm_epsilon"]
        self.dropout, self.feed_forward_dropout = config["dropout"], rate(config, "feed_forward")
        self.attention = SelfAttention(d, config["num_heads"], dropout=rate(config, "attention"), **factory)
        self.attention_norm = LayerNorm(d, eps, **factory)
        self.feed_forward = Mlp(d, config["intermediate_dim"], config["activation"], **factory)
        self.feed_forward_norm = LayerNorm(d, eps, **factory)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        rates = (self.dropout, self.feed_forward_dropout) if self.training else (0.0, 0.0)
        branch = dropped(self.attention(x, call.visible, probabilities=call.attentions), rates[0])
        x, _ = self.attention_norm(branch, x)
        x, _ = self.feed_forward_norm(dropped(self.feed_forward(x), rates[1]), x)
        return x


class AlbertBackbone(Backbone):
    """ALBERT without a task head, as KerasHub's class of this name and transformers' AlbertModel: ids to hidden states.

    Args:
        vocabulary_size, num_layers, num_heads, embedding_dim, hidden_dim, intermediate_dim: V, L, H, E, D, F.
        num_groups, num_inner_repetitions: G and I. Application i of L uses group int(i / (L / G)), as in transformers.
            KerasHub has the same rule, but G must divide L.
        dropout: the rate of every dropout site, in training.
        max_sequence_length: P, rows of the position table.
        num_segments: rows of the segment table.
        dtype: a name or a torch.dtype; torch's default dtype if None.
        activation: "gelu_new" (tanh), "gelu" (exact), "quick_gelu", "relu", "silu", "tanh", another Hugging Face name
            for these, or a function as Keras serialises it (keras_hub>gelu_approximate).
        layer_norm_epsilon: added to the variance in every layer norm.
        attention_dropout, feed_forward_dropout: rates for the attention's probabilities and the feed-forward network's
            output; `dropout` if None. KerasHub drops that output. transformers does not: its checkpoints have 0.
        pooler: False leaves out the pooler and "pooled_output". Checkpoints of masked-token models have no pooler.
        name, trainable: KerasHub's; trainable=False freezes the parameters.

    Weights start as transformers': normal with standard deviation 0.02, biases 0, norms 1.

    Raises:
        TypeError: an argument of a wrong type, or an unknown one. ValueError: a size, rate or activation that does not fit.
    """

    predicts_tokens = False
    begins_with_cls = True

    def __init__(
        self,
        vocabulary_size: int,
        num_layers: int,
        num_heads: int,
        embedding_dim: int,
        hidden_dim: int,
        intermediate_dim: int,
        num_groups: int = 1,
        num_inner_repetitions: int = 1,
        dropout: float = 0.0,
        max_sequence_length: int = 512,
        num_segments: int = 2,
        dtype: str | torch.dtype | None = None,
        **kwargs: Any,
    ):
        super().__init__()
        named = {
            "vocabulary_size": vocabulary_size, "num_layers": num_layers, "num_heads": num_heads,
            "embedding_dim": embedding_dim, "hidden_dim": hidden_dim, "intermediate_dim": intermediate_dim,
            "num_groups": num_groups, "num_inner_repetitions": num_inner_repetitions,
            "max_sequence_length": max_sequence_length, "num_segments": num_segments, "dropout": dropout,
        }  # fmt: skip
        self._config = config = configuration(AlbertBackbone, named, OPTIONS, kwargs)
        config["activation"] = check_activation(config)
        factory: dict[str, Any] = {"dtype": resolve_dtype(dtype)}
        self.name = config["name"]
        self.token_embedding = ReversibleEmbedding(vocabulary_size, embedding_dim, **factory)
        self.position_embedding = Embedding(max_sequence_length, embedding_dim, **factory)
        self.segment_embedding = Embedding(num_segments, embedding_dim, **factory)
        self.embedding_norm = LayerNorm(embedding_dim, config["layer_norm_epsilon"], **factory)
        self.projection = Linear(embedding_dim, hidden_dim, **factory)
        self.layers = nn.ModuleList(
            nn.ModuleList(AlbertLayer(config, factory) for _ in range(num_inner_repetitions)) for _ in range(num_groups)
        )
        self.pooler = Linear(hidden_dim, hidden_dim, **factory) if config["pooler"] else None
        self.reset_parameters()
        self.requires_grad_(config["trainable"])

    def forward(self, inputs: dict[str, Any] | None = None, **keywords: Any) -> dict[str, Any]:
        """{"sequence_output": (B, S, D), the last layer's hidden states, "pooled_output": (B, D), from the first token's}.

        Called with a dict, as in Keras, or with the same names as keywords. Values are numpy arrays or tensors, on the
        host or on the model's device. All but the first three are optional:

            token_ids: (B, S) integers in [0, V).
            segment_ids: (B, S) integers in [0, num_segments); None: all are 0.
            padding_mask: (B, S), nonzero marks a real token (a fraction counts as 0); None: nothing is padding.
            position_ids: (B, S) or (1, S) integers in [0, P); 0 .. S-1 if absent; padding does not change them.
            inputs_embeds: (B, S, E) instead of token_ids.
            return_hidden_states: True adds "hidden_states": the projected embeddings, then the output of each of the
                L * I applications of a layer.
            return_attentions: True adds "attentions" (B, H, S, S): each application's probabilities before dropout, which
                are only then stored.

        A query that sees no key gets zeros from the attention. B = 0 gives an empty result. With skip_padding the states at
        padding are zeros. The pooler then reads zeros from a text that begins with padding.

        Raises:
            ValueError: a missing or unknown input, a wrong shape, a sequence longer than P, or an empty one for a
                pooler, which reads the first token.
            TypeError: a wrong type or dtype. IndexError: an id out of range, where the host holds it.
        """
        call = self._read(model_inputs.gather(inputs, keywords, INPUTS))
        if self.skip_padding or skips_padding():
            call.visible = call.visible.skip_padding(call.attentions is None)
        x = self.embed(call)
        for layer in self._applied():
            if call.hidden_states is not None:
                call.hidden_states.append(call.visible.unpacked(x))
            x = layer(x, call)
        x = call.visible.unpacked(x)
        if call.hidden_states is not None:
            call.hidden_states.append(x)
        found: dict[str, Any] = {"sequence_output": x}
        if self.pooler is not None:
            found["pooled_output"] = torch.tanh(self.pooler(x[:, 0]))
        return {**found, **call.collected()}

    def text_states(self, token_ids: Tensor, padding_mask: Tensor | None) -> Tensor:
        """(B, S) -> (B, S, D)."""
        return self(token_ids=token_ids, segment_ids=None, padding_mask=padding_mask)["sequence_output"]

    def embed(self, call: Call) -> Tensor:
        """The sum of the three embeddings, normalised and projected: the first layer's input."""
        x = embed_segmented(call, self.token_embedding, self.position_embedding, self.segment_embedding)
        x = self.embedding_norm(call.visible.packed(x))
        return self.projection(dropped(x, self._config["dropout"] if self.training else 0.0))

    def _applied(self) -> Iterator[AlbertLayer]:
        """The layers in order of application. A shared layer occurs several times."""
        groups: Any = self.layers
        depth = self._config["num_layers"]
        for i in range(depth):
            yield from groups[int(i / (depth / len(groups)))]

    def _read(self, given: dict[str, Any]) -> Call:
        read = Reader(given, self._config, self.embedding_norm.weight)
        call = read.segmented()
        call.visible = Visibility(padding_mask=read.padding("padding_mask", "(B, S)", call.size))
        if self.pooler is not None and not call.size[1]:
            name = "token_ids" if call.embeds is None else "inputs_embeds"
            raise ValueError(f"{name} has length 0; with a pooler it takes at least 1")
        return call
