"""Which models and prompts do the generation tests use? Ones whose greedy tokens no rounding decides."""

import copy
import functools
from types import SimpleNamespace

import torch
from backbone_cases import hf_gpt2, hf_t5, like_hf

from pyfused import T5Backbone

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEW = 10
CLEAR = 0.002  # between the two best logits
LENGTHS = (1, 2, 3, 5, 9, 17, 28, 40)
# 45 steps reach each of the decoder's buckets (16, up to distance 30), and 15 steps lie past the last.
T5 = {"spread": 0.5, "vocab_size": 97, "relative_attention_num_buckets": 16, "relative_attention_max_distance": 30}
# Weights spread so widely that the two best logits are far apart; and how many tokens follow a prompt.
MODELS = {
    "gpt2": (lambda: hf_gpt2(kind="GPT2LMHeadModel", spread=0.5, vocab_size=97, n_positions=64), NEW),
    "t5, gated, untied": (
        lambda: hf_t5(**T5, seed=1, num_layers=3, num_decoder_layers=2, tie_word_embeddings=False),
        45,
    ),
    "t5, plain, tied": (lambda: hf_t5(**T5, seed=2, feed_forward_proj="relu", decoder_start_token_id=3), 45),
}


@functools.cache
def case(name):
    """A model of transformers and pyfused's, and 100 prompts with the greedy tokens of transformers' generate in float64.

    Prompts with a near tie are left out, so every right implementation gives these tokens on any processor.
    """
    make, new = MODELS[name]
    hf, generator = make(), torch.Generator().manual_seed(3)
    lengths = [LENGTHS[i] for i in torch.randint(len(LENGTHS), (150,), generator=generator).tolist()]
    prompts = [torch.randint(97, (n,), generator=generator).tolist() for n in lengths]
    wide, found = copy.deepcopy(hf).double(), {}
    options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    for length in LENGTHS:  # prompts of one length together
        rows = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        ids = torch.tensor([prompts[i] for i in rows])
        result = wide.generate(ids, attention_mask=torch.ones_like(ids), **options)
        least = margins(torch.stack(result.logits)).min(0).values.tolist()
        tokens = result.sequences[:, -new:].tolist()
        found |= {row: tokens[i] for i, row in enumerate(rows) if least[i] > CLEAR}
    kept = sorted(found)[:100]
    prompts, expected = [prompts[row] for row in kept], [found[row] for row in kept]
    return SimpleNamespace(hf=hf, new=new, model=like_hf(hf).to(DEVICE), prompts=prompts, expected=expected)


def margins(logits):
    best, second = logits.topk(2).values.unbind(-1)
    return best - second


@torch.no_grad()
def logits_of(model, prompt, tokens):
    """Logits that choose the token after the prompt and after each of `tokens`, without a cache."""
    if not isinstance(model, T5Backbone):
        return model.logits(model(token_ids=torch.tensor([prompt + tokens]), padding_mask=None))[0, len(prompt) - 1 :]
    start = model.get_config()["decoder_start_token_id"]
    out = model(
        encoder_token_ids=torch.tensor([prompt]), encoder_padding_mask=None,
        decoder_token_ids=torch.tensor([[start, *tokens]]), decoder_padding_mask=None,
    )  # fmt: skip
    return model.logits(out["decoder_sequence_output"])[0]
