"""transformers' models with random weights before and after pyfused.fuse_: T5 1.1, ALBERT, BERT and FNet base, GPT-2 124M."""

import copy
from functools import partial

import torch

import pyfused
from pyfused.bench import Calls, Case
from pyfused.bench.peers import compiled
from pyfused.bench.peers_models import exported

from .bench_albert import BASE
from .bench_albert import SMALL as SMALL_ALBERT
from .bench_gpt2 import NO_DROPOUT as NO_GPT2_DROPOUT
from .bench_gpt2 import SMALL as SMALL_GPT2
from .bench_t5 import config_of
from .models import NO_DROPOUT


def cases(setup):
    b, s, cached = (2, 9, 9) if setup.small else (8, 128, 128)
    for dtype in setup.model_dtypes:
        yield Case(f"T5 base encoder 1x{4 * s}", dtype, partial(encoder, setup, t5, (1, 4 * s), dtype))
        yield Case(f"ALBERT base {b}x{s}", dtype, partial(encoder, setup, albert, (b, s), dtype))
        yield Case(f"mT5 base encoder 1x{4 * s}", dtype, partial(encoder, setup, mt5, (1, 4 * s), dtype))
        yield Case(f"BERT base {b}x{s}", dtype, partial(encoder, setup, bert, (b, s), dtype))
        yield Case(f"BERT base {b}x{s}, half padding, skip_padding", dtype, partial(padded, setup, (b, s), dtype))
        if dtype == torch.float32:  # transformers' FNet has no half precision on a CPU
            yield Case(f"FNet base 2x{4 * s}", dtype, partial(encoder, setup, fnet, (2, 4 * s), dtype))
        yield Case(f"GPT-2 124M, prompt of {cached}", dtype, partial(prompt, setup, cached, dtype))
        if setup.device == "cpu":
            yield Case(f"GPT-2 124M, token after {cached}", dtype, partial(token, setup, cached, dtype))


def t5(setup):
    from transformers import T5EncoderModel

    return T5EncoderModel(config_of(setup))


def mt5(setup):
    from transformers import MT5Config, MT5EncoderModel

    return MT5EncoderModel(MT5Config(**config_of(setup).to_dict()))


def albert(setup):
    from transformers import AlbertConfig, AlbertModel

    return AlbertModel(AlbertConfig(**(SMALL_ALBERT if setup.small else BASE), **NO_DROPOUT))


def bert(setup):
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(**(SMALL_ALBERT if setup.small else BASE), **NO_DROPOUT), add_pooling_layer=False)


def fnet(setup):
    from transformers import FNetConfig, FNetModel

    sizes = {k: v for k, v in SMALL_ALBERT.items() if "heads" not in k} if setup.small else {}
    return FNetModel(FNetConfig(**sizes, hidden_dropout_prob=0.0))


def fused(model):
    after = copy.deepcopy(model)
    pyfused.fuse_(after)
    return after


def encoder(setup, make, shape, dtype):
    before = make(setup).to(setup.device, dtype).eval()
    after = fused(before)
    ids = torch.randint(100, shape, device=setup.device)

    def states(model, ids=ids):
        return model(ids).last_hidden_state

    return Calls(
        partial(states, after),
        partial(states, before),
        exact=lambda: states(copy.deepcopy(before).double()),
        peers={**compiled(partial(states, before)), **exported(before, states, (ids,))} if make is bert else {},
    )


def padded(setup, shape, dtype):
    """A batch of which half is padding. The states of the real tokens are compared."""
    before = bert(setup).to(setup.device, dtype).eval()
    after = copy.deepcopy(before)
    pyfused.fuse_(after, skip_padding=True)
    rows, longest = shape
    lengths = torch.linspace(longest // 8, 7 * longest // 8, rows).long()
    lengths[-1] = longest  # then the first rows are shorter, so that half of all tokens are real
    lengths[0] = max(1, rows * longest // 2 - int(lengths[1:].sum()))
    mask = (torch.arange(longest) < lengths[:, None]).long().to(setup.device)
    ids = torch.randint(100, shape, device=setup.device)

    def states(model, ids=ids, mask=mask):
        return model(ids, attention_mask=mask).last_hidden_state * mask[..., None]

    return Calls(
        partial(states, after),
        partial(states, before),
        exact=lambda: states(copy.deepcopy(before).double()),
        peers={**compiled(partial(states, before)), **exported(before, states, (ids, mask))},
    )


def gpt2(setup, dtype):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(**NO_GPT2_DROPOUT, **(SMALL_GPT2 if setup.small else {}))
    return GPT2LMHeadModel(config).to(setup.device, dtype).eval()


def prompt(setup, length, dtype):
    before = gpt2(setup, dtype)
    after, ids = fused(before), torch.randint(100, (1, length), device=setup.device)

    def logits(model):
        return model(ids, use_cache=True).logits

    return Calls(partial(logits, after), partial(logits, before), exact=lambda: logits(copy.deepcopy(before).double()))


def token(setup, cached, dtype):
    before = gpt2(setup, dtype)
    after, ids = fused(before), torch.randint(100, (1, cached + 1), device=setup.device)

    def stepping(model):
        past = model(ids[:, :cached], use_cache=True).past_key_values

        def step():
            logits = model(ids[:, cached:], past_key_values=past, use_cache=True).logits
            past.crop(-1)
            return logits

        return step

    return Calls(stepping(after), stepping(before), exact=lambda: copy.deepcopy(before).double()(ids).logits[:, -1:])
