"""torch.nn's layers in inference, before and after fuse_. torch has its own fast path there: one C++ call per layer.

"half padding": the second half of every row is padding. A layer masks it; nn.TransformerEncoder leaves it out.
"""

import copy
import warnings
from functools import partial

import torch
from torch import nn

import pyfused
from pyfused.bench import Calls, Case

MODELS = {
    "encoder layer": lambda d, h, f: nn.TransformerEncoderLayer(d, h, f, batch_first=True),
    "encoder layer norm_first": lambda d, h, f: nn.TransformerEncoderLayer(d, h, f, batch_first=True, norm_first=True),
    "encoder of 2 layers": lambda d, h, f: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(d, h, f, batch_first=True), 2
    ),
    "decoder layer": lambda d, h, f: nn.TransformerDecoderLayer(d, h, f, batch_first=True),
    "MultiheadAttention": lambda d, h, f: nn.MultiheadAttention(d, h, batch_first=True),
}


def cases(setup):
    warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors")
    warnings.filterwarnings("ignore", message="enable_nested_tensor")
    sizes = (32, 2, 40) if setup.small else (768, 12, 3072)
    for dtype in setup.model_dtypes:
        if not setup.small:  # tiny layers, where the CPU's work per call counts: torch makes one call, pyfused six
            for width, length in ((64, 8), (256, 16)):
                make = partial(MODELS["encoder layer"], width, 4, 4 * width)
                name = f"encoder layer of width {width} 1x{length}"
                yield Case(name, dtype, partial(layer, setup, "encoder layer", make, (1, length, width), False, dtype))
        for name, make in MODELS.items():
            for batch, length in setup.pick([(4, 128), (1, 512)], [(32, 512)], [(2, 6)]):
                shape = batch, length, sizes[0]
                for padded in (False, True):
                    label = f"{name} {batch}x{length}{' half padding' if padded else ''}"
                    yield Case(label, dtype, partial(layer, setup, name, partial(make, *sizes), shape, padded, dtype))


def layer(setup, name, make, shape, padded, dtype):
    before = make().to(setup.device, dtype).eval()
    after = copy.deepcopy(before)
    pyfused.fuse_(after)
    x, mask = setup.randn(*shape, dtype=dtype), None
    if padded:
        length = shape[1]
        mask = (torch.arange(length, device=setup.device) >= length // 2).expand(shape[0], -1).clone()
    real = slice(0, shape[1] // 2) if padded else slice(None)  # layers differ in the rows of padding

    def run(model, x):
        count, options = arguments(name, mask)
        out = model(*[x] * count, **options)
        return (out[0] if isinstance(out, tuple) else out)[:, real]

    double = copy.deepcopy(before).double()
    return Calls(partial(run, after), partial(run, before), (x,), exact=lambda: run(double, x.double()))


def arguments(name, mask):
    """The number of tensors that the module is called with, and the options."""
    if name == "MultiheadAttention":
        return 3, {"key_padding_mask": mask, "need_weights": False}
    if name == "decoder layer":
        return 2, {"tgt_key_padding_mask": mask, "memory_key_padding_mask": mask}
    return 1, {"src_key_padding_mask": mask}
