"""One process of a distributed training step on the CPU: `python training_processes.py RANK FOLDER KIND:MODEL ...`.

Each rank computes the gradients of its half of a batch with DDP or FSDP2 over gloo. For each case, rank 0 writes the whole
batch's gradients and the parameters after one step of SGD into FOLDER.
"""

import os
import sys

import torch
import torch.distributed as dist
from compiled_cases import FAMILIES, backbone, inputs, loss_of

RANKS = 2
RATE = 0.1


def model_of(name):
    """A family's backbone, or a fused transformers model."""
    if name in FAMILIES:
        return backbone(name).train()
    import transformers

    import pyfused

    torch.manual_seed(3)
    config = transformers.GPT2Config(
        vocab_size=61, n_layer=2, n_head=4, n_embd=24, n_positions=48, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    model = transformers.GPT2Model(config).train()
    assert pyfused.fuse_(model).replaced
    return model


def loss_for(model, name, rows):
    """The mean over some rows of a batch of four."""
    given = {key: value[rows] for key, value in inputs(name if name in FAMILIES else "gpt2", 4, 9).items()}
    if name in FAMILIES:
        return loss_of(model(given))
    return loss_of(model(given["token_ids"], attention_mask=given["padding_mask"].long()).last_hidden_state)


def blocks_of(model, name):
    """The layers: FSDP2 gathers one at a time."""
    if name == "t5":
        return [*model.encoder.layers, *model.decoder.layers]
    return list(model.layers) if name in FAMILIES else list(model.h)


def whole(tensor):
    """The full tensor of a parameter or gradient that may be sharded over the ranks."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def step(kind, name, rank):
    """The full gradients and parameters after one step."""
    model = model_of(name)
    if kind == "ddp":
        call = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (RANKS,))
        for block in blocks_of(model, name):
            fully_shard(block, mesh=mesh)
        call = fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    loss_for(call, name, slice(2 * rank, 2 * rank + 2)).backward()
    grads = {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    return {"grads": grads, "after": {n: whole(p.detach()) for n, p in model.named_parameters()}}


def main():
    rank, folder, cases = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    for case in cases:
        found = step(*case.split(":"), rank)
        if rank == 0:
            torch.save(found, os.path.join(folder, f"{case}.pt"))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
