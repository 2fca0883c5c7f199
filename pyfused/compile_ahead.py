"""How are Triton kernels compiled before they are needed? In parallel, into Triton's cache on disk, from which calls load them.

A kernel takes 1 to 10 s to compile on one core, and a model's first generation needs a dozen, one after another.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from . import dispatch, tiles
from .kernels.shared.prepared import recorder


class Launch(NamedTuple):
    """What Triton compiles for a start of a kernel: all that the name on disk depends on.

    Attributes:
        kernel: "module:function".
        specialisation: types, constants, attributes and options, as Triton writes them down for its hooks (JSON).
        target: backend, architecture and warp size of the GPU.
    """

    kernel: str
    specialisation: str
    target: tuple[str, int | str, int]

    def source(self) -> tuple[Any, Any, dict[str, Any]]:
        """What triton.compile takes: source, target, options."""
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        module, _, name = self.kernel.partition(":")
        found = json.loads(self.specialisation)
        constants = dict(zip(map(tuple, found["constant_keys"]), found["constant_vals"], strict=True))
        attributes = dict(zip(map(tuple, found["attrs_keys"]), found["attrs_vals"], strict=True))
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in found["options"].items()}
        kernel = getattr(importlib.import_module(module), name)
        return ASTSource(kernel, found["signature"], constants, attributes), GPUTarget(*self.target), options


class Compiled(NamedTuple):
    """One launch after compile_in_parallel(): `cached` if it was on disk already, `error` is "" where it compiles."""

    launch: Launch
    seconds: float
    cached: bool
    error: str


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Inside, this thread's Triton kernels are noted down in the list, each once, and neither compiled nor started: what they
    would have written is arbitrary. What this process has compiled already is not noted down."""
    launches: dict[Launch, None] = {}
    found: list[Launch] = []
    if importlib.util.find_spec("triton") is None:
        yield found
        return
    from triton import knobs
    from triton.runtime import driver

    before = knobs.runtime.jit_cache_hook

    def note(*, fn: Any, compile: dict[str, Any], **more: Any) -> bool:
        if recorder.get() is None:  # another thread's
            return bool(before and before(fn=fn, compile=compile, **more))
        target = driver.active.get_current_target()
        name = f"{fn.module}:{fn.jit_function.__name__}"
        place = target.backend, target.arch, target.warp_size
        launches[Launch(name, compile["specialization_data"], place)] = None
        return True  # which ends Triton's work on this start

    def record(kernel: Any, grid: Any, arguments: Any, options: Any) -> None:
        if not knobs.runtime.interpret:
            kernel.warmup(*arguments, grid=grid, **options)

    dispatch.forget()  # launches that are prepared would start
    token = recorder.set(record)
    knobs.runtime.jit_cache_hook = note
    try:
        yield found
    finally:
        knobs.runtime.jit_cache_hook = before
        recorder.reset(token)
        found += launches


def compile_tiles(run: Callable[[], Any], kernel: str, candidates: Sequence[dict[str, int]]) -> list[Compiled]:
    """Compiles what a call starts with each of some tiles, in parallel; for `pyfused tune`, which tries one after another.

    Args:
        run: the call.
        kernel: whose tiles they are, a name in tiles.KERNELS.
        candidates: the tiles. One that no launcher takes is left out.
    """
    with recording() as launches:
        for tile in candidates:
            with tiles.trying(kernel, tile), contextlib.suppress(Exception):
                run()
                dispatch.forget()
    return compile_in_parallel(launches)


def compile_in_parallel(
    launches: Sequence[Launch], workers: int | None = None, say: Callable[[str], None] = lambda text: None
) -> list[Compiled]:
    """Compiles launches in processes of their own, which touch no GPU, into Triton's cache on disk. One that does not compile
    is a row with an error.

    Args:
        launches: what recording() found.
        workers: how many processes; os.cpu_count() by default, and no more than there is to compile.
        say: told of each that is done.
    """
    done = [Compiled(launch, 0.0, True, "") for launch in launches if _is_on_disk(launch)]
    on_disk = {row.launch for row in done}
    waiting: queue.SimpleQueue[Launch] = queue.SimpleQueue()
    missing = [launch for launch in launches if launch not in on_disk]
    for launch in missing:
        waiting.put(launch)
    count = min(len(missing), workers or os.cpu_count() or 1)

    def serve() -> None:
        with _worker() as process:
            while True:
                try:
                    launch = waiting.get_nowait()
                except queue.Empty:
                    return
                print(json.dumps(launch), file=process.stdin, flush=True)
                answer = process.stdout.readline()  # type: ignore[union-attr]
                row = Compiled(
                    launch, *(json.loads(answer) if answer else (0.0, False, "the compiler's process ended"))
                )
                done.append(row)
                name = launch.kernel.rpartition(":")[2]
                say(f"{len(done)} of {len(launches)}: {name}, {row.error or f'{row.seconds:.1f} s'}")
                if not answer:
                    return

    threads = [threading.Thread(target=serve) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    while not waiting.empty():
        done.append(Compiled(waiting.get(), 0.0, False, "no process was left to compile it"))
    return done


def _worker() -> subprocess.Popen[str]:
    """A process that compiles what stands in the lines of its input. No fork: CUDA and OpenMP do not survive one. No
    multiprocessing either, which runs the caller's script again."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-c", "from pyfused.compile_ahead import _serve; _serve()"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def _serve() -> None:
    """The other end: answers each launch with (seconds, cached, error). What else is printed goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        kernel, specialisation, target = json.loads(line)
        began, cached, error = time.perf_counter(), False, ""
        try:
            cached = _compile(Launch(kernel, specialisation, tuple(target)))
        except Exception as failure:
            error = " ".join(f"{type(failure).__name__}: {failure}".split())[:500]
        print(json.dumps([time.perf_counter() - began, cached, error]), file=answers, flush=True)


def _compile(launch: Launch) -> bool:
    """Compiles a launch, and builds the C function that starts such kernels; returns whether it was on disk already."""
    import triton
    from triton import knobs

    hits: list[bool] = []
    knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
    source, target, options = launch.source()
    compiled = triton.compile(source, target=target, options=options)
    # Triton builds it at the first start, with the C compiler, for each list of types. It links the GPU's driver library:
    # where that is not found, as in an image that is built without a GPU, it stays for the first start.
    vendor, launcher = ("nvidia", "CudaLauncher") if target.backend == "cuda" else ("amd", "HIPLauncher")
    with contextlib.suppress(Exception):
        getattr(importlib.import_module(f"triton.backends.{vendor}.driver"), launcher)(source, compiled.metadata)
    return bool(hits and hits[0])


def _is_on_disk(launch: Launch) -> bool:
    """Whether compiling would find it there: asked of Triton 3.6's inside, so as to start no process for nothing."""
    try:
        import hashlib

        from triton._C.libtriton import get_cache_invalidating_env_vars
        from triton.compiler import make_backend
        from triton.runtime.cache import get_cache_key, get_cache_manager
    except ImportError:
        return False
    source, target, options = launch.source()
    backend = make_backend(target)
    key = get_cache_key(source, backend, backend.parse_options(options), get_cache_invalidating_env_vars())
    folder = get_cache_manager(hashlib.sha256(key.encode()).hexdigest())
    return bool(folder.get_group(f"{source.name[:150]}.json"))
