"""T5 (Raffel et al. 2020, arXiv:1910.10683): what are its layers, and what does one forward pass compute?

    encoder:  x = embedding[source]
              for each layer:  x += attention(norm(x));  x += feed_forward(norm(x))
    decoder:  x = embedding[target]
              for each layer:  x += causal attention(norm(x));  x += attention(norm(x), to the encoder's output)
                               x += feed_forward(norm(x))
    norm(x) behind each stack; norm is the root mean square norm, and no linear map has a bias

Scores are not scaled; in self-attention they get a bias by relative position, from one table for a stack.
B batch, Se and Sd lengths of source and target, S either, D hidden_dim, H heads, d key_value_dim, F intermediate_dim,
V vocabulary, Sk keys: cached tokens plus Sd.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoints.options import check_activation
from ..nn import CrossAttention, GatedMlp, KVCache, Mlp, RelativeSelfAttention, ReversibleEmbedding, RMSNorm, Visibility
from ..nn.wide import is_wide, widened
from ..ops.attention import MAX_HEAD_SIZE
from . import inputs as model_inputs
from .backbone import Backbone, resolve_dtype
from .evaluation import skips_padding
from .options import check_heads, check_known, check_rates, check_rest, check_sizes
from .t5_call import ENCODER_INPUTS, FLAGS, INPUTS, Call, StackCall, collect, read, read_encoder

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


class T5Layer(nn.Module):
    """One layer of either stack. The residual stream x and the branch that is still to be added to it travel as a pair,
    so that each addition happens inside the next norm."""

    def __init__(self, config: dict[str, Any], is_decoder: bool, index: int, factory: dict[str, Any]):
        super().__init__()
        d, heads, size = config["hidden_dim"], config["num_heads"], config["key_value_dim"]
        eps, self.dropout, self.index = config["layer_norm_epsilon"], config["dropout"], index
        self.attention_norm = RMSNorm(d, eps, **factory)
        self.attention = RelativeSelfAttention(
            d, heads, size, bidirectional=not is_decoder, num_buckets=None if index else config["num_buckets"],
            max_distance=config["max_distance"], dropout=self.dropout, **factory,
        )  # fmt: skip
        self.cross_attention: CrossAttention | None = None
        if is_decoder:
            self.cross_attention_norm = RMSNorm(d, eps, **factory)
            self.cross_attention = CrossAttention(
                d, heads, size, scale=1.0, dropout=self.dropout, bias=False, **factory
            )
        self.feed_forward_norm = RMSNorm(d, eps, **factory)
        kind: Any = GatedMlp if config["use_gated_activation"] else partial(Mlp, bias=False)
        inner, activation = config["intermediate_dim"], config["activation"]
        self.feed_forward = kind(d, inner, activation, dropout=self.dropout, **factory)

    def forward(self, x: Tensor, branch: Tensor | None, call: StackCall) -> tuple[Tensor, Tensor]:
        """x, branch (B, S, D) -> the same pair behind this layer; the layer's output is their sum."""
        y, x = (self.attention_norm(x), x) if branch is None else self.attention_norm(x, branch)
        branch = self._drop(self.attention(y, call.visible, call.cache, self.index, call.attentions))
        if self.cross_attention is not None and (key_value := self._encoder_keys(call)) is not None:
            y, x = self.cross_attention_norm(x, branch)
            real = Visibility(padding_mask=call.memory_mask)
            branch = self._drop(self.cross_attention(y, key_value, real, call.cross_attentions))
        y, x = self.feed_forward_norm(x, branch)
        return x, self._drop(self.feed_forward(y, wide=True) if is_wide(x, y) else self.feed_forward(y))

    def _encoder_keys(self, call: StackCall) -> tuple[Tensor, Tensor] | None:
        """Projected once, and kept in the cache if there is one; None where there is nothing to look at."""
        key_value = None if call.cache is None else call.cache.cross[self.index]
        if key_value is None and call.memory is not None and self.cross_attention is not None:
            key_value = self.cross_attention.project(call.memory)
            if call.cache is not None:
                call.cache.cross[self.index] = key_value
        return None if key_value is None or not key_value[0].shape[2] else key_value

    def _drop(self, branch: Tensor) -> Tensor:
        return F.dropout(branch, self.dropout) if self.training and self.dropout else branch


