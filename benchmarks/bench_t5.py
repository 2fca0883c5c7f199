"""T5 1.1 base with random weights beside transformers: an encoder's pass over 512 tokens, one generated token, a training step.

The token attends to 32 earlier tokens and to the source. Lower bound of a token: reading the weights of decoder and logits and
the source's keys and values once. On a GPU a token is one CUDA graph, which benchmarks/gpu.py measures.
"""

from functools import partial

import torch

import pyfused
from pyfused.bench import Case
from pyfused.bench.peers import compiled
from pyfused.bench.peers_models import INT8, t5_encoder, t5_token
from pyfused.generation.t5 import T5Decoding
from pyfused.weight_format import FORMATS

from .models import model_calls, pair, train_calls

SIZES = {"d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_heads": 12, "vocab_size": 32128}
SMALL = {"d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 2, "vocab_size": 101}


def cases(setup):
    source, short, cached = (9, 7, 3) if setup.small else (512, 128, 32)
    for dtype in setup.model_dtypes:
        yield Case(f"encoder, {source} tokens", dtype, partial(encoder, setup, source, dtype))
        if setup.device == "cpu" and dtype == torch.float32:
            name = f"int8 dynamic encoder, {source} tokens"
            yield Case(name, dtype, partial(encoder, setup, source, dtype, weights="int8", dynamic=True))
        if setup.device == "cpu":
            name = f"token, {cached} cached, source of {short}"
            yield Case(name, dtype, partial(token, setup, short, cached, dtype))
            for weights in FORMATS if dtype == torch.float32 else ():
                yield Case(f"{weights} {name}", dtype, partial(token, setup, short, cached, dtype, weights=weights))
        yield Case(f"train 1x{short} + {short}", dtype, partial(train, setup, short, dtype))


def config_of(setup, **more):
    from transformers import T5Config

    sizes = SMALL if setup.small else SIZES
    return T5Config(
        **sizes, feed_forward_proj="gated-gelu", dropout_rate=0.0, tie_word_embeddings=False, decoder_start_token_id=0
    )


def models(setup, dtype, length, *quantized):
    from transformers import T5ForConditionalGeneration

    config = config_of(setup)
    ids = torch.randint(config.vocab_size, (1, length), device=setup.device)
    return *pair(T5ForConditionalGeneration, config, pyfused.T5Backbone, setup, dtype, *quantized), ids


def encoder(setup, length, dtype, weights=None, dynamic=False):
    """weights, dynamic: as pair's. Rows of integers are beside the peers with int8 weights."""
    mine, theirs, ids = models(setup, dtype, length, weights, dynamic)

    def states(model):
        return model.encode(encoder_token_ids=ids, encoder_padding_mask=None)

    def their_states(model):
        return model.get_encoder()(ids).last_hidden_state

    peers = t5_encoder(theirs, ids)
    peers = {INT8: peers[INT8]} if weights else {**compiled(partial(their_states, theirs)), **peers}
    return model_calls(mine, theirs, states, their_states, peers=peers, loose=(INT8,))


def token(setup, length, cached, dtype, weights=None):
    """weights: "int8" or "int4", beside the peers with int8 weights. All have the rounded weights."""
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    mine, theirs, ids = models(setup, dtype, length, weights)
    last = torch.zeros(1, dtype=torch.int64, device=setup.device)

    def last_logits(model):
        """The logits (1, V) of the last position, computed without a cache."""
        written, masks = last.expand(1, cached + 1), {"encoder_padding_mask": None, "decoder_padding_mask": None}
        states = model(encoder_token_ids=ids, decoder_token_ids=written, **masks)
        return model.logits(states["decoder_sequence_output"][:, -1])

    decoding = T5Decoding(mine, (1, cached + 64, length))
    decoding.start([ids[0].cpu().numpy()])
    for _ in range(cached - 1):
        decoding.step(last)
    past, states = EncoderDecoderCache(DynamicCache(), DynamicCache()), theirs.get_encoder()(ids)
    for _ in range(cached):
        theirs(encoder_outputs=states, decoder_input_ids=last[:, None], past_key_values=past, use_cache=True)

    def step():
        decoding._cache.length = cached
        return decoding.step(last)

    def their_token(model):
        out = model(encoder_outputs=states, decoder_input_ids=last[:, None], past_key_values=past, use_cache=True)
        past.self_attention_cache.crop(-1)
        return out.logits[:, -1]

    peers = t5_token(theirs, ids, cached)
    peers = {INT8: peers[INT8]} if weights else peers
    return model_calls(mine, theirs, last_logits, their_token, run=step, peers=peers, loose=(INT8,))


def train(setup, length, dtype):
    mine, theirs, ids = models(setup, dtype, length)
    target = ids.roll(1, 1)

    def states(model):
        masks = {"encoder_padding_mask": None, "decoder_padding_mask": None}
        return model(encoder_token_ids=ids, decoder_token_ids=target, **masks)["decoder_sequence_output"]

    def their_states(model):
        encoded = model.get_encoder()(ids).last_hidden_state
        return model.decoder(target, encoder_hidden_states=encoded, use_cache=False).last_hidden_state

    return train_calls(mine, theirs, states, their_states)
