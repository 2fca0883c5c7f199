"""What does loading a part of T5-XXL take? `python large_checkpoints.py FOLDER TARGET` prints JSON: bytes of memory.

`write` makes a checkpoint in shards with real shapes over holes: the files take no room on the disk, and read as zeros. TARGET
is "whole" (this process), or "RANK/RANKS" (one rank of a simulated mesh; the others do not exist).
"""

import json
import sys
from pathlib import Path

# google/t5-v1_1-xxl: 11 billion parameters
XXL = {"vocab_size": 32128, "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24,
       "num_decoder_layers": 24, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}  # fmt: skip


def write(folder: Path, shard_bytes: int, **changes) -> tuple[int, int]:
    """Writes the shards, in bfloat16. Returns the bytes of all and of the largest."""
    from pyfused.checkpoints import t5
    from pyfused.checkpoints.layer_plans import hf_plan

    config = {"model_type": "t5", "torch_dtype": "bfloat16", **XXL, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    plan = hf_plan(t5, t5.config_from_hf(config, folder / "config.json"))
    shapes = {piece.name: piece.shape for target in plan.values() for piece in target.pieces}
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    sizes = [0]
    for name, shape in shapes.items():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        if sizes[-1] and sizes[-1] + size > shard_bytes:
            shards.append({})
            sizes.append(0)
        shards[-1][name] = shape
        sizes[-1] += size
    where = {}
    for number, shard in enumerate(shards, 1):
        file = folder / f"model-{number:05}-of-{len(shards):05}.safetensors"
        where |= dict.fromkeys(shard, file.name)
        header, end = {}, 0
        for name, shape in shard.items():
            begin, end = end, end + 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        with file.open("wb") as opened:
            opened.write(len(text).to_bytes(8, "little") + text)
            opened.truncate(8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return sum(sizes), max(sizes)


def memory(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def warm_up(mesh) -> None:
    """Does what loading onto a mesh does, with a tiny model: the modules that torch imports on the way do not count."""
    import torch
    from torch.distributed.tensor.parallel import parallelize_module

    from pyfused.models import T5Backbone

    with torch.device("meta"):
        tiny = T5Backbone(64, 1, 64, 64, 64, dtype="bfloat16")
    parallelize_module(tiny, mesh, tiny.tensor_parallel_plan(), src_data_rank=None)
    for parameter in tiny.parameters():
        torch.empty_like(parameter, device="cpu", requires_grad=False).is_contiguous()


def measure(folder: str, target: str) -> dict[str, int]:
    import torch

    from pyfused.checkpoints import open_checkpoint
    from pyfused.models import Backbone

    torch.set_num_threads(1)
    mesh = None
    if target != "whole":
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh
        from torch.testing._internal.distributed.fake_pg import FakeStore

        rank, ranks = map(int, target.split("/"))
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
        mesh = init_device_mesh("cpu", (ranks,))
        warm_up(mesh)
    open_checkpoint(folder)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    model = Backbone.from_preset(folder, mesh=mesh)
    peak = memory("VmHWM") - before
    parts = [p.to_local() if mesh is not None else p for p in model.parameters()]
    assert all(not p.flatten()[-1] for p in parts)
    return {
        "weights": sum(p.nbytes for p in parts),
        "peak": peak,
        "whole": sum(2 * p.numel() for p in model.parameters()),
    }


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:])))
