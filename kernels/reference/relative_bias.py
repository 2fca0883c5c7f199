"""relative_bias in plain PyTorch: the definition of truth."""

import torch
import torch.nn.functional as F

from pyfused.kernels.shared.buckets import EACH, buckets_of


def buckets(query_length, key_length, num_buckets, bidirectional, max_distance, query_offset, device):
    """(Sq, Sk) int64: the bucket of the distance j - (i + query_offset) of key j from query i."""
    i = torch.arange(query_length, device=device)[:, None] + query_offset
    after = torch.arange(key_length, device=device)[None] - i
    if max_distance == EACH:
        return (after + num_buckets // 2).clamp(0, num_buckets - 1)
    distance = after.abs() if bidirectional else (-after).clamp(min=0)
    bucket = buckets_of(distance, bidirectional, num_buckets, max_distance)
    return bucket + (after > 0) * (num_buckets // 2) if bidirectional else bucket


def grad_table(grad, num_buckets, bidirectional, max_distance, query_offset):
    """(B, H, Sq, Sk) -> (num_buckets, H). Without scatter the order of the sums is fixed on every device."""
    grad, (sq, sk) = grad.sum(0), grad.shape[2:]
    if max_distance == EACH and sq and sk:
        # Row i moves to the right by sq - 1 - i, which puts each distance into a column of its own
        skewed = F.pad(grad.flip(-2), (0, sq)).flatten(-2)[:, : sq * (sq + sk - 1)].unflatten(-1, (sq, -1))
        before = num_buckets // 2 - query_offset - (sq - 1)
        return F.pad(skewed.sum(-2), (before, num_buckets - before - (sq + sk - 1))).t()
    bucket = buckets(sq, sk, num_buckets, bidirectional, max_distance, query_offset, grad.device)
    return torch.stack([grad.masked_fill(bucket != n, 0.0).sum((-2, -1)) for n in range(num_buckets)])


def forward(table, query_length, key_length, bidirectional, max_distance, query_offset):
    """(bias,), (1, H, Sq, Sk)."""
    bucket = buckets(query_length, key_length, table.shape[0], bidirectional, max_distance, query_offset, table.device)
    return (table[bucket].permute(2, 0, 1)[None].contiguous(),)


def backward(grad_out, num_buckets, bidirectional, max_distance, query_offset):
    """(grad_table,)."""
    wide = torch.float64 if grad_out.dtype == torch.float64 else torch.float32
    sums = grad_table(grad_out.to(wide), num_buckets, bidirectional, max_distance, query_offset)
    return (sums.to(grad_out.dtype),)