class T5Stack(nn.Module):
    """The encoder or the decoder, from embeddings to hidden states behind the final norm."""

    def __init__(self, config: dict[str, Any], is_decoder: bool, factory: dict[str, Any]):
        super().__init__()
        depth = config["num_decoder_layers" if is_decoder else "num_layers"]
        self.dropout = config["dropout"]
        self.layers = nn.ModuleList(T5Layer(config, is_decoder, i, factory) for i in range(depth))
        self.final_norm = RMSNorm(config["hidden_dim"], config["layer_norm_epsilon"], **factory)

    def forward(self, x: Tensor, call: StackCall) -> Tensor:
        """(B, S, D) -> (B, S, D). Leaves cache.length alone. call.visible.attn_bias, if there, stands for the table."""
        layers: Any = self.layers
        if call.visible.attn_bias is None:
            call.visible = replace(call.visible, relative_bias=layers[0].attention.position_bias())
        visible = call.visible
        x, branch = self._drop(visible.packed(widened(x))), None
        for layer in layers:
            if call.hidden_states is not None:
                call.hidden_states.append(visible.unpacked(x if branch is None else x + branch))
            x, branch = layer(x, branch, call)
        x = visible.unpacked(self._drop(self.final_norm(x, branch)[0]))
        if call.hidden_states is not None:
            call.hidden_states.append(x)
        return x

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.training and self.dropout else x


