"""Does a model find what was compiled ahead? On a GPU that is not there; prints facts as JSON, for test_warm.py."""

import json
import sys
import time

import fake_gpu
from triton import knobs

import pyfused
from pyfused import warm
from pyfused.models import Backbone


def main(preset, *lengths):
    driver, lengths = fake_gpu.install(), list(map(int, lengths))
    model = Backbone.from_preset(preset, dtype="bfloat16")
    with pyfused.backend("triton"), warm.recording() as launches:
        warm._run(model, lengths, True)
    started = len(driver.started)
    told, again = [], []
    done = warm.compile_in_parallel(launches, 2, told.append)
    began = time.perf_counter()
    cached = [row.cached for row in warm.compile_in_parallel(launches, 2, again.append)]
    seconds = time.perf_counter() - began
    found = []
    knobs.compilation.listener = lambda *, src, cache_hit, **_: found.append([src.name, cache_hit])
    with pyfused.backend("triton"):
        warm._run(model, lengths, True)
    broken = launches[0]._replace(specialisation=launches[0].specialisation.replace('"*bf16"', '"no type"'))
    (failed,) = warm.compile_in_parallel([broken], 1)
    facts = {
        "launches": len(launches),
        "started while recording": started,
        "errors": [row.error for row in done if row.error],
        "told": len(told),
        "told again": len(again),
        "cached again": cached,
        "seconds again": seconds,
        "found": found,
        "starts": len(driver.started),
        "broken": [failed.cached, failed.error],
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
