"""Four processes on the CPU, over gloo: `python parallel_processes.py FOLDER`. What does each compute when models are spread?

This process imports everything once and forks the ranks; it has started no threads. Rank r writes FOLDER/rank{r}.pt:
{case: what it found}. Cases: "tp2:<family>", "tp4:<family>" (tensor parallelism over two or four ranks), "fsdp:<family>"
(fully_shard over four), "2d:<family>" (both, two by two), and some of their own.
"""

import os
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from compiled_cases import FAMILIES, backbone, inputs, loss_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module

import pyfused

RANKS, RATE = 4, 0.1
GENERATORS = ("gpt2", "t5")
PROMPTS = [[5, 9, 33, 2], [7], [60, 1, 1, 48, 20, 11]]


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def unpacked(model, name, tensor):
    """A gradient in the shape that it has on one device."""
    from pyfused.nn.packed_heads import from_heads

    return from_heads(tensor, *getattr(model.get_submodule(name.rpartition(".")[0]), "packed", (1, 1)))


def local_bytes(model):
    parts = (p.to_local() if hasattr(p, "to_local") else p for p in model.parameters())
    return sum(p.numel() * p.element_size() for p in parts)


def spread(name, kind, mesh):
    model = backbone(name).train()
    if kind != "fsdp":
        tensor = mesh["tp"] if kind != "tp4" else mesh["all"]
        parallelize_module(model, tensor, model.tensor_parallel_plan())
    if kind in ("fsdp", "2d"):
        data = mesh["dp"] if kind == "2d" else mesh["all"]
        for layer in model.blocks():
            fully_shard(layer, mesh=data)
        fully_shard(model, mesh=data)
    return model


def rows_of(kind, rank):
    """Which of the four rows of the batch this rank gets, and how many ranks share the gradient's mean."""
    if kind == "fsdp":
        return slice(rank, rank + 1)
    return slice(2 * (rank // 2), 2 * (rank // 2) + 2) if kind == "2d" else slice(0, 4)


def step(name, kind, mesh, rank):
    """The outputs, the whole gradients, the parameters after one step of SGD, and this rank's bytes."""
    model = spread(name, kind, mesh)
    given = {key: value[rows_of(kind, rank)] for key, value in inputs(name, 4, 9).items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    out = model(given)
    loss_of(out).backward()
    grads = {n: unpacked(model, n, whole(p.grad)) for n, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    out = out if isinstance(out, dict) else {"states": out}
    return {
        "out": {n: t.detach() for n, t in out.items()},
        "plain": all(type(t) is torch.Tensor for t in out.values()),
        "grads": grads,
        "after": model.full_state_dict(keep=rank == 0),
        "bytes": local_bytes(model),
    }


def tokens(name, kind, mesh):
    generator = pyfused.Generator(spread(name, kind, mesh))
    return {
        "greedy": generator.generate(PROMPTS, 6),
        "drawn": generator.generate(PROMPTS, 6, temperature=0.8, seed=3),
        "beams": generator.generate(PROMPTS, 5, num_beams=3, stop_token_ids=[4]),
        "batch": generator.generate_batch(PROMPTS, 5, rows=2),
    }


def run(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    two = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    mesh = {"dp": two["dp"], "tp": two["tp"], "all": init_device_mesh("cpu", (RANKS,), mesh_dim_names=("all",))}
    found = {}
    for name in FAMILIES:
        for kind in ("tp2", "tp4", "fsdp", "2d"):
            found[f"{kind}:{name}"] = step(name, kind, mesh, rank)
    for name in GENERATORS:
        found[f"tokens:{name}"] = {kind: tokens(name, kind, mesh) for kind in ("tp2", "tp4")}
    torch.save(found, os.path.join(folder, f"rank{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.start_processes(run, (sys.argv[1],), RANKS, start_method="fork")
