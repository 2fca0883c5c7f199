"""What does every CUDA launcher tell the kernels of its tensors? Addresses, the device and the stream.

On CPU tensors, which only the tests' host shim takes, there is one device with no streams, four multiprocessors, and as much
shared memory as any chip has; a GPU is asked for its own.
"""

import functools

import torch


def pointer(tensor):
    """The address, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def where(device):
    """What each launcher takes last: the device's index and the current stream's handle."""
    if device.type == "cpu":
        return 0, 0
    stream = torch.cuda.current_stream(device)
    return stream.device_index, stream.cuda_stream


@functools.cache
def multiprocessors(device):
    return 4 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def shared_memory(device):
    """Bytes that one block may ask for."""
    return 227 * 1024 if device.type == "cpu" else torch.cuda.get_device_properties(device).shared_memory_per_block_optin
