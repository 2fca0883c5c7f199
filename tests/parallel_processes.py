"""Four processes on the CPU, over gloo: `python parallel_processes.py FOLDER`. What does each compute when models are spread?

This process imports everything once and forks the ranks; it has started no threads. Rank r writes FOLDER/rank{r}.pt:
{case: what it found}. STEPS: "tp2:<family>", "tp4:<family>" (tensor parallelism over two or four ranks), "fsdp:<family>"
(fully_shard over four), "2d:<family>" (both, two by two). The others: TOKENS, FUSED, and "states", "operators".
"""

import os
import sys

import parallel_transformers
import torch
import torch._dynamo  # fully_shard imports it at its first call
import torch.distributed as dist
import torch.multiprocessing as mp
from compiled_cases import backbone, inputs, loss_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module

import pyfused
import pyfused.nn.tensor_parallel
from pyfused.nn.packed_heads import from_heads

RANKS, RATE = 4, 0.1
STEPS = ("tp2:gpt2", "tp4:albert", "tp4:t5", "tp4:fnet", "fsdp:t5", "2d:gpt2", "2d:t5")
TOKENS = ("tp2:gpt2", "tp4:t5")
FUSED = tuple(f"tp2:{name}" for name in parallel_transformers.NAMES)
PROMPTS = [[5, 9, 33, 2], [7], [60, 1, 1, 48, 20, 11]]


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def unpacked(model, name, tensor):
    """A gradient in the shape that it has on one device."""
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
    return generated(pyfused.Generator(spread(name, kind, mesh)))


def generated(generator):
    return {
        "greedy": generator.generate(PROMPTS, 6),
        "drawn": generator.generate(PROMPTS, 6, temperature=0.8, seed=3),
        "beams": generator.generate(PROMPTS, 5, num_beams=3, stop_token_ids=[4]),
        "batch": generator.generate_batch(PROMPTS, 5, rows=2),
    }


def states(mesh):
    """What a call collects: all heads' probabilities, and hidden states. The custom mask differs by heads."""
    given = inputs("gpt2", 2, 7) | {"attention_mask": masks(), "return_attentions": True, "return_hidden_states": True}
    found = spread("gpt2", "tp2", mesh)(given)
    return {"attentions": found.attentions, "hidden_states": found.hidden_states, "out": found.last_hidden_state}


def masks():
    return torch.rand(2, 4, 7, 7, generator=torch.Generator().manual_seed(1)) > 0.3


def fused(name, mesh, first):
    """A fused transformers model under torch's own styles: outputs and greedy tokens. first: whether fuse_ comes first."""
    model = parallel_transformers.model_of(name).eval()
    if first:
        assert pyfused.fuse_(model).replaced
    parallelize_module(model, mesh["tp"], parallel_transformers.plan_of(name))
    parallel_transformers.divide_heads(model, name, 2)
    if not first:
        assert pyfused.fuse_(model).replaced
    out = parallel_transformers.call(model, name)
    out.sum().backward()
    prompt = parallel_transformers.IDS[:1, :4]
    return out.detach(), model.generate(prompt, max_new_tokens=5, do_sample=False) if name == "gpt2" else None


def operators(mesh):
    """Operators on DTensors: rows are spread, weights are copies."""
    x, w = torch.randn(4, 8), torch.randn(6, 8)
    rows = distribute_tensor(x, mesh["tp"], [Shard(0)], src_data_rank=None)
    weight = distribute_tensor(w, mesh["tp"], [Replicate()], src_data_rank=None).requires_grad_()
    norm = distribute_tensor(w[0], mesh["tp"], [Replicate()], src_data_rank=None)
    found = {"linear": pyfused.linear(rows, weight), "rms_norm": pyfused.rms_norm(rows, norm)}
    found["linear"].sum().backward()
    return {name: whole(y.detach()) for name, y in found.items()} | {"grad": whole(weight.grad), "x": x, "w": w}


def run(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    two = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    mesh = {"dp": two["dp"], "tp": two["tp"], "all": init_device_mesh("cpu", (RANKS,), mesh_dim_names=("all",))}
    found = {}
    for kind, name in (case.split(":") for case in STEPS):
        found[f"{kind}:{name}"] = step(name, kind, mesh, rank)
    for kind, name in (case.split(":") for case in TOKENS):
        found[f"tokens {kind}:{name}"] = tokens(name, kind, mesh)
    for kind, name in (case.split(":") for case in FUSED):
        found[f"fused {kind}:{name}"] = fused(name, mesh, first=name != "albert")
    torch.manual_seed(2)
    found |= {"states": states(mesh), "operators": operators(mesh)}
    torch.save(found, os.path.join(folder, f"rank{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    for made in map(parallel_transformers.model_of, parallel_transformers.NAMES):
        pyfused.fuse_(made)  # imports what every rank would import again
    mp.start_processes(run, (sys.argv[1],), RANKS, start_method="fork")
