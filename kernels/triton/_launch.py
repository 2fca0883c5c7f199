"""How does a Triton kernel start? On the device of its first tensor, in a grid that a GPU takes."""

import torch

GRID_LIMITS = (2**31 - 1, 65535, 65535)


def launch(kernel, grid, tensor, *args, **options):
    """kernel[grid](tensor, *args, **options), on the tensor's device and its current stream. Triton itself starts a kernel on
    the current device, which need not be where the tensors are.

    Raises:
        ValueError: a grid beyond GRID_LIMITS, which a GPU would refuse without a name.
    """
    for blocks, most in zip(grid, GRID_LIMITS):
        if blocks > most:
            raise ValueError(f"{kernel.fn.__name__}: a grid of {tuple(grid)} programs; a GPU takes {GRID_LIMITS}")
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        with torch.cuda.device(tensor.device):
            kernel[grid](tensor, *args, **options)
    else:
        kernel[grid](tensor, *args, **options)
