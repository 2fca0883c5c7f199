"""What do prepared Triton launches do on an imaginary GPU? Prints facts as JSON for test_prepared_launches.py. Kernels compile
for real here, which a process with interpreted kernels cannot do."""

import gc
import json
import sys
import timeit
import weakref

import fake_gpu
import torch
from triton import knobs
from triton.runtime.jit import JITFunction

import pyfused
from pyfused import compile_ahead, dispatch, extensions, tiles
from pyfused.kernels.triton import _launch, _row_norm

BF16 = torch.bfloat16


def new(*shape, dtype=BF16):
    return torch.randn(shape).to(dtype)


def counted(call):
    """Counts the Python functions, C functions and bytecode instructions of one call."""
    counts = {"call": 0, "c_call": 0, "opcode": 0}

    def profile(frame, event, argument):
        if event in counts:
            counts[event] += 1

    def trace(frame, event, argument):
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        counts["opcode"] += event == "opcode"
        return trace

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(None)
    return counts


def calls():
    x, weight, w = new(5, 64), new(64), new(64, 64)
    query, key, long = new(1, 4, 1, 64), new(1, 4, 300, 64), new(1, 4, 1000, 64)
    return {
        "layer_norm": lambda: pyfused.layer_norm(x, weight, weight),
        "layer_norm residual": lambda: pyfused.layer_norm(x, weight, weight, residual=x),
        "rms_norm": lambda: pyfused.rms_norm(x, weight),
        "attention": lambda: pyfused.attention(query, key, key),
        "attention chunks": lambda: pyfused.attention(query, long, long),
        "ffn": lambda: pyfused.ffn(x, w, weight, w, weight, activation="gelu"),
        "gated_ffn": lambda: pyfused.gated_ffn(x, w, w, w, activation="gelu"),
    }


def same(found, expected):
    return len(found) == len(expected) and all(
        a is b or (type(a) is type(b) and a == b) for a, b in zip(found, expected)
    )


def starts(driver):
    """Each start uses the current stream; its other arguments equal those that Triton passed at the first start."""
    x, residual, weight = new(5, 64), new(5, 64), new(64)
    facts = []
    for stream in range(4):
        driver.stream = stream
        pyfused.layer_norm(x, weight, None, residual=residual)
        facts.append((_launch._hands_over, driver.started[-1]))
    first = facts[0][1]
    inputs = [0, 1, 2, 3, *range(8, len(first[3]))]  # 4 to 7 are results, which each call allocates
    return {
        "through Triton until": [known for known, _ in facts],
        "reaches C": _launch._reaches_c,
        "streams": [start[2] for _, start in facts],
        "same": [
            start[:2] == first[:2] and same([start[3][i] for i in inputs], [first[3][i] for i in inputs])
            for _, start in facts
        ],
        "results differ": len({id(start[3][4]) for _, start in facts}),
    }


def watched(driver):
    """Triton's hooks, which a profiler sets, are called; once they are gone, launches are prepared again."""
    call, seen = calls()["layer_norm"], []
    call()
    knobs.runtime.launch_enter_hook.add(lambda metadata: seen.append(metadata.get()["name"]))
    call()
    knobs.runtime.launch_enter_hook.calls.clear()
    hooks = list(seen)
    _row_norm.forward_kernel.pre_run_hooks.append(lambda *args, **options: seen.append("pre-run"))
    call()
    _row_norm.forward_kernel.pre_run_hooks.clear()
    call()
    return {"hook": hooks, "all": seen}


def forgotten(driver):
    """After forget() a launch looks up its tiles again."""
    call = calls()["layer_norm"]
    call(), call()
    grids = [driver.started[-1][1]]
    tiles._trial["row_norm_forward"] = {"ROWS": 1, "num_warps": 4}  # as if evidence had changed
    call()
    grids.append(driver.started[-1][1])
    dispatch.forget()
    call()
    grids.append(driver.started[-1][1])
    del tiles._trial["row_norm_forward"]
    dispatch.forget()
    return grids


def held(driver):
    """No launch keeps a tensor."""
    left = {}
    for name, make in {
        "layer_norm": lambda: (new(5, 64), new(64)),
        "attention": lambda: (new(1, 4, 1, 64), new(1, 4, 300, 64)),
    }.items():
        tensors = make()
        for _ in range(3):
            out = pyfused.layer_norm(*tensors) if name == "layer_norm" else pyfused.attention(*tensors, tensors[1])
        references = [weakref.ref(t) for t in (*tensors, out)]
        driver.started.clear()
        del tensors, out
        gc.collect()
        left[name] = sum(reference() is not None for reference in references)
    return left


