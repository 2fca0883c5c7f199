"""A greedy answer of 200 tokens by transformers' model.generate, after pyfused.fuse_: Flan-T5 base, random weights.

The answer is that of the model in float64, token by token. In half precision greedy answers part at the first two logits that
are nearly equal, so there is only a row in float32.
"""

import copy
from functools import partial

import torch

import pyfused
from pyfused.bench import Calls, Case

from .bench_t5 import config_of  # Flan-T5's shapes are those of T5 1.1


def cases(setup):
    source, tokens = (7, 5) if setup.small else (64, 200)
    yield Case(
        f"Flan-T5 base, source of {source}, {tokens} tokens", torch.float32, partial(answer, setup, source, tokens)
    )


def answer(setup, source, tokens):
    from transformers import T5ForConditionalGeneration

    before = T5ForConditionalGeneration(config_of(setup)).to(setup.device).eval()
    # Flan-T5's head has weights of its own. A head that shares random ones with the embedding repeats the first token.
    before.lm_head.weight = torch.nn.Parameter(torch.randn_like(before.lm_head.weight), requires_grad=False)
    after = copy.deepcopy(before)
    pyfused.fuse_(after)
    ids = torch.randint(2, before.config.vocab_size, (1, source), device=setup.device)
    options = {"do_sample": False, "num_beams": 1, "min_new_tokens": tokens, "max_new_tokens": tokens}

    def generate(model):
        return model.generate(ids, attention_mask=torch.ones_like(ids), **options).to(model.dtype)

    return Calls(
        partial(generate, after), partial(generate, before), exact=lambda: generate(copy.deepcopy(before).double())
    )
