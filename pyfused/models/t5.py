"""T5 (Raffel et al. 2020, arXiv:1910.10683): what are its layers, and what does one forward pass compute?

    encoder:  x = embedding[source]
              for each layer:  x += attention(norm(x));  x += feed_forward(norm(x))
    decoder:  x = embedding[target]
              for each layer:  x += causal attention(norm(x));  x += attention(norm(x), to the encoder's output)
                               x += feed_forward(norm(x))
    norm(x) behind each stack; norm is the root mean square norm, and no linear map has a bias

Scores are not scaled. Self-attention adds a bias by relative position to them; each stack has one table of biases.
B batch, Se and Sd lengths of source and target, S either, D hidden_dim, H heads, d key_value_dim, F intermediate_dim,
V vocabulary, Sk keys: cached tokens plus Sd.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.options import check_activation
from ..families import FAMILIES
from ..nn import CrossAttention, GatedMlp, KVCache, Mlp, RelativeSelfAttention, ReversibleEmbedding, RMSNorm, Visibility
from ..nn.layers import dropped
from ..nn.wide import widened
from ..rules import SIZE, check
from . import inputs as model_inputs
from .backbone import Backbone
from .call import FLAGS, Call, Reader, cache_of
from .dtypes import resolve_dtype
from .evaluation import skips_padding
from .options import configuration, head_size
from .pre_norm import RelativeLayer, through

ENCODER_INPUTS = ("encoder_token_ids", "encoder_padding_mask", "encoder_inputs_embeds")
INPUTS = (
    "encoder_token_ids", "encoder_padding_mask", "decoder_token_ids", "decoder_padding_mask", "encoder_inputs_embeds",
    "encoder_sequence_output", "decoder_inputs_embeds", "cache", *FLAGS,
)  # fmt: skip

# What Hugging Face's configuration has beyond KerasHub's constructor, then KerasHub's own keywords.
OPTIONS: dict[str, Any] = {
    "num_decoder_layers": None,
    "num_buckets": 32,
    "max_distance": 128,
    "scale_logits": None,
    "decoder_start_token_id": 0,
    "name": None,
    "trainable": True,
}


class T5Stack(nn.Module):
    """The encoder or the decoder, from embeddings to hidden states behind the final norm."""

    def __init__(self, config: dict[str, Any], is_decoder: bool, factory: dict[str, Any]):
        super().__init__()
        depth = config["num_decoder_layers" if is_decoder else "num_layers"]
        self.dropout = config["dropout"]
        self.layers = nn.ModuleList(_layer(config, is_decoder, i, factory) for i in range(depth))
        self.final_norm = RMSNorm(config["hidden_dim"], config["layer_norm_epsilon"], **factory)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        """(B, S, D) -> (B, S, D). Does not change cache.length."""
        rate = self.dropout if self.training else 0.0
        visible = call.visible
        x, branch = through(self.layers, dropped(visible.packed(widened(x)), rate), call)
        x = visible.unpacked(dropped(self.final_norm(x, branch)[0], rate))
        if call.hidden_states is not None:
            call.hidden_states.append(x)
        return x


def _layer(config: dict[str, Any], is_decoder: bool, index: int, factory: dict[str, Any]) -> RelativeLayer:
    d, heads, size = config["hidden_dim"], config["num_heads"], config["key_value_dim"]
    options: dict[str, Any] = {"dropout": config["dropout"], **factory}
    kind: Any = GatedMlp if config["use_gated_activation"] else partial(Mlp, bias=False)
    return RelativeLayer(
        index,
        partial(RMSNorm, d, config["layer_norm_epsilon"], **factory),
        RelativeSelfAttention(
            d, heads, size, bidirectional=not is_decoder, num_buckets=None if index else config["num_buckets"],
            max_distance=config["max_distance"], **options,
        ),
        CrossAttention(d, heads, size, scale=1.0, bias=False, **options) if is_decoder else None,
        kind(d, config["intermediate_dim"], config["activation"], **options),
        config["dropout"],
    )  # fmt: skip


class T5Backbone(Backbone):
    """T5 without a task head, as KerasHub's class of this name and transformers' T5Model: ids to hidden states.

    Args:
        vocabulary_size, num_layers, num_heads, hidden_dim, intermediate_dim: V, layers of each stack, H, D, F.
        key_value_dim: d, the size of a head; D // H if None.
        dropout: the rate of every dropout site, in training.
        activation: "relu", "gelu" (exact), "gelu_new" (tanh), "quick_gelu", "silu", "tanh", another Hugging Face name
            for these, or a function as Keras serialises it (keras_hub>gelu_approximate).
        use_gated_activation: activation(gate(x)) * up(x) in place of activation(inner(x)).
        layer_norm_epsilon: added to the mean square in every norm.
        tie_embedding_weights: False gives token_embedding(x, reverse=True) a matrix of its own.
        dtype: a name or a torch.dtype; torch's default dtype if None. In float16 the residual stream is float32 (Flan-T5's
            does not fit into float16), and so are all hidden states but the last.
        num_decoder_layers: layers of the decoder; num_layers if None. 0 makes the encoder alone, which has `encode` and takes
            the encoder's inputs.
        num_buckets, max_distance: of the relative position bias.
        scale_logits: whether `logits` multiplies the hidden states by 1 / sqrt(D). None: if the weights are tied.
        decoder_start_token_id: the first token that generation feeds to the decoder.
        name, trainable: KerasHub's; trainable=False freezes the parameters.

    Weights start as transformers' T5: normal with standard deviation 1 for the embedding, 1 / sqrt(D d) for queries,
    1 / sqrt(inputs) for all other matrices, 1 / sqrt(D) for the bias tables; norms 1.

    Raises:
        TypeError: an argument of a wrong type, or an unknown one. ValueError: a size, rate or activation that does not fit.
    """

    texts = FAMILIES["t5"].texts

    def __init__(
        self,
        vocabulary_size: int,
        num_layers: int,
        num_heads: int,
        hidden_dim: int,
        intermediate_dim: int,
        key_value_dim: int | None = None,
        dropout: float = 0.1,
        activation: str | dict[str, Any] = "relu",
        use_gated_activation: bool = True,
        layer_norm_epsilon: float = 1e-6,
        tie_embedding_weights: bool = True,
        dtype: str | torch.dtype | None = None,
        **kwargs: Any,
    ):
        super().__init__()
        for name, default in (("num_decoder_layers", num_layers), ("scale_logits", tie_embedding_weights)):
            if kwargs.get(name) is None:
                kwargs[name] = default
        named = {
            "vocabulary_size": vocabulary_size, "num_layers": num_layers, "num_heads": num_heads,
            "hidden_dim": hidden_dim, "intermediate_dim": intermediate_dim, "key_value_dim": key_value_dim,
            "dropout": dropout, "activation": activation, "use_gated_activation": use_gated_activation,
            "layer_norm_epsilon": layer_norm_epsilon, "tie_embedding_weights": tie_embedding_weights,
        }  # fmt: skip
        self._config = config = configuration(T5Backbone, named, OPTIONS, kwargs)
        config["activation"] = check_activation(config)
        factory: dict[str, Any] = {"dtype": resolve_dtype(dtype)}
        self.name = config["name"]
        self.token_embedding = ReversibleEmbedding(
            vocabulary_size, hidden_dim, tie_weights=tie_embedding_weights, **factory
        )
        self.encoder = T5Stack(config, False, factory)
        self.decoder: Any = T5Stack(config, True, factory) if config["num_decoder_layers"] else None
        if self.decoder is None:
            self.texts, self.predicts_tokens = self.texts[:1], False
        self.logits_scale = hidden_dim**-0.5 if config["scale_logits"] else 1.0
        self.reset_parameters()
        self.requires_grad_(config["trainable"])

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws new weights, as the class's docstring says."""
        super().reset_parameters()
        size = head_size(self._config)
        for name, parameter in self.named_parameters():
            if ".query" in name:  # T5 does not scale the scores; the query weights include 1 / sqrt(d)
                parameter.narrow(0, 0, self._config["num_heads"] * size).mul_(size**-0.5)

    def _spread(self, name: str, parameter: Tensor) -> float:
        if name.startswith("token_embedding"):
            return 1.0
        return float(self._config["hidden_dim"] if name.endswith("relative_bias") else parameter.shape[-1]) ** -0.5

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """An empty KV cache for `capacity` decoder tokens per row, to pass as `cache`."""
        self.check_decoder("new_cache")
        check(SIZE, batch_size=batch_size, capacity=capacity)
        return cache_of(self, self.decoder.layers, batch_size, capacity)

    def forward(self, inputs: dict[str, Any] | None = None, **keywords: Any) -> dict[str, Any]:
        """Hidden states behind the final norm of each stack: {"encoder_sequence_output": (B, Se, D),
        "decoder_sequence_output": (B, Sd, D)}.

        Called with a dict, as in Keras, or with the same names as keywords. Values are numpy arrays or tensors, on the
        host or on the model's device. All but the first four are optional:

            encoder_token_ids, decoder_token_ids: (B, Se), (B, Sd) integers in [0, V).
            encoder_padding_mask, decoder_padding_mask: (B, Se), (B, Sk), nonzero marks a real token (a fraction counts
                as 0); None: nothing is padding. Padding may be on any side: T5 has no absolute positions.
            encoder_inputs_embeds, decoder_inputs_embeds: (B, S, D) instead of token ids.
            encoder_sequence_output: (B, Se, D), from an earlier call or from `encode`, instead of encoder_token_ids.
            cache: from new_cache; holds the decoder's earlier tokens and gets the new ones. The result carries no gradient.
                The cache keeps the encoder's keys and mask too, so later calls leave out all encoder inputs. Their result
                has no "encoder_sequence_output".
            return_hidden_states: True adds "encoder_hidden_states" and "decoder_hidden_states": the embeddings, then the
                output of each layer; the final norm is applied to the last.
            return_attentions: True adds "encoder_attentions", "decoder_attentions" (B, H, S, Sk) and "cross_attentions"
                (B, H, Sd, Se): each layer's probabilities before dropout, which are only then stored.

        An encoder alone takes the encoder's inputs and flags, and returns the encoder's results.

        A query that sees no key gets zeros from the attention. Empty inputs give an empty result.

        Raises:
            ValueError: a missing or unknown input, a wrong shape, more tokens than the cache takes; a decoder's input to
            an encoder alone.
            TypeError: a wrong type or dtype. IndexError: an id out of range, where the host holds it.
        """
        given = model_inputs.gather(inputs, keywords, INPUTS)
        with torch.set_grad_enabled(torch.is_grad_enabled() and given.get("cache") is None):
            encoder, decoder = self._read(self._reader(given))
            memory = decoder.memory if encoder is None else self._encoded(encoder)
            found: dict[str, Any] = {} if memory is None else {"encoder_sequence_output": memory}
            if decoder is not None:
                decoder.memory = memory
                found["decoder_sequence_output"] = self.decoder(decoder.embedded(self.token_embedding), decoder)
        if decoder is not None and decoder.cache is not None:
            decoder.cache.length += decoder.size[1]
        for side, call in (("encoder_", encoder), ("decoder_", decoder)):
            found |= {} if call is None else call.collected(side)
        return found

    def encode(self, inputs: dict[str, Any] | None = None, **keywords: Any) -> Tensor:
        """The encoder alone: encoder_token_ids (or encoder_inputs_embeds) and encoder_padding_mask -> (B, Se, D). Takes and
        raises the same as forward."""
        return self._encoded(self._read_encoder(self._reader(model_inputs.gather(inputs, keywords, ENCODER_INPUTS))))

    def _reader(self, given: dict[str, Any]) -> Reader:
        return Reader(given, self._config, self.encoder.final_norm.weight)

    def _read(self, read: Reader) -> tuple[Call | None, Any]:
        """The encoder's call and the decoder's. The encoder's is None if its states are given or the cache has its keys; the
        decoder's is None if there is no decoder."""
        given = read.given
        if self.decoder is None:
            for name, value in given.items():
                if value is not None and name not in (*ENCODER_INPUTS, *FLAGS):
                    self.check_decoder(name)
            return self._read_encoder(read), None
        call = read.tokens("decoder_", "Sd")
        past, (b, s) = read.cache(call, self.decoder.layers), call.size
        padding = read.padding("decoder_padding_mask", "(B, Sk)" if past else "(B, Sd)", (b, past + s))
        call.visible = Visibility(is_causal=True, padding_mask=padding)
        read.collect(call, cross=True)
        states = "encoder_sequence_output"
        if read.memory(call, (states, "encoder_padding_mask", *ENCODER_INPUTS)):
            return None, call
        if given.get(states) is None:
            encoder = self._read_encoder(read)
            if encoder.size[0] != b:
                name = "encoder_token_ids" if encoder.embeds is None else "encoder_inputs_embeds"
                raise ValueError(f"{name} has {encoder.size[0]} rows; it takes decoder_token_ids' batch size, {b}")
            call.memory_mask = encoder.visible.padding_mask
            return encoder, call
        for name in ("encoder_token_ids", "encoder_inputs_embeds"):
            if given.get(name) is not None:
                raise ValueError(f"{states} is given beside {name}; it takes one of the two")
        if "encoder_padding_mask" not in given:
            raise ValueError("encoder_padding_mask is missing; it takes (B, Se), or None where nothing is padding")
        return None, call

    def _read_encoder(self, read: Reader) -> Call:
        call = read.tokens("encoder_", "Se")
        call.visible = Visibility(padding_mask=read.padding("encoder_padding_mask", "(B, Se)", call.size))
        read.collect(call)
        return call

    def check_decoder(self, what: str) -> None:
        """Raises ValueError if this is an encoder alone. `what` names the feature that needs the decoder."""
        if self.decoder is None:
            raise ValueError(
                f"{what} needs the decoder, and this {type(self).__name__} is the encoder alone, as its checkpoint is "
                f"(num_decoder_layers is 0); it takes {' and '.join(ENCODER_INPUTS[:2])}, and has encode"
            )

    def text_states(self, token_ids: Tensor, padding_mask: Tensor | None) -> Tensor:
        """The encoder's hidden states: (B, S) -> (B, S, D)."""
        return self.encode(encoder_token_ids=token_ids, encoder_padding_mask=padding_mask)

    def _encoded(self, call: Call) -> Tensor:
        if self.skip_padding or skips_padding():  # distances matter, so padding between tokens must stay
            call.visible = call.visible.skip_padding(call.attentions is None, unbroken=True)
        return self.encoder(call.embedded(self.token_embedding), call)

    def logits(self, hidden: Tensor) -> Tensor:
        """The decoder's hidden states (..., D) -> (..., V)."""
        self.check_decoder("logits")
        return self.token_embedding(hidden * self.logits_scale if self.logits_scale != 1.0 else hidden, reverse=True)
