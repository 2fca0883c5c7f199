"""How long does `import pyfused` take after `import torch`? In new processes; the target is at most 60 ms."""

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
    """Medians of importing pyfused after torch, and torch alone."""
    times = []
    for _ in range(rounds):
        out = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout
        times.append([1e3 * float(word) for word in out.split()])
    return Values(
        "ms", {"pyfused": statistics.median(t[1] for t in times), "torch": statistics.median(t[0] for t in times)}
    )
