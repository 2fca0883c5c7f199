"""Does every native kernel survive a size of 0? Another process calls each as its header declares it, with each integer at 0
in turn and with all at 0. Even calls that dispatch keeps away must not end the process. The instruction sets share one."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pyfused import extensions

ROOT = Path(__file__).resolve().parents[2]
SHIM = "import shim; kernels = shim.load()"
CPU = "from pyfused import _cpu as kernels"

# Sizes and strides are 4; head sizes are 8. Every address lies in a buffer of zeros that is larger than any kernel needs.
SCRIPT = """
import sys, torch
from pyfused.kernels.shared.attention_layout import AttentionLayout
from pyfused.kernels.shared.fourier import plan
{load}
buffers = [torch.zeros(1 << 18) for _ in range(24)]
ends = torch.tensor([0, 2, 4, 4, 4], dtype=torch.int32)
caches = [torch.tensor([t.data_ptr()] * 4) for t in buffers[:2]]  # the tables of addresses that decode_copies reads
none = torch.zeros(8, dtype=torch.int64)  # the plan of length 0
sizes = ("batch", "heads", "kv_heads", "query_length", "key_length", "head_size", "longest")
strides = dict.fromkeys(("query", "key", "value", "out", "grad_out"), (4,) * 3) | {{"bias": (4,) * 4, "chunk": 4}}

def call(kernels, dtype, name, parameters, zero, given):
    of_size = dict.fromkeys(sizes, 4) | {{"head_size": 8}}
    of_size |= {{size: 0 for size in sizes if zero in ("all", size)}}
    layout = AttentionLayout(**of_size, **strides, scale=0.25, dropout_p=0.25)  # one distance of a relative bias
    values = []
    for i, (kind, parameter) in enumerate(parameters):
        empty = zero in ("all", parameter)
        if kind == "addr" and parameter in given:
            values.append(given[parameter])
        elif parameter == "layout":
            values.append(layout.address)
        elif parameter.startswith(("plan_", "table_")):
            length = parameter.rpartition("_")[2]
            stages, table = plan(4)
            stages = none if zero in ("all", length) else stages
            values.append((stages if parameter.startswith("plan") else table).data_ptr())
        elif name == "decode_copies" and kind == "addr":
            values.append(caches[i].data_ptr())
        elif kind == "addr":
            values.append(buffers[i].data_ptr())
        elif parameter in ("dtype", "device"):
            values.append(dtype)
        elif parameter == "multiprocessors":
            values.append(4)
        else:
            values.append({{"int64_t": 0 if empty else 4, "int": 1, "bool": False, "double": 0.25}}[kind])
    print(name, kernels.__name__, zero, *given, flush=True)
    getattr(kernels, name)(*values)

for isa, dtype, name, parameters in {declared!r}:
    named = [parameter for _, parameter in parameters]
    zeros = ["none", "all", *(p for kind, p in parameters if kind == "int64_t"), *(sizes if "layout" in named else ())]
    optional = {{"stream": 0, "bias": 0, "mask": 0}}
    variants = [optional]
    if "layout" in named:  # few queries and many, padded and packed
        packed = dict.fromkeys(("starts", "cu_seqlens"), ends.data_ptr())
        optional |= dict.fromkeys(packed, 0)
        variants = [optional | a | b for a in (packed, {{}}) for b in ({{}}, {{"seed": 0}}, {{"seed": 0, "table": 0}})]
    for given in variants:
        for zero in zeros:
            call(getattr(kernels, isa) if isa else kernels, dtype, name, parameters, zero, given)
print("alive")
"""


def declared(header):
    """(name, [(type, parameter), ...]) of every function that a kernels.h declares."""
    found = []
    for name, parameters in re.findall(r"^(?:void|int64_t) (\w+)\(([^)]*)\);", (ROOT / header).read_text(), re.M):
        found.append((name, [tuple(p.split()) for p in parameters.split(",") if p.strip()]))
    return found


def survives(load, functions):
    """functions: (instruction set, dtype, name, parameters) of each."""
    script = SCRIPT.format(load=load, declared=functions)
    path = f"import sys; sys.path.insert(0, {str(ROOT / 'tests' / 'cuda_on_cpu')!r})\n"
    done = subprocess.run([sys.executable, "-c", path + script], capture_output=True, text=True, cwd=ROOT)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, (done.returncode, lines[-1:], done.stderr[-2000:])
    assert lines[-1] == "alive"
    called = {tuple(line.split()[:2]) for line in lines[:-1]}
    assert {(name, kernels.rpartition(".")[2]) for name, kernels in called} == {
        (name, isa or "_cuda") for isa, _, name, _ in functions
    }


def test_cpu():
    """Sets for dot products have few kernels, those of floats for bfloat16 alone."""
    functions = []
    for isa in extensions.cpu_supported():
        known = declared("csrc/cpu/kernels.h")
        if isa in extensions.DOT_PRODUCTS:
            known = [row for row in known + declared("csrc/cpu/dot/kernels.h") if hasattr(extensions.cpu(isa), row[0])]
        functions += [(isa, 2 if isa in extensions.DOT_PRODUCTS else 0, *row) for row in known]
    survives(CPU, functions)


@pytest.mark.skipif(not extensions.emulating_cuda(), reason="on a GPU the addresses are no device's")
def test_cuda():
    survives(SHIM, [("", 0, *row) for row in declared("csrc/cuda/kernels.h")])
