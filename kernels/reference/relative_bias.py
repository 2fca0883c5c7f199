"""relative_bias in plain PyTorch: the definition of truth."""

import torch

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


def sum_by_bucket(grad, bucket, num_buckets):
    """(B, H, Sq, Sk) and (Sq, Sk) -> (num_buckets, H). Without scatter the order of the sums is fixed on every device."""
    grad = grad.sum(0)
    return torch.stack([grad.masked_fill(bucket != n, 0.0).sum((-2, -1)) for n in range(num_buckets)])


def forward(table, query_length, key_length, bidirectional, max_distance, query_offset):
    """(bias,), (1, H, Sq, Sk)."""
    bucket = buckets(query_length, key_length, table.shape[0], bidirectional, max_distance, query_offset, table.device)
    return (table[bucket].permute(2, 0, 1)[None].contiguous(),)


def backward(grad_out, num_buckets, bidirectional, max_distance, query_offset):
    """(grad_table,)."""
    bucket = buckets(*grad_out.shape[2:], num_buckets, bidirectional, max_distance, query_offset, grad_out.device)
    wide = torch.float64 if grad_out.dtype == torch.float64 else torch.float32
    return (sum_by_bucket(grad_out.to(wide), bucket, num_buckets).to(grad_out.dtype),)
