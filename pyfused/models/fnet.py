"""FNet (Lee-Thorp et al. 2021, arXiv:2105.03824): what are its layers, and what does one forward pass compute?

    x = norm(token_embedding[ids] + position_embedding[positions] + segment_embedding[segments]) W + b
    for each layer:  x = norm(x + mix(x));  x = norm(x + feed_forward(x))
    pooled = tanh(x[0] W + b)

mix is the real part of the Fourier transform over sequence and features. It has no parameters. It mixes every position into
every other, so padding cannot be left out.
B batch, S sequence, D hidden_dim, F intermediate_dim, V vocabulary, P places, T segments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.options import check_activation
from ..families import FAMILIES
from ..nn import Embedding, FourierMixing, LayerNorm, Linear, Mlp, ReversibleEmbedding
from ..nn.layers import dropped
from ..nn.wide import widened
from . import inputs as model_inputs
from .backbone import Backbone
from .call import Call, Reader, embed_segmented
from .dtypes import resolve_dtype
from .options import configuration

INPUTS = ("token_ids", "segment_ids", "position_ids", "inputs_embeds", "return_hidden_states", "padding_mask")

# What Hugging Face's configuration has beyond KerasHub's constructor, then KerasHub's own keywords.
OPTIONS: dict[str, Any] = {
    "activation": "gelu_new",
    "layer_norm_epsilon": 1e-12,
    "pooler": True,
    "name": None,
    "trainable": True,
}


class FNetLayer(nn.Module):
    """One layer: mixing and feed-forward network, each followed by residual and norm."""

    def __init__(self, config: dict[str, Any], factory: dict[str, Any]):
        super().__init__()
        d, eps = config["hidden_dim"], config["layer_norm_epsilon"]
        self.dropout = config["dropout"]
        self.mixing = FourierMixing()
        self.mixing_norm = LayerNorm(d, eps, **factory)
        self.feed_forward = Mlp(d, config["intermediate_dim"], config["activation"], **factory)
        self.feed_forward_norm = LayerNorm(d, eps, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        stream = widened(x)  # a sum over S * D elements may be more than float16 holds
        x, _ = self.mixing_norm(self.mixing(stream), stream)
        if self.training and self.dropout:
            return self.feed_forward_norm(dropped(self.feed_forward(x), self.dropout), x)[0]
        return self.feed_forward_norm(self.feed_forward(x, x))


class FNetBackbone(Backbone):
    """FNet without a task head, as KerasHub's class of this name and transformers' FNetModel: ids to hidden states.

    Args:
        vocabulary_size, num_layers, hidden_dim, intermediate_dim: V, L, D, F.
        dropout: the rate of every dropout site, in training: behind the embeddings' projection and each feed-forward network.
        max_sequence_length: P, rows of the position table.
        num_segments: T, rows of the segment table.
        dtype: a name or a torch.dtype; torch's default dtype if None. Fourier transforms use float32 or wider.
        activation: "gelu_new" (tanh), "gelu" (exact), "quick_gelu", "relu", "silu", "tanh", or another Hugging Face name
            for these.
        layer_norm_epsilon: added to the variance in every layer norm.
        pooler: False leaves out the pooler, and "pooled_output" with it.
        name, trainable: KerasHub's; trainable=False freezes the parameters.

    Weights start as transformers': normal with standard deviation 0.02, biases 0, norms 1. (KerasHub: biases 0.02 too.)

    Raises:
        TypeError: an argument of a wrong type, or an unknown one. ValueError: a size, rate or activation that does not fit.
    """

    texts = FAMILIES["fnet"].texts
    begins_with_cls = True

    def __init__(
        self,
        vocabulary_size: int,
        num_layers: int,
        hidden_dim: int,
        intermediate_dim: int,
        dropout: float = 0.1,
        max_sequence_length: int = 512,
        num_segments: int = 4,
        dtype: str | torch.dtype | None = None,
        **kwargs: Any,
    ):
        super().__init__()
        named = {
            "vocabulary_size": vocabulary_size, "num_layers": num_layers, "hidden_dim": hidden_dim,
            "intermediate_dim": intermediate_dim, "max_sequence_length": max_sequence_length,
            "num_segments": num_segments, "dropout": dropout,
        }  # fmt: skip
        self._config = config = configuration(FNetBackbone, named, OPTIONS, kwargs)
        config["activation"] = check_activation(config)
        factory: dict[str, Any] = {"dtype": resolve_dtype(dtype)}
        self.name, self.dropout = config["name"], dropout
        self.token_embedding = ReversibleEmbedding(vocabulary_size, hidden_dim, **factory)
        self.position_embedding = Embedding(max_sequence_length, hidden_dim, **factory)
        self.segment_embedding = Embedding(num_segments, hidden_dim, **factory)
        self.embedding_norm = LayerNorm(hidden_dim, config["layer_norm_epsilon"], **factory)
        self.projection = Linear(hidden_dim, hidden_dim, **factory)
        self.layers = nn.ModuleList(FNetLayer(config, factory) for _ in range(num_layers))
        self.pooler = Linear(hidden_dim, hidden_dim, **factory) if config["pooler"] else None
        self.reset_parameters()
        self.requires_grad_(config["trainable"])

    def forward(self, inputs: dict[str, Any] | None = None, **keywords: Any) -> dict[str, Any]:
        """{"sequence_output": (B, S, D), the last layer's hidden states, "pooled_output": (B, D), the pooler's result for the
        first of them}.

        Called with a dict, as in Keras, or with the same names as keywords. Values are numpy arrays or tensors, on the
        host or on the model's device. All but the first two are optional:

            token_ids: (B, S) integers in [0, V).
            segment_ids: (B, S) integers in [0, T); None: all are 0.
            position_ids: (B, S) or (1, S) integers in [0, P); 0 .. S-1 if absent.
            inputs_embeds: (B, S, D) instead of token_ids.
            padding_mask: only None. FNet has no mask: give texts of equal length, or one at a time.
            return_hidden_states: True adds "hidden_states": the projected embeddings, then the output of each layer.

        B = 0 and S = 0 give an empty result; without a first hidden state "pooled_output" is 0.

        Raises:
            ValueError: a missing or unknown input, a padding mask, a wrong shape, a sequence longer than P.
            TypeError: a wrong type or dtype. IndexError: an id out of range, where the host holds it.
        """
        given = model_inputs.gather(inputs, keywords, INPUTS)
        if given.get("padding_mask") is not None:
            raise ValueError(
                "padding_mask is given; FNet mixes every position into every other, padding too, and has no mask: it takes "
                "None, and texts of equal length, or one at a time"
            )
        call = Reader(given, self._config, self.embedding_norm.weight).segmented()
        x = self.run(call)
        found: dict[str, Any] = {"sequence_output": x}
        if self.pooler is not None:
            found["pooled_output"] = torch.tanh(self.pooler(x[:, 0])) if x.shape[1] else x.new_zeros(x.shape[::2])
        return {**found, **call.collected()}

    def text_states(self, token_ids: Tensor, padding_mask: Tensor | None) -> Tensor:
        """(B, S) -> (B, S, D); padding_mask is None."""
        return self(token_ids=token_ids, segment_ids=None, padding_mask=padding_mask)["sequence_output"]

    def run(self, call: Call) -> Tensor:
        """The pass itself, unchecked: (B, S, D)."""
        x = self.embed(call)
        for layer in self.layers if x.shape[1] else ():  # no Fourier transform has length 0
            if call.hidden_states is not None:
                call.hidden_states.append(x)
            x = layer(x)
        if call.hidden_states is not None:
            call.hidden_states.append(x)
        return x

    def embed(self, call: Call) -> Tensor:
        """(B, S, D): the sum of the three embeddings, normalised and projected."""
        x = embed_segmented(call, self.token_embedding, self.position_embedding, self.segment_embedding)
        return dropped(self.projection(self.embedding_norm(x)), self.dropout if self.training else 0.0)
