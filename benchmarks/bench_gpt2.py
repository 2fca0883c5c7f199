"""GPT-2 124M with random weights beside transformers: a prompt of 128, a generated token of one text or eight with 160 cached,
a training step.

For the prompt both compute only the last position's logits, as in generation. Lower bound of a token: reading 124M weights
once: 498 MB in float32, 124 in int8, 86 in int4, whose head is int8. On a GPU a token is one CUDA graph, which
benchmarks/gpu.py measures.
"""

from functools import partial
from itertools import product

import torch

import pyfused
from pyfused.bench import Case
from pyfused.bench.peers import compiled
from pyfused.bench.peers_models import INT8, gpt2_prompt, gpt2_token
from pyfused.generation.gpt2 import GPT2Decoding, prefill
from pyfused.weight_format import FORMATS

from .models import model_calls, pair, train_calls

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
SMALL = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 101}


def cases(setup):
    prompt, cached = (9, 12) if setup.small else (128, 160)
    for dtype in setup.model_dtypes:
        yield Case(f"prompt of {prompt}", dtype, partial(first, setup, prompt, dtype))
        if setup.device == "cpu" and dtype == torch.float32:
            name = f"int8 dynamic prompt of {prompt}"
            yield Case(name, dtype, partial(first, setup, prompt, dtype, weights="int8", dynamic=True))
        if setup.device == "cpu":
            for texts, weights in product((1, 8), (None, *FORMATS)):
                if weights is None or dtype == torch.float32:
                    what = "token" if texts == 1 else f"{texts} texts, a token each"
                    name = f"{weights} {what}" if weights else what
                    yield Case(f"{name}, {cached} cached", dtype, partial(token, setup, cached, dtype, weights, texts))
        yield Case(f"train 1x{prompt}", dtype, partial(train, setup, prompt, dtype))


def models(setup, dtype, length, *quantized, texts=1):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(**NO_DROPOUT, **(SMALL if setup.small else {}))
    ids = torch.randint(config.vocab_size, (texts, length), device=setup.device)
    return *pair(GPT2LMHeadModel, config, pyfused.GPT2Backbone, setup, dtype, *quantized), ids


def last_logits(ids, model):
    """The logits (B, V) of the last position, computed without a cache."""
    return model.logits(model(token_ids=ids, padding_mask=None)[:, -1])


def first(setup, length, dtype, weights=None, dynamic=False):
    """weights, dynamic: as pair's. Rows of integers are beside the peers with int8 weights."""
    mine, theirs, ids = models(setup, dtype, length, weights, dynamic)
    cache, prompt = mine.new_cache(1, length + 64), [ids[0].cpu().numpy()]

    def fill():
        cache.length = 0
        return mine.logits(prefill(mine, cache, prompt))

    def their_prompt(model):
        return model(ids, logits_to_keep=1, use_cache=True).logits[:, -1]

    peers = gpt2_prompt(theirs, ids)
    peers = {INT8: peers[INT8]} if weights else {**compiled(partial(their_prompt, theirs)), **peers}
    return model_calls(mine, theirs, partial(last_logits, ids), their_prompt, run=fill, peers=peers, loose=(INT8,))


def token(setup, cached, dtype, weights=None, texts=1):
    """weights: "int8" or "int4", beside the peers with int8 weights. All have the rounded weights."""
    mine, theirs, ids = models(setup, dtype, cached + 1, weights, texts=texts)
    decoding, last = GPT2Decoding(mine, (texts, cached + 64)), ids[:, cached:]
    decoding.start([text[:cached].cpu().numpy() for text in ids])
    past = theirs(ids[:, :cached], use_cache=True).past_key_values

    def step():
        decoding._cache.length, decoding._lengths = cached, [cached] * texts
        return decoding.step(last[:, 0])

    def their_token(model):
        logits = model(last, past_key_values=past, use_cache=True).logits[:, -1]
        past.crop(-1)
        return logits

    peers = gpt2_token(theirs, ids) if texts == 1 else {}  # CTranslate2 hands out the tokens of one text alone
    peers = {INT8: peers[INT8]} if weights and peers else peers
    return model_calls(mine, theirs, partial(last_logits, ids), their_token, run=step, peers=peers, loose=(INT8,))


def train(setup, length, dtype):
    mine, theirs, ids = models(setup, dtype, length)

    def states(model):
        return model(token_ids=ids, padding_mask=None)

    return train_calls(mine, theirs, states, lambda model: model.transformer(ids, use_cache=False).last_hidden_state)
