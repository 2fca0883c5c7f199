"""decode, one token per row through a whole decoder, beside the model's modules, one operator after the other.

Lower bound: reading the weights once, and the visible keys and values. The models are GPT-2 124M and the decoder of T5 1.1 base
with random weights; 128 tokens are cached.
"""

import copy
from functools import partial

import torch

import pyfused
from pyfused.bench import Calls, Case
from pyfused.bench.peers import backends
from pyfused.generation import plan_of
from pyfused.models.call import Call
from pyfused.nn import Visibility

MODELS = "GPT-2", "T5"
SIZES = {
    "GPT-2": {"vocabulary_size": 50257, "num_layers": 12, "num_heads": 12, "hidden_dim": 768, "intermediate_dim": 3072},
    "T5": {
        "vocabulary_size": 32128, "num_layers": 1, "num_decoder_layers": 12, "num_heads": 12, "hidden_dim": 768,
        "intermediate_dim": 2048, "key_value_dim": 64, "activation": "gelu_new", "tie_embedding_weights": False,
    },
}  # fmt: skip
SMALL = {"vocabulary_size": 101, "num_layers": 2, "num_heads": 2, "hidden_dim": 32, "intermediate_dim": 48}


def cases(setup):
    for dtype in setup.model_dtypes:
        for name in MODELS:
            for rows in setup.pick((1, 8), (1, 8), (3,)):
                yield Case(f"{name}, {rows} rows", dtype, partial(step, setup, name, rows, dtype))


def step(setup, name, rows, dtype):
    kind = pyfused.GPT2Backbone if name == "GPT-2" else pyfused.T5Backbone
    cached = 9 if setup.small else 128
    model = kind(**(SMALL | ({} if name == "GPT-2" else {"num_decoder_layers": 2}) if setup.small else SIZES[name]))
    model = model.to(setup.device, dtype).eval()
    plan, cache = plan_of(model), model.new_cache(rows, cached + 8)
    for tensor in cache.tensors:
        tensor.copy_(setup.randn(*tensor.shape, dtype=dtype))
    if name == "T5":
        heads, size = cache.signature[1:3]
        cache.cross = [(setup.randn(rows, heads, cached, size, dtype=dtype),) * 2 for _ in cache.cross]
    tokens = torch.randint(101, (rows,), device=setup.device)

    def fused(tokens):
        cache.length = cached
        return pyfused.decode(plan, tokens, cache)

    def exact():
        wide = model.new_cache(rows, cached + 8)
        wide._set([buffer.double() for buffer in cache._buffers])
        wide.cross = [None if kv is None else tuple(t.double() for t in kv) for kv in cache.cross]
        return by_modules(copy.deepcopy(model).double(), wide, cached, tokens)

    return Calls(fused, partial(by_modules, model, cache, cached), (tokens,), exact=exact, peers=backends(fused))


@torch.no_grad()
def by_modules(model, cache, cached, tokens):
    """The logits through the modules in plain PyTorch."""
    cache.length = cached
    call = Call(tokens[:, None], visible=Visibility(), cache=cache)
    with pyfused.backend("reference"):
        if isinstance(model, pyfused.T5Backbone):
            table, bidirectional, distance = model.decoder.layers[0].attention.position_bias()
            options = {"bidirectional": bidirectional, "max_distance": distance, "query_offset": cached}
            call.visible = Visibility(attn_bias=pyfused.relative_bias(table, 1, cached + 1, **options))
            return model.logits(model.decoder(model.token_embedding(call.token_ids), call)[:, 0])
        call.position_ids = torch.tensor([cached], device=tokens.device)
        return model.logits(model.run(call)[:, 0])
