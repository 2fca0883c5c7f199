"""GPT-2 124M with random weights beside transformers: a prompt of 128, and one generated token with 128 to 160 cached.

Both compute the last position's logits for the prompt, as generation needs them. Floor of a token: 124M weights read once.
"""

import tempfile

import torch

import pyfused
from pyfused.bench import Case

PROMPT, CACHED = 128, 160


def models(device, dtype):
    """The same random weights in transformers' model, in float32, and in pyfused's."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config())
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        mine = pyfused.GPT2Backbone.from_preset(directory, device=device, dtype=dtype)
    return mine.eval(), theirs.to(device).eval()


def cases(device):
    ids = torch.randint(50257, (1, CACHED + 1), generator=torch.Generator().manual_seed(1)).to(device)
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            mine, theirs = models(device, dtype)
            generator = pyfused.Generator(mine)
            prompt = ids[:, :PROMPT]
            label = str(dtype).removeprefix("torch.")
            yield Case(
                f"prompt {PROMPT} {label}",
                {
                    "pyfused": lambda: generator.prefill(prompt),
                    "transformers": lambda: theirs(prompt, logits_to_keep=1).logits[:, -1],
                },
                baseline="transformers",
                flops=2 * 85e6 * PROMPT,
                tolerance=1e-3 if dtype == torch.float32 else 5e-2,
                rounds=15,
            )
            past = theirs(ids[:, :CACHED], use_cache=True).past_key_values
            last = ids[:, CACHED:]

            def step(past=past, last=last):
                out = theirs(last, past_key_values=past, use_cache=True).logits[:, -1]
                past.crop(CACHED)
                return out

            state = generator.prefill(ids[:, :CACHED], keep=True)
            yield Case(
                f"token with {CACHED} cached {label}",
                {"pyfused": lambda: generator.peek(state, last), "transformers": step},
                baseline="transformers",
                bytes=sum(p.numel() * p.element_size() for p in mine.parameters()),
                tolerance=1e-3 if dtype == torch.float32 else 5e-2,
                rounds=40,
            )
