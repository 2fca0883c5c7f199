"""Compiles the Triton kernels of gpu.py's items where there is no GPU: `python benchmarks/gpu_ahead.py` (`make gpu-build`).

On a machine that is lent for minutes their compilation would take minutes. The launches are recorded on an imaginary Hopper GPU
(tests/fake_gpu.py), compiled, and packed into build/gpu/triton.tar.xz; gpu.py unpacks them into Triton's cache there. They
are found if that machine has the same release of Triton. Which tiles `pyfused tune` tries after its first round depends on what
it measures, so those are compiled there.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "gpu-triton"
ARCHIVE = ROOT / "build" / "gpu" / "triton.tar.xz"
MOST_SHARED = 227 << 10  # bytes of shared memory that a block of a Hopper chip may have


def pack(cache: Path, archive: Path) -> None:
    """Writes the kernels of a cache of Triton's, without their source, into an archive: a sixth of their size."""
    with tarfile.open(archive, "w:xz") as packed:
        for path in sorted(path for path in cache.glob("*/*") if path.suffix in (".json", ".cubin")):
            packed.add(path, f"{path.parent.name}/{path.name}")


def place(archive: Path, cache: Path) -> int:
    """Unpacks kernels into a cache of Triton's, which finds a kernel's files by their whole paths. Returns how many there
    are."""
    count = 0
    if not archive.exists():
        return count
    with tarfile.open(archive) as packed:
        for member in packed:
            content, to = packed.extractfile(member).read(), cache / member.name  # type: ignore[union-attr]
            if to.name.startswith("__grp__"):
                names = json.loads(content)["child_paths"]
                content = json.dumps({"child_paths": {name: str(to.parent / name) for name in names}}).encode()
                count += 1
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_bytes(content)
    return count


def calls(operators: Iterable[str]) -> Iterator[Callable[[], Any]]:
    """The calls of the items `correct`, `peers`, `bench` and `compile`, on CPU tensors that pass for a GPU's."""
    import gpu_correct
    import gpu_models
    import gpu_peers
    import torch

    import pyfused
    from pyfused.bench.case import Setup
    from pyfused.bench.run import cases
    from pyfused.generation.warm import _run
    from pyfused.testing import running
    from pyfused.testing.problems import outputs_of

    class OnCpu(Setup):
        def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.randn(*shape).to(dtype)

    def problem(case: Any, dtype: torch.dtype, backend: str) -> None:
        leaves = {n: t.requires_grad_(case.gradients) for n, t in case.inputs(dtype, "cpu").items()}
        with running(backend):
            outputs = outputs_of(case.own(leaves))
            if case.gradients:
                torch.autograd.grad(outputs, list(leaves.values()), [torch.empty_like(out) for out in outputs])

    def attention(backend: str, backward: bool, shape: tuple[int, ...], options: dict[str, Any]) -> None:
        heads = gpu_peers.heads(*shape)
        tables = [option.table for option in options.values() if isinstance(option, pyfused.RelativeBias)]
        leaves = [t.requires_grad_(backward) for t in (*heads, *tables)]
        with running(backend):
            out = pyfused.attention(*heads, **options)
            if backward:
                torch.autograd.grad(out, leaves, torch.empty_like(out))

    def benchmark(case: Any) -> None:
        made = case.make()
        with running("triton", strict=False), torch.set_grad_enabled(made.trains):
            made.pyfused(*made.inputs)

    def model(name: str) -> None:
        with running("triton", strict=False):
            _run(gpu_models.backbone(name), sorted({shape[1] for shape in gpu_models.SHAPES}), True)

    gpu_peers.DEVICE = gpu_models.DEVICE = "cpu"
    for operator, dtype, case in gpu_correct.every(",".join(operators), False):
        for backend in ("triton", "gluon") if operator == "attention" else ("triton",):
            yield lambda case=case, dtype=dtype, backend=backend: problem(case, dtype, backend)
    if "attention" in operators:
        for shape in gpu_peers.attention_shapes():
            bias = pyfused.RelativeBias(torch.randn(32, shape[1], dtype=torch.bfloat16), True)
            for options in ({}, {"is_causal": True}, {"relative_bias": bias}):
                for backend, backward in (("triton", False), ("triton", True), ("gluon", False)):
                    yield lambda call=(backend, backward, shape, options): attention(*call)
        yield from (lambda name=name: model(name) for name in ("gpt2", "t5"))
    for operator in set(operators) - {"attention", "decode", "relative_bias"}:
        for case in cases(operator, OnCpu("cuda", (torch.bfloat16,))):
            yield lambda case=case: benchmark(case)


def trials(operators: Iterable[str]) -> Iterator[tuple[Callable[[], Any], str, list[dict[str, int]]]]:
    """(call, kernel, tiles) of the first round of `pyfused tune` in bfloat16."""
    import torch

    from pyfused import tiles
    from pyfused.testing import running
    from pyfused.testing.problems import outputs_of
    from pyfused.tune.cases import cases
    from pyfused.tune.gpu import candidates

    seen = set()
    for case in cases():
        if case.operator not in operators:
            continue

        def run(case: Any = case) -> None:
            given = case.problem.inputs(torch.bfloat16, "cpu")
            leaves = {n: t.requires_grad_(case.function == "backward" and t.is_floating_point()) for n, t in given.items()}
            with running("triton"):
                outputs = outputs_of(case.problem.own(leaves))
                if case.function == "backward":
                    torch.autograd.grad(outputs, list(leaves.values()), [torch.empty_like(out) for out in outputs])

        with contextlib.suppress(Exception), tiles.recorded() as asked:
            run()
        for each in {each.kernel: each for each in asked}.values():
            place = each.kernel, each.cases[0], each.tile.row.up_to
            if place not in seen:
                seen.add(place)
                yield run, each.kernel, candidates(each.tile.row, torch.device("cpu"))


def record(operators: Iterable[str]) -> list[Any]:
    """The launches of all of these. Call it in a process that has installed the imaginary GPU."""
    from pyfused import compile_ahead, dispatch, tiles

    found: dict[Any, None] = {}
    for call in calls(operators):
        with compile_ahead.recording() as launches, contextlib.suppress(dispatch.BackendError):
            call()
        found |= dict.fromkeys(launches)
    with compile_ahead.recording() as launches:
        for run, kernel, candidates in trials(operators):
            for tile in candidates:
                with tiles.trying(kernel, tile), contextlib.suppress(Exception):
                    run()
                    dispatch.forget()
    return list(found | dict.fromkeys(launches))


def main(operators: Iterable[str]) -> int:
    sys.path[1:1] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks"), str(ROOT / "tests" / "cuda_on_cpu")]
    os.environ |= {"TRITON_CACHE_DIR": str(FOLDER), "TRITON_STORE_BINARY_ONLY": "1"}
    import fake_gpu
    import gpu

    from pyfused import compile_ahead, extensions, tiles

    fake_gpu.install()
    extensions.emulate_gluon()
    tiles.shared_memory = lambda where: MOST_SHARED
    launches = record(operators or [name for name in gpu.OPERATORS if name != "decode"])
    with compile_ahead.Workers() as workers:
        done = workers.compile(launches, lambda text: print(text, flush=True))
    failed = [row for row in done if row.error]
    ARCHIVE.parent.mkdir(parents=True, exist_ok=True)
    pack(FOLDER, ARCHIVE)
    print(f"{len(done) - len(failed)} kernels in {ARCHIVE}; {len(failed)} do not compile")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
