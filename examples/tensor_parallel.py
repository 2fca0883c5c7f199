"""Generates text with a model whose weights are spread over several devices, each process with its part of them.

    torchrun --standalone --nproc-per-node 2 examples/tensor_parallel.py --preset gpt2_tiny_en --prompt "In the beginning"

Each process has one GPU, or a part of the CPU where there is none. The number of processes must divide the model's heads.
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import pyfused
from pyfused import Tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="gpt2_tiny_en")
    parser.add_argument("--prompt", default="In the beginning")
    parser.add_argument("--tokens", type=int, default=24)
    options = parser.parse_args()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        device, backend = "cuda", "nccl"
    else:
        device, backend = "cpu", "gloo"
    dist.init_process_group(backend)
    try:
        mesh = init_device_mesh(device, (dist.get_world_size(),))
        model = pyfused.Backbone.from_preset(options.preset, mesh=mesh)
        tokenizer = Tokenizer.from_preset(options.preset)
        (tokens,) = pyfused.Generator(model).generate([tokenizer.encode(options.prompt)], options.tokens)
        held = sum(p.to_local().nbytes for p in model.parameters())
        whole = sum(p.numel() * p.element_size() for p in model.parameters())
        if dist.get_rank() == 0:  # every rank has the same tokens
            print(f"rank 0 of {dist.get_world_size()} holds {held:,} of {whole:,} bytes")
            print(tokenizer.decode(tokens))
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
