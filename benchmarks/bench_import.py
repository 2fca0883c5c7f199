"""Import time of pyfused over torch's, in fresh processes: at most 60 ms is the target."""

import statistics
import subprocess
import sys
from functools import partial

import torch

from pyfused.bench import Case, Values

CODE = """
import time; a = time.perf_counter(); import torch; b = time.perf_counter(); import pyfused; c = time.perf_counter()
print(b - a, c - b)
"""


def cases(setup):
    if setup.device == "cpu":
        yield Case("import pyfused after torch", torch.float32, partial(seconds, 1 if setup.small else 7))


def seconds(rounds):
    """Medians: pyfused once torch is there, and torch alone."""
    found = []
    for _ in range(rounds):
        out = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout
        found.append([1e3 * float(word) for word in out.split()])
    return Values(
        "ms", {"pyfused": statistics.median(f[1] for f in found), "torch": statistics.median(f[0] for f in found)}
    )
