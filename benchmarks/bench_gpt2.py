"""GPT-2 124M with random weights beside transformers: a prompt of 128 or eight of them, a generated token of one text or eight
with 160 cached, a training step.

For the prompt both compute only the last position's logits, as in generation. Lower bound of a token: reading 124M weights
once: 498 MB in float32, 124 in int8, 86 in int4, whose head is int8. On a GPU a token is one CUDA graph, which
benchmarks/gpu.py measures.
"""

from functools import partial
from itertools import product

import torch

import pyfused
from pyfused.bench import Case, peers_llama, peers_models
from pyfused.bench.peers import compiled
from pyfused.bench.peers_llama import LLAMA, Q8_0
from pyfused.bench.peers_models import INT8
from pyfused.generation.gpt2 import GPT2Decoding, prefill
from pyfused.weight_format import FORMATS

from .models import model_calls, pair, train_calls

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
SMALL = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 101}
INTEGERS = INT8, Q8_0
LOOSE = *INTEGERS, LLAMA


def cases(setup):
    prompt, cached = (9, 12) if setup.small else (128, 160)
    for dtype in setup.model_dtypes:
        for texts in setup.pick((1, 8), (1,), (1, 8)):
            name = f"prompt of {prompt}" if texts == 1 else f"{texts} prompts of {prompt}"
            yield Case(name, dtype, partial(first, setup, prompt, dtype, texts=texts))
            if setup.device == "cpu" and dtype == torch.float32:
                case = partial(first, setup, prompt, dtype, weights="int8", dynamic=True, texts=texts)
                yield Case(f"int8 dynamic {name}", dtype, case)
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


def beside(weights, peers):
    """The peers of a row: of integer weights, those with int8 weights."""
    return {name: peers[name] for name in INTEGERS} if weights else peers


def first(setup, length, dtype, weights=None, dynamic=False, texts=1):
    """weights, dynamic: as pair's."""
    mine, theirs, ids = models(setup, dtype, length, weights, dynamic, texts=texts)
    cache, prompts = mine.new_cache(texts, length + 64), list(ids.cpu().numpy())

    def fill():
        cache.length = 0
        return mine.logits(prefill(mine, cache, prompts))

    def their_prompt(model):
        return model(ids, logits_to_keep=1, use_cache=True).logits[:, -1]

    peers = compiled(partial(their_prompt, theirs))
    for engine in (peers_models, peers_llama):
        peers |= engine.gpt2_prompt(theirs, ids)
    peers = beside(weights, peers)
    return model_calls(mine, theirs, partial(last_logits, ids), their_prompt, run=fill, peers=peers, loose=LOOSE)


def token(setup, cached, dtype, weights=None, texts=1):
    """weights: "int8" or "int4". The peers' models have the rounded weights."""
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

    peers = beside(weights, peers_models.gpt2_token(theirs, ids) | peers_llama.gpt2_token(theirs, ids))
    return model_calls(mine, theirs, partial(last_logits, ids), their_token, run=step, peers=peers, loose=LOOSE)


def train(setup, length, dtype):
    mine, theirs, ids = models(setup, dtype, length)

    def states(model):
        return model(token_ids=ids, padding_mask=None)

    return train_calls(mine, theirs, states, lambda model: model.transformer(ids, use_cache=False).last_hidden_state)
