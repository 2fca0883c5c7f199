"""relative_bias on the CPU: launches csrc/cpu/relative_bias.cpp."""

import torch

from pyfused.extensions import DTYPE_CODES, cpu
from pyfused.kernels.shared.buckets import distance_buckets
from pyfused.kernels.shared.prepared import CPU, maker, prepares_launch


@prepares_launch
def forward(table, query_length, key_length, bidirectional, max_distance, query_offset):
    (num_buckets, heads), dtype = table.shape, table.dtype
    buckets = distance_buckets(bidirectional, num_buckets, max_distance)
    span = buckets.shape[0] // 2
    numbers = heads, query_length, key_length, query_offset, span, *table.stride(), DTYPE_CODES[dtype]
    kernel, new = cpu().relative_bias_forward, maker((1, heads, query_length, key_length), dtype)

    def launch(table, *_):
        bias = new()
        kernel(table, buckets, bias, *numbers)
        return (bias,)

    return launch


def backward(grad_out, num_buckets, bidirectional, max_distance, query_offset):
    _, heads, sq, sk = grad_out.shape
    buckets = distance_buckets(bidirectional, num_buckets, max_distance)
    grad_out = grad_out.contiguous()
    grad_table = torch.zeros((num_buckets, heads), dtype=torch.float32, device=CPU)
    numbers = heads, sq, sk, query_offset, buckets.shape[0] // 2, DTYPE_CODES[grad_out.dtype]
    cpu().relative_bias_backward(grad_out, buckets, grad_table, *numbers)
    return (grad_table.to(grad_out.dtype),)
