"""What does every CUDA launcher pass to its kernel besides tensors and sizes? The device and the stream.

Only the tests' host shim takes CPU tensors. It has one device with four multiprocessors and no streams.
"""

import functools

import torch

from pyfused.kernels.shared.prepared import current_stream


def where(device):
    """A function that returns every kernel's last two arguments: the device's index and the current stream's handle."""
    if device.type == "cpu":
        return lambda: (0, 0)
    index = device.index
    return lambda: (index, current_stream(index))


@functools.cache
def multiprocessors(device):
    return 4 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def shared_memory(device):
    """Bytes that one block may ask for."""
    return (
        227 * 1024 if device.type == "cpu" else torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    )
