"""GPT-2 124M with random weights beside transformers: a prompt of 128, and one generated token with 128 to 160 cached.

Both compute the last position's logits for the prompt, as generation needs them. Floor of a token: 124M weights read once.
"""

import tempfile

import torch

import pyfused
from pyfused.bench import Case
from pyfused.models._gpt2_call import Call
from pyfused.models._gpt2_decoding import prefill
from pyfused.nn import EVERYTHING

from .peers import references

PROMPT, CACHED = 128, 160


def models(device, dtype):
    """The same random weights, which dtype holds, in transformers' model, in float32, and in pyfused's."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config()).to(dtype).float()
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        mine = pyfused.GPT2Backbone.from_preset(directory, device=device, dtype=dtype)
    return mine.eval(), theirs.to(device).eval()


def last_logits(model, ids):
    """(B, V) of the last position, without a cache."""
    return model.token_embedding(model(token_ids=ids, padding_mask=None)[:, -1], reverse=True)


def cases(device):
    ids = torch.randint(50257, (1, CACHED + 1), generator=torch.Generator().manual_seed(1)).to(device)
    prompt, last = ids[:, :PROMPT], ids[:, CACHED:]
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            mine, theirs = models(device, dtype)
            cache = mine.new_cache(1, CACHED + 64)
            places = torch.arange(CACHED + 64, device=device)

            def my_prompt():
                cache.length = 0
                return prefill(mine, cache, [prompt[0].cpu().numpy()])

            def my_token():
                cache.length = CACHED
                hidden = mine.run(Call(last, places[CACHED : CACHED + 1], visible=EVERYTHING, cache=cache))
                return mine.token_embedding(hidden[:, 0], reverse=True)

            def their_prompt():
                return theirs(prompt, logits_to_keep=1, use_cache=True).logits[:, -1]

            past = theirs(ids[:, :CACHED], use_cache=True).past_key_values

            def their_token():
                out = theirs(last, past_key_values=past, use_cache=True).logits[:, -1]
                past.crop(-1)
                return out

            label = str(dtype).removeprefix("torch.")
            yield Case(
                f"prompt of {PROMPT} {label}",
                {"pyfused": my_prompt, "transformers float32": their_prompt},
                **references(mine, lambda model: last_logits(model, prompt)),
                baseline="transformers float32",
                flops=2 * 85e6 * PROMPT,
                seconds=20.0,
            )
            prefill(mine, cache, [ids[0, :CACHED].cpu().numpy()])
            yield Case(
                f"token, {CACHED} cached {label}",
                {"pyfused": my_token, "transformers float32": their_token},
                **references(mine, lambda model: last_logits(model, ids)),
                baseline="transformers float32",
                bytes=sum(p.numel() * p.element_size() for p in mine.parameters()),
                seconds=10.0,
            )
