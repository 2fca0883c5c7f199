"""torch.nn's layers, fused and as they are, in inference, where torch has a fast path of its own, one C++ call per layer.

Half padding is the second half of every row: a mask in a layer, left out in nn.TransformerEncoder.
"""

import copy
import warnings

import torch
from torch import nn

import pyfused
from pyfused.bench import Case

from .peers import beside, in_double

D, HEADS, INNER = 768, 12, 3072


def cases(device):
    warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors")
    warnings.filterwarnings("ignore", message="enable_nested_tensor")
    layer = nn.TransformerEncoderLayer(D, HEADS, INNER, batch_first=True)
    models = {
        "encoder layer": layer,
        "encoder layer norm_first": nn.TransformerEncoderLayer(D, HEADS, INNER, batch_first=True, norm_first=True),
        "encoder of 2 layers": nn.TransformerEncoder(layer, 2),
        "decoder layer": nn.TransformerDecoderLayer(D, HEADS, INNER, batch_first=True),
        "MultiheadAttention": nn.MultiheadAttention(D, HEADS, batch_first=True),
    }
    yield from small(device)
    for name, model in models.items():
        model = model.eval().to(device)
        fused = copy.deepcopy(model)
        pyfused.fuse_(fused)
        for batch, length in ((4, 128), (1, 512)):
            x = torch.randn(batch, length, D, device=device)
            hidden = (torch.arange(length, device=device) >= length // 2).expand(batch, -1).clone()
            for mask, label in ((None, ""), (hidden, " half padding")):
                inputs, options = arguments(name, x, mask)
                with torch.inference_mode():
                    yield Case(
                        f"{name} {batch}x{length} float32{label}",
                        beside(
                            device,
                            lambda: run(fused, inputs, options),
                            lambda: run(model, inputs, options),
                        ),
                        in_double(lambda inputs=inputs: run(copy.deepcopy(model).double(), inputs, options)),
                        flops=flops(name, batch, length) * (0.5 if label and name == "encoder of 2 layers" else 1),
                        seconds=6.0,
                    )


def small(device):
    """A layer so small that what counts is the host's work: torch makes one call where pyfused makes six."""
    for width, length in ((64, 8), (256, 16)):
        model = nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True).eval().to(device)
        fused, x = copy.deepcopy(model), torch.randn(1, length, width, device=device)
        pyfused.fuse_(fused)
        with torch.inference_mode():
            yield Case(
                f"encoder layer of width {width} 1x{length} float32",
                beside(device, lambda: fused(x), lambda: model(x)),
                in_double(lambda x=x: copy.deepcopy(model).double()(x)),
            )


def run(model, inputs, options):
    found = model(*inputs, **options)
    return found[0] if isinstance(found, tuple) else found


def arguments(name, x, mask):
    """What the module is called with."""
    if name == "MultiheadAttention":
        return (x, x, x), {"key_padding_mask": mask, "need_weights": False}
    if name == "decoder layer":
        return (x, x), {"tgt_key_padding_mask": mask, "memory_key_padding_mask": mask}
    return (x,), {"src_key_padding_mask": mask}


def flops(name, batch, length):
    """Of the products, whatever the mask hides."""
    attention = 2 * batch * length * (4 * D * D + 2 * length * D)
    network = 2 * batch * length * 2 * D * INNER
    count = {"MultiheadAttention": (1, 0), "decoder layer": (2, 1), "encoder of 2 layers": (2, 2)}
    attentions, networks = count.get(name, (1, 1))
    return attentions * attention + networks * network