def variants(driver):
    """The names of the kernels that recording() sees compiled while a text grows."""

    def names(call):
        with compile_ahead.recording() as launches:
            call()
        found = [launch.kernel.rpartition(":")[2] for launch in launches]
        return {name: found.count(name) for name in set(found)}

    def decode(length, heads=12, size=64):
        pyfused.attention(new(1, heads, 1, size), *[new(1, heads, length, size)] * 2, is_causal=True)

    def step(length, cache):
        pyfused.attention(new(1, 12, 1, 64), cache[:, :, :length], cache[:, :, :length], is_causal=True)

    def feed_forward(rows):
        x, w, weight = new(rows, 64), new(64, 64), new(64)
        pyfused.layer_norm(x, weight, weight, residual=x)
        pyfused.ffn(x, w, weight, w, weight, activation="gelu")
        pyfused.gated_ffn(x, w, w, w, activation="gelu")

    cache = new(1, 12, 320, 64)
    few = new(1, 2, 16, 64)
    return {
        "growing keys": names(lambda: [decode(n) for n in range(1, 301)]),
        "growing cache": names(lambda: [step(n, cache) for n in range(1, 301)]),
        "growing prefill": names(
            lambda: [pyfused.attention(*[new(1, 12, n, 64)] * 3, is_causal=True) for n in range(17, 301)]
        ),
        "chunks": names(
            lambda: [pyfused.attention(few[:, :, :1], *[new(1, 2, 256 * n, 64)] * 2) for n in range(2, 70)]
        ),
        "rows": names(lambda: [feed_forward(n) for n in range(2, 17)]),
        "many rows": names(lambda: [feed_forward(n) for n in range(17, 120)]),
    }


def by_hand(driver):
    """The kernel for Hopper compiles through Triton's own way from a call to a launcher."""
    extensions.emulate_gluon()
    dispatch.missing.cache_clear()
    query = new(1, 200, 2, 64).transpose(1, 2)
    with pyfused.backend("gluon", strict=True):
        pyfused.attention(query, query, query, relative_bias=pyfused.RelativeBias(new(32, 2), True))
    return [[name, grid, [type(a).__name__ for a in arguments[:3]]] for name, grid, _, arguments in driver.started[-2:]]


def cache_keys(driver):
    """How many kernels and helpers there are, and those whose key in Triton's cache depends on which were used before."""
    folders = "pyfused.kernels.triton", "pyfused.kernels.gluon"
    modules = [module for name, module in sys.modules.items() if name.startswith(folders)]
    functions = {f.__qualname__: f for m in modules for f in vars(m).values() if isinstance(f, JITFunction)}
    found = []
    for order in (list, reversed):
        for function in functions.values():
            function.hash, function.used_global_vals = None, {}
        for name in order(list(functions)):
            _launch.settle_cache_key(functions[name])
        found.append({name: function.cache_key for name, function in functions.items()})
    return [len(functions), [name for name in functions if found[0][name] != found[1][name]]]


def times(driver):
    """Microseconds of a call that starts nothing, prepared and through Triton. For readers; no test uses it."""
    found = {}
    for way in (True, False):
        dispatch.forget()
        _launch._hands_over = way
        for name, call in calls().items():
            call()
            best = min(timeit.repeat(call, number=300, repeat=15)) / 300 * 1e6
            found.setdefault(name, []).append(round(best, 1))
            driver.started.clear()
    _launch._hands_over = True
    return found


def main(wanted):
    driver, facts = fake_gpu.install(), {}
    with torch.no_grad(), pyfused.backend("triton"):
        facts["variants"] = variants(driver)  # first: recording() leaves out kernels that are compiled already
        facts["starts"], facts["counts"] = starts(driver), {}
        for name, call in calls().items():
            for _ in range(3):
                call()
            driver.started.clear()
            call()
            facts["counts"][name] = {"starts": len(driver.started), **counted(call)}
        for fact in (watched, forgotten, held, by_hand, cache_keys):
            facts[fact.__name__] = fact(driver)
        if "times" in wanted:
            facts["times"] = times(driver)
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
