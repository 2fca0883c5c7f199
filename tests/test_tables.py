"""Is a device table finished before another stream reads it, shared by all threads, and never part of a capture?"""

import ast
import threading
from pathlib import Path

import pytest
import torch
from fake_cuda import Machine

import pyfused.kernels
from pyfused.kernels.shared.buckets import _by_distance, distance_buckets
from pyfused.kernels.shared.tables import kept_on_device


@pytest.fixture
def machine(monkeypatch):
    machine, to = Machine(monkeypatch), torch.Tensor.to

    def copied(tensor, device, *rest, **options):
        if not isinstance(device, torch.device) or device.type != "cuda":
            return to(tensor, device, *rest, **options)
        machine.log.append(("copy", machine.device))
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "to", copied)
    return machine


@pytest.mark.parametrize("index", [0, 1])
def test_the_copy_is_waited_for_on_its_device_and_happens_once(machine, index):
    table = kept_on_device(torch.arange)
    first = table(5, device=torch.device("cuda", index))
    assert machine.log == [("copy", index), ("synchronize", index)]
    assert table(5, device=torch.device("cuda", index)) is first
    assert table(5, device=torch.device("cuda", 1 - index)) is not first
    assert len(machine.log) == 4
    assert machine.device == 0


def test_a_capture_has_no_part_in_it(machine):
    """A capture's allocations belong to its graph and are filled only in a replay."""
    device = torch.device("cuda", 1)
    table = kept_on_device(torch.arange)
    machine.capturing = True
    with pytest.raises(RuntimeError, match=r"captured, and a table of arange\(5,\) is not on cuda:1 yet; run .* once before"):
        table(5, device=device)
    assert not machine.log
    machine.capturing = False
    made = table(5, device=device)
    machine.capturing = True
    assert table(5, device=device) is made
    with pytest.raises(RuntimeError, match="by_distance"):
        distance_buckets(True, 14, 77, device)


def test_threads_get_one_tensor():
    """A second copy would take the place of the first, whose address a graph may hold."""
    together, found = threading.Barrier(4), []

    def make(n):
        return torch.arange(n)

    table = kept_on_device(make)

    def ask():
        together.wait()
        found.append(table(50000, device=torch.device("cpu")))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(tensor) for tensor in found}) == 1


def test_no_other_cache_holds_tensors_of_a_device():
    """functools.cache by device is for numbers: it would fill a tensor on whichever stream asks first."""
    for folder in pyfused.kernels.__path__:
        for path in Path(folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef) and any("functools" in ast.unparse(d) for d in node.decorator_list):
                    copies = [n for n in ast.walk(node) if isinstance(n, ast.Attribute) and n.attr in ("to", "cuda")]
                    copies = [n for n in copies if ast.unparse(n) != "torch.cuda"]
                    assert "device" not in {a.arg for a in node.args.args} or not copies, f"{path.name}: {node.name}"


def test_buckets_are_no_inference_tensors():
    with torch.inference_mode():
        assert not distance_buckets(True, 18, 99).is_inference()
    assert distance_buckets(True, 18, 99) is _by_distance(True, 18, 99)
