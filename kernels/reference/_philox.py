"""Which probabilities does dropout keep? Philox4x32-10 (Salmon et al. 2011), the same bits on every backend.

For query i, key j and flat head n = batch * H + head, the generator has key (seed mod 2^32, seed >> 32) and counter
(j >> 2, i, n, 0). It gives four words, and word j & 3 belongs to (i, j). Dropout keeps (i, j) if word >= round(p * 2^32).
"""

import torch

_M0, _M1, _W0, _W1, _MASK = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85, 0xFFFFFFFF


def threshold(p: float) -> int:
    """A word below this is dropped."""
    return min(round(p * 2**32), _MASK)


def _multiply(a, b: int):
    """High and low 32 bits of the 64-bit product; int64 would overflow, so the factor is split at 16 bits."""
    low = (a & 0xFFFF) * b
    high = (a >> 16) * b + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(seed, c0, c1, c2):
    """Four int64 tensors of 32-bit words for the counter (c0, c1, c2, 0); `seed` is an int64 tensor of one element."""
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    c3 = torch.zeros_like(c0)
    for _ in range(10):
        h0, l0 = _multiply(c0, _M0)
        h1, l1 = _multiply(c2, _M1)
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def keep_mask(seed, p: float, shape):
    """Boolean (B, H, Sq, Sk): True where dropout with probability p keeps."""
    b, h, sq, sk = shape
    quads = (sk + 3) // 4
    n, i, q = torch.meshgrid(*(torch.arange(size, device=seed.device) for size in (b * h, sq, quads)), indexing="ij")
    words = torch.stack(philox(seed, q, i, n), -1).reshape(b, h, sq, 4 * quads)
    return words[..., :sk] >= threshold(p)
