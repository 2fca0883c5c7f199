"""Does a model find the kernels compiled ahead? Uses an imaginary GPU; prints facts as JSON for test_warm.py."""

import json
import sys
import threading

import fake_gpu
import torch
from triton import knobs

import pyfused
from pyfused import compile_ahead, dispatch
from pyfused.generation import warm
from pyfused.models import Backbone


def elsewhere(driver=None):
    """Makes a call, as another thread would; it starts its kernel. With a driver, returns the number of starts."""
    before = len(driver.started) if driver else 0
    with torch.no_grad(), pyfused.backend("triton"):
        pyfused.rms_norm(torch.ones(3, 40), torch.ones(40))
    return len(driver.started) - before if driver else None


def main(preset, *lengths):
    driver, lengths = fake_gpu.install(), list(map(int, lengths))
    model = Backbone.from_preset(preset, dtype="bfloat16")
    with pyfused.backend("triton"), compile_ahead.recording() as launches:
        warm._run(model, lengths, True)
        started = len(driver.started)
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    others = len(driver.started) - started
    started_after = elsewhere(driver)
    told, again = [], []
    done = compile_ahead.compile_in_parallel(launches, 2, told.append)
    begun, begin = [], compile_ahead._start_worker
    compile_ahead._start_worker = lambda: begun.append(begin()) or begun[-1]
    cached = [row.cached for row in compile_ahead.compile_in_parallel(launches, 2, again.append)]
    begun_again = len(begun)
    found = []
    knobs.compilation.listener = lambda *, src, cache_hit, **_: found.append([src.name, cache_hit])
    with pyfused.backend("triton"):
        warm._run(model, lengths, True)
    broken = launches[0]._replace(specialisation=launches[0].specialisation.replace('"*bf16"', '"no type"'))
    (failed,) = compile_ahead.compile_in_parallel([broken], 1)
    narrow, x = [{"ROWS": rows, "num_warps": 4} for rows in (1, 2)], torch.ones(4, 40, dtype=torch.bfloat16)
    norm = dispatch.kernel("triton", "rms_norm")
    before = len(driver.started)
    tried, processes = [], set()

    def normalise():
        norm.forward(x, x[0], 1e-6, None, False)

    with compile_ahead.Workers(1) as workers:
        for tile in narrow:
            tried += compile_ahead.compile_tiles(normalise, "row_norm_forward", [tile], workers)
            processes |= set(workers._idle)
    ended = [process.poll() for process in processes]
    with compile_ahead.Workers(1) as workers:
        workers.compile([broken])
        workers._idle[0].kill()
        workers._idle[0].wait()
        (after_a_death,) = workers.compile([broken])
    facts = {
        "tiles": [len(tried), len(driver.started) - before, [row.error for row in tried if row.error]],
        "processes": ended,
        "processes by tiles and failures": len(begun) - begun_again,
        "after a death": after_a_death.error == failed.error,
        "launches": len(launches),
        "started while recording": started,
        "by another thread": others,
        "after recording": started_after,
        "errors": [row.error for row in done if row.error],
        "told": len(told),
        "told again": len(again),
        "cached again": cached,
        "processes again": begun_again,
        "found": found,
        "starts": len(driver.started),
        "broken": [failed.cached, failed.error],
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