class T5Backbone(Backbone):
    """T5 without a task head, as KerasHub's class of this name and transformers' T5Model: ids to hidden states.

    Args:
        vocabulary_size, num_layers, num_heads, hidden_dim, intermediate_dim: V, layers of each stack, H, D, F.
        key_value_dim: d, the size of a head; D // H if None.
        dropout: the rate of every dropout site, in training.
        activation: "relu", "gelu" (exact), "gelu_new" (tanh), "silu", "tanh", another of Hugging Face's names for these,
            or a function as Keras serialises it (keras_hub>gelu_approximate).
        use_gated_activation: activation(gate(x)) * up(x) in place of activation(inner(x)).
        layer_norm_epsilon: added to the mean square in every norm.
        tie_embedding_weights: False gives token_embedding(x, reverse=True) a matrix of its own.
        dtype: a name or a torch.dtype; torch's default dtype if None. In float16 the residual stream is float32 (Flan-T5's
            does not fit), and so are all hidden states but the last.
        num_decoder_layers: layers of the decoder, if not num_layers; 0 makes the encoder alone, of which `encode`, and calls
            with the encoder's inputs, work.
        num_buckets, max_distance: of the relative position bias.
        scale_logits: whether `logits` multiplies the hidden states by 1 / sqrt(D); if None, where the weights are tied.
        decoder_start_token_id: what generation feeds the decoder first.
        name, trainable: KerasHub's; trainable=False freezes the parameters.

    Weights start as transformers' T5: normal with standard deviation 1 for the embedding, 1 / sqrt(D d) for queries,
    1 / sqrt(inputs) for all other matrices, 1 / sqrt(D) for the bias tables; norms 1.

    Raises:
        TypeError: an argument of a wrong type, or an unknown one. ValueError: a size, rate or activation that does not fit.
    """

    texts: tuple[tuple[str, str | None], ...] = (
        ("encoder_token_ids", "encoder_padding_mask"), ("decoder_token_ids", "decoder_padding_mask"),
    )  # fmt: skip

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
        check_known(T5Backbone, kwargs, OPTIONS)
        config = {
            "vocabulary_size": vocabulary_size, "num_layers": num_layers, "num_heads": num_heads,
            "hidden_dim": hidden_dim, "intermediate_dim": intermediate_dim, "key_value_dim": key_value_dim,
            "dropout": dropout, "activation": activation, "use_gated_activation": use_gated_activation,
            "layer_norm_epsilon": layer_norm_epsilon, "tie_embedding_weights": tie_embedding_weights,
            **OPTIONS, **kwargs,
        }  # fmt: skip
        self._config = _checked(config)
        factory: dict[str, Any] = {"dtype": torch.get_default_dtype() if dtype is None else resolve_dtype(dtype)}
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
        """Draws new weights, as the class says."""
        c = self._config
        size = c["key_value_dim"] or c["hidden_dim"] // c["num_heads"]
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
                continue
            spread = 1.0 if name.startswith("token_embedding") else parameter.shape[-1] ** -0.5
            parameter.normal_(0.0, c["hidden_dim"] ** -0.5 if name.endswith("relative_bias") else spread)
            if ".query" in name:  # scores are not scaled: what others divide by, the weights have in them
                parameter.narrow(0, 0, c["num_heads"] * size).mul_(size**-0.5)

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """An empty KV cache for `capacity` tokens of the decoder per row, to pass as `cache`."""
        self.check_decoder("new_cache")
        check_sizes({"batch_size": batch_size, "capacity": capacity})
        c = self._config
        heads = c["num_heads"]
        size = c["key_value_dim"] or c["hidden_dim"] // heads
        return KVCache(
            len(self.decoder.layers), batch_size, heads, capacity, size, dtype=self.dtype, device=self.device
        )

    def forward(self, inputs: dict[str, Any] | None = None, **keywords: Any) -> dict[str, Any]:
        """Hidden states behind the final norm of each stack: {"encoder_sequence_output": (B, Se, D),
        "decoder_sequence_output": (B, Sd, D)}.

        Called with a dict, as in Keras, or with the same names as keywords. Values are numpy arrays or tensors, on the
        host or on the model's device. All but the first four are optional:

            encoder_token_ids, decoder_token_ids: (B, Se), (B, Sd) integers in [0, V).
            encoder_padding_mask, decoder_padding_mask: (B, Se), (B, Sk), nonzero marks a real token (a fraction counts
                as 0); None: nothing is padding. Padding may be on any side: T5 has no absolute positions.
            encoder_inputs_embeds, decoder_inputs_embeds: (B, S, D) instead of token ids.
            encoder_sequence_output: (B, Se, D), of an earlier call or of `encode`, instead of encoder_token_ids.
            cache: from new_cache; holds the decoder's earlier tokens and gets these. The result carries no gradient.
                It keeps the encoder's keys and mask too, so that later calls leave out all encoder inputs; their
                result has no "encoder_sequence_output".
            return_hidden_states: True adds "encoder_hidden_states" and "decoder_hidden_states": the embeddings, then the
                output of each layer, of which the last is behind the final norm.
            return_attentions: True adds "encoder_attentions", "decoder_attentions" (B, H, S, Sk) and "cross_attentions"
                (B, H, Sd, Se): each layer's probabilities before dropout, materialised for it.

        An encoder alone takes the encoder's inputs and flags, and gives what is the encoder's.

        A query that sees no key gets zeros from the attention. Empty inputs give an empty result.

        Raises:
            ValueError: a missing or unknown input, a wrong shape, more tokens than the cache takes; an input of the decoder
            where there is none.
            TypeError: a wrong type or dtype. IndexError: an id out of range, where the host holds it.
        """
        given = model_inputs.gather(inputs, keywords, INPUTS)
        if self.decoder is None:
            return self._encoder_alone(given)
        with torch.set_grad_enabled(torch.is_grad_enabled() and given.get("cache") is None):
            call = read(given, self._config, self.token_embedding.weight)
            encoded = call.memory if call.encoder is None else self._encoded(call.encoder)
            call.decoder.memory = encoded
            decoded = self.decoder(self._embed(call.decoder), call.decoder)
        if call.decoder.cache is not None:
            call.decoder.cache.length += decoded.shape[1]
        found = {} if encoded is None else {"encoder_sequence_output": encoded}
        return {**found, "decoder_sequence_output": decoded, **{name: tuple(kept) for name, kept in call.asked.items()}}

    def encode(self, inputs: dict[str, Any] | None = None, **keywords: Any) -> Tensor:
        """The encoder alone: encoder_token_ids (or encoder_inputs_embeds) and encoder_padding_mask, as forward takes them
        and raising as it does -> (B, Se, D)."""
        given = model_inputs.gather(inputs, keywords, ENCODER_INPUTS)
        return self._encoded(read_encoder(given, self._config, self.token_embedding.weight))

    def _encoder_alone(self, given: dict[str, Any]) -> dict[str, Any]:
        """forward without a decoder."""
        for name, value in given.items():
            if value is not None and name not in (*ENCODER_INPUTS, *FLAGS):
                self.check_decoder(name)
        encoder = read_encoder(given, self._config, self.token_embedding.weight)
        call = Call(encoder, None)
        collect(call, given)
        encoded = self._encoded(encoder)
        return {"encoder_sequence_output": encoded, **{name: tuple(kept) for name, kept in call.asked.items()}}

    def check_decoder(self, what: str) -> None:
        """Raises ValueError where this is the encoder alone. `what` needs the decoder."""
        if self.decoder is None:
            raise ValueError(
                f"{what} needs the decoder, and this {type(self).__name__} is the encoder alone, as its checkpoint is "
                f"(num_decoder_layers is 0); it takes {' and '.join(ENCODER_INPUTS[:2])}, and has encode"
            )

    def text_states(self, token_ids: Tensor, padding_mask: Tensor | None) -> Tensor:
        """The encoder's: (B, S) -> (B, S, D)."""
        return self.encode(encoder_token_ids=token_ids, encoder_padding_mask=padding_mask)

    def _encoded(self, call: StackCall) -> Tensor:
        if self.skip_padding or skips_padding():  # distances count, so that padding between tokens has to stay
            call.visible = call.visible.skip_padding(call.attentions is None, unbroken=True)
        return self.encoder(self._embed(call), call)

    def logits(self, hidden: Tensor) -> Tensor:
        """The decoder's hidden states (..., D) -> (..., V)."""
        self.check_decoder("logits")
        return self.token_embedding(hidden * self.logits_scale if self.logits_scale != 1.0 else hidden, reverse=True)

    def _embed(self, call: StackCall) -> Tensor:
        return self.token_embedding(call.token_ids) if call.embeds is None else call.embeds


