"""Are the tolerance rule's constants right? Many seeds of every operator, and every planted fault, by the rule.

    python tests/calibrate_tolerance.py [--seeds 1000] [--only NAME] [--save FILE]

Each of pyfused's instruction sets runs beside plain PyTorch. Choose torch's own set before the start, with
ATEN_CPU_CAPABILITY=default|avx2|avx512 and ONEDNN_MAX_CPU_ISA=SSE41|AVX2|AVX512_CORE. A figure is an error divided by the
allowed error. Right kernels must stay at 1 or below in every seed; a planted fault must be above 1 in every seed.
"""

import argparse
import itertools
import json
import os
import re
from pathlib import Path

import torch
from tolerance_cases import CASES, DTYPES, fused, plain_and_truth
from tolerance_faults import FAULTS, faulty

from pyfused.testing import available, judge


def right(case, dtype, seeds, backends):
    """{backend: [the largest RMS figure, the largest of a single element]} over all outputs, gradients and seeds."""
    largest = {name: [0.0, 0.0] for name in backends}
    for seed in range(seeds):
        plain, truth = plain_and_truth(case, dtype, seed)
        for name in backends:
            for what, actual in fused(case, dtype, seed, name).items():
                found = judge(actual, plain[what], truth[what])
                for i, ratio in enumerate((found.rms_ratio, found.worst_ratio)):
                    largest[name][i] = max(largest[name][i], ratio)
    return largest


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--only", default="", metavar="NAME", help="cases and faults whose name has this in it")
    parser.add_argument("--save", type=Path, metavar="FILE", help="adds the figures to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    backends = [name for name in available() if name.startswith("cpu:")]
    label = f"torch {torch.backends.cpu.get_cpu_capability()}, oneDNN {os.environ.get('ONEDNN_MAX_CPU_ISA', 'all')}"
    alarms = 0
    print(f"{label}; {arguments.seeds} seeds; largest figure of the RMS / of one element")
    for dtype, (name, case) in itertools.product(DTYPES, CASES.items()):
        if arguments.only in name:
            row = right(case, dtype, arguments.seeds, backends)
            alarm = max(map(max, row.values())) > 1
            alarms += alarm
            key = f"{name}, {str(dtype).removeprefix('torch.')}"
            text = "  ".join(f"{backend} {rms:.2f} / {worst:.2f}" for backend, (rms, worst) in row.items())
            print(f"{key:<34} {text}{'  ALARM' if alarm else ''}", flush=True)
            if arguments.save:
                save(arguments.save, label, key, {"seeds": arguments.seeds, **row})
    print("planted faults: smallest figure")
    for name, fault in FAULTS.items():
        for dtype in fault.dtypes if arguments.only in name else ():
            ratio = min(faulty(fault, dtype, seed).ratio for seed in range(min(arguments.seeds, 100)))
            alarms += ratio <= 1
            key = f"{name}, {str(dtype).removeprefix('torch.')}"
            print(f"{key:<52} {ratio:.2f}{'  NOT FOUND' if ratio <= 1 else ''}", flush=True)
            if arguments.save:
                save(arguments.save, label, key, {"seeds": min(arguments.seeds, 100), "smallest": ratio})
    raise SystemExit(f"{alarms} false alarms or faults not found" if alarms else 0)


def save(path, label, key, row):
    """Saves each row at once: a run of 1,000 seeds takes an hour."""
    rounded = {k: [round(x, 3) for x in v] if isinstance(v, list) else round(v, 2) for k, v in row.items()}
    saved = json.loads(path.read_text()) if path.exists() else {}
    saved.setdefault(label, {})[key] = rounded
    path.write_text(re.sub(r"\[\s+([\d.]+),\s+([\d.]+)\s+\]", r"[\1, \2]", json.dumps(saved, indent=1)) + "\n")


if __name__ == "__main__":
    main()
