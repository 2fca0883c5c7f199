"""How are Triton kernels compiled before they are needed? In parallel, into Triton's cache on disk, from which calls load them.

A kernel takes 1 to 10 s to compile on one core. A model's first generation needs a dozen, one after another.
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
from .setting import set_to


class Launch(NamedTuple):
    """Everything that determines the compiled kernel of one launch, and its name in Triton's cache.

    Attributes:
        kernel: "module:function".
        specialisation: types, constants, attributes and options, in the JSON that Triton gives to its hooks.
        target: backend, architecture and warp size of the GPU.
    """

    kernel: str
    specialisation: str
    target: tuple[str, int | str, int]

    def source(self) -> tuple[Any, Any, dict[str, Any]]:
        """The arguments of triton.compile: source, target, options."""
        from triton.backends.compiler import GPUTarget

        from .kernels.triton._launch import settle_cache_key

        module, _, name = self.kernel.partition(":")
        found = json.loads(self.specialisation)
        constants = dict(zip(map(tuple, found["constant_keys"]), found["constant_vals"], strict=True))
        attributes = dict(zip(map(tuple, found["attrs_keys"]), found["attrs_vals"], strict=True))
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in found["options"].items()}
        kernel = getattr(importlib.import_module(module), name)
        settle_cache_key(kernel)
        if kernel.is_gluon():
            from triton.experimental.gluon._runtime import GluonASTSource as Source
        else:
            from triton.compiler import ASTSource as Source
        return Source(kernel, found["signature"], constants, attributes), GPUTarget(*self.target), options


class Compiled(NamedTuple):
    """The result of compile_in_parallel() for one launch."""

    launch: Launch
    seconds: float
    cached: bool  # it was on disk already
    error: str  # "" if it compiled


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Inside the block this thread's Triton launches are neither compiled nor run. Each is added to the list once, unless this
    process has compiled it already. Outputs have arbitrary values."""
    launches: dict[Launch, None] = {}
    found: list[Launch] = []
    if importlib.util.find_spec("triton") is None:
        yield found
        return
    from triton import knobs
    from triton.runtime import driver

    before = knobs.runtime.jit_cache_hook

    def note(*, fn: Any, compile: dict[str, Any], **more: Any) -> bool:
        if recorder.get() is None:  # the launch is from another thread
            return bool(before and before(fn=fn, compile=compile, **more))
        target = driver.active.get_current_target()
        name = f"{fn.module}:{fn.jit_function.__name__}"
        place = target.backend, target.arch, target.warp_size
        launches[Launch(name, compile["specialization_data"], place)] = None
        return True  # tells Triton to stop here

    def record(kernel: Any, grid: Any, arguments: Any, options: Any) -> None:
        if not knobs.runtime.interpret:
            kernel.warmup(*arguments, grid=grid, **options)

    dispatch.forget()  # prepared launches would run
    knobs.runtime.jit_cache_hook = note
    try:
        with set_to(recorder, record):
            yield found
    finally:
        knobs.runtime.jit_cache_hook = before
        found += launches


def compile_tiles(
    run: Callable[[], Any], kernel: str, candidates: Sequence[dict[str, int]], workers: Workers
) -> list[Compiled]:
    """Compiles the kernels of a call with each candidate tile, in parallel. `pyfused tune` then times them one after another.

    Args:
        run: the call.
        kernel: the kernel that uses the tiles, a name in tiles.KERNELS.
        candidates: the tiles. A tile that the launcher refuses is skipped.
        workers: the processes that compile.
    """
    with recording() as launches:
        for tile in candidates:
            with tiles.trying(kernel, tile), contextlib.suppress(Exception):
                run()
                dispatch.forget()
    return workers.compile(launches)


def compile_in_parallel(
    launches: Sequence[Launch], workers: int | None = None, say: Callable[[str], None] = lambda text: None
) -> list[Compiled]:
    """Workers(workers).compile(launches, say), after which the processes end."""
    with Workers(workers) as processes:
        return processes.compile(launches, say)


class Workers:
    """Processes that compile launches into Triton's cache on disk. They use no GPU. Each starts when it is first needed, which
    takes seconds, and runs until the block ends.

    Args:
        most: the largest number of processes; os.cpu_count() by default.
    """

    def __init__(self, most: int | None = None):
        self._most = most or os.cpu_count() or 1
        self._idle: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._idle:
            with process:  # closes its input, so that it ends, and waits
                pass
        self._idle.clear()

    def _worker(self) -> subprocess.Popen[str]:
        """An idle process that still runs, or a new one."""
        while True:
            try:
                process = self._idle.pop()
            except IndexError:
                return _start_worker()
            if process.poll() is None:
                return process

    def compile(self, launches: Sequence[Launch], say: Callable[[str], None] = lambda text: None) -> list[Compiled]:
        """A row for each launch; for one that does not compile, the row has an error.

        Args:
            launches: the list from recording().
            say: gets a line for each finished launch.
        """
        done = [Compiled(launch, 0.0, True, "") for launch in launches if _is_on_disk(launch)]
        on_disk = {row.launch for row in done}
        waiting: queue.SimpleQueue[Launch] = queue.SimpleQueue()
        missing = [launch for launch in launches if launch not in on_disk]
        for launch in missing:
            waiting.put(launch)

        def feed_a_worker() -> None:
            process = self._worker()
            while True:
                try:
                    launch = waiting.get_nowait()
                except queue.Empty:
                    self._idle.append(process)
                    return
                answer = ""
                with contextlib.suppress(OSError):  # it has ended
                    print(json.dumps(launch), file=process.stdin, flush=True)
                    answer = process.stdout.readline()  # type: ignore[union-attr]
                row = Compiled(
                    launch, *(json.loads(answer) if answer else (0.0, False, "the compiler's process ended"))
                )
                done.append(row)
                name = launch.kernel.rpartition(":")[2]
                say(f"{len(done)} of {len(launches)}: {name}, {row.error or f'{row.seconds:.1f} s'}")
                if not answer:
                    process.wait()
                    return

        threads = [threading.Thread(target=feed_a_worker) for _ in range(min(len(missing), self._most))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        while not waiting.empty():
            done.append(Compiled(waiting.get(), 0.0, False, "no process was left to compile it"))
        return done


def _start_worker() -> subprocess.Popen[str]:
    """A process that compiles one launch per line of its input. It is not forked, because CUDA and OpenMP do not survive a
    fork, and not from multiprocessing, which would run the caller's script again."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-c", "from pyfused.compile_ahead import _work; _work()"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def _work() -> None:
    """The worker process: answers each launch with (seconds, cached, error) on stdout. Everything else goes to stderr."""
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
    """Compiles a launch, and builds the C function that starts such kernels. Returns whether it was on disk already."""
    import triton
    from triton import knobs

    hits: list[bool] = []
    knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
    source, target, options = launch.source()
    compiled = triton.compile(source, target=target, options=options)
    # Triton would build the C function at the first launch, one for each list of argument types. It links the GPU's driver
    # library. Without that library, as in an image that is built without a GPU, the first launch must build it.
    vendor, launcher = ("nvidia", "CudaLauncher") if target.backend == "cuda" else ("amd", "HIPLauncher")
    with contextlib.suppress(Exception):
        getattr(importlib.import_module(f"triton.backends.{vendor}.driver"), launcher)(source, compiled.metadata)
    return bool(hits and hits[0])


def _is_on_disk(launch: Launch) -> bool:
    """Whether Triton's cache has this launch. Uses internals of Triton 3.6, and saves starting a process."""
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
