"""What is attention in plain PyTorch? Every attention test compares with this."""

import torch

from pyfused.kernels.reference._philox import keep_mask


def plain(inputs, options, seed=None, logarithm=False):
    """Softmax attention in plain PyTorch, every step in the inputs' dtype; rows that see no key are zeros.

    logarithm: computes softmax as exp(s - logsumexp(s)), for comparing gradients. A kernel that keeps one log-sum-exp per
    row for the backward instead of the probabilities, as SDPA's flash kernels do, has that number's rounding in its gradients.
    """
    query, key, value = inputs["query"], inputs["key"], inputs["value"]
    group, (sq, d), sk = query.shape[1] // key.shape[1], query.shape[2:], key.shape[2]
    scale = options["scale"] if options["scale"] is not None else d**-0.5
    s = query @ key.repeat_interleave(group, 1).transpose(-1, -2) * scale
    if "attn_bias" in inputs:
        s = s + inputs["attn_bias"]
    if options["is_causal"]:
        s = s.masked_fill(torch.ones(sq, sk, device=s.device).tril(sk - sq) == 0, -torch.inf)
    if "padding_mask" in options:
        s = s.masked_fill(~options["padding_mask"][:, None, None], -torch.inf)
    dead = (s == -torch.inf).all(-1, keepdim=True)
    s = s.masked_fill(dead, 0)
    p = ((s - s.logsumexp(-1, keepdim=True)).exp() if logarithm else torch.softmax(s, -1)).masked_fill(dead, 0)
    if seed is not None:
        p = p * keep_mask(seed, options["dropout_p"], p.shape) / (1 - options["dropout_p"])
    return p @ value.repeat_interleave(group, 1)