def _checked(config: dict[str, Any]) -> dict[str, Any]:
    """Fills in what follows from other arguments."""
    if config["num_decoder_layers"] is None:
        config["num_decoder_layers"] = config["num_layers"]
    if config["scale_logits"] is None:
        config["scale_logits"] = config["tie_embedding_weights"]
    sizes = ["vocabulary_size", "num_layers", "num_heads", "hidden_dim", "intermediate_dim"]
    if config["num_decoder_layers"] != 0 or isinstance(config["num_decoder_layers"], bool):
        sizes.append("num_decoder_layers")
    check_sizes({name: config[name] for name in (*sizes, "num_buckets", "max_distance")})
    if config["key_value_dim"] is None:
        check_heads(config["hidden_dim"], config["num_heads"])
    else:
        check_sizes({"key_value_dim": config["key_value_dim"]})
        if config["key_value_dim"] > MAX_HEAD_SIZE:
            raise ValueError(f"key_value_dim is {config['key_value_dim']}; it takes at most {MAX_HEAD_SIZE}")
    check_rates({"dropout": config["dropout"]})
    flags = {"use_gated_activation": True, "tie_embedding_weights": True, "scale_logits": True}
    check_rest(config, OPTIONS | flags)
    start, vocabulary = config["decoder_start_token_id"], config["vocabulary_size"]
    if isinstance(start, bool) or not isinstance(start, int):
        raise TypeError(f"decoder_start_token_id is {start!r}; it takes a token id")
    if not 0 <= start < vocabulary:
        raise ValueError(f"decoder_start_token_id is {start}; it takes a token id below vocabulary_size = {vocabulary}")
    config["activation"] = check_activation(config)
    return config
