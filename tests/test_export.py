"""Do torch.export and torch.jit.trace take the models with any batch and length, and do the saved programs run?"""

import subprocess
import sys

import pytest
import torch
import transformers as hf
from compiled_cases import FAMILIES, backbone, inputs, results
from torch.export import Dim

import pyfused


def exported(name, model):
    """The model's program for any batch and length, from one example."""
    given = inputs(name, 3, 9)
    batch, source, target = (Dim(what, min=2, max=46) for what in ("batch", "source", "target"))
    dims = {key: {0: batch, 1: target if key.startswith("decoder") else source} for key in given}
    return torch.export.export(model, (given,), dynamic_shapes=(dims,))


@pytest.mark.parametrize("name", FAMILIES)
def test_an_exported_model_runs_at_other_sizes(name):
    model = backbone(name).eval()
    program = exported(name, model).module()
    for size in ((2, 5), (5, 20), (4, 3)):
        given = inputs(name, *size)
        with torch.no_grad():
            for a, e in zip(results(program(given)), results(model(given)), strict=True):
                assert torch.equal(a, e)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_that_torch_jit_recorded_runs_at_other_sizes(name):
    """Recorded with nothing masked: the masks' values must not become part of the program."""
    model = backbone(name, num_layers=1).eval()
    given = inputs(name, 2, 6)
    given |= {
        key: torch.ones_like(mask) for key, mask in given.items() if mask is not None and mask.dtype == torch.bool
    }
    traced = torch.jit.trace(model, (given,), strict=False)
    assert not any("pyfused" in node.kind() for node in traced.inlined_graph.nodes())  # runs without Python
    for size in ((2, 6), (5, 20), (4, 3)):
        given = inputs(name, *size)
        with torch.no_grad(), pyfused.backend("reference"):
            for a, e in zip(results(traced(given)), results(model(given)), strict=True):
                torch.testing.assert_close(a, e)


def test_a_fused_transformers_model_that_torch_jit_recorded():
    config = hf.BertConfig(
        vocab_size=61, num_hidden_layers=2, hidden_size=24, intermediate_size=40, num_attention_heads=4
    )
    model = hf.BertModel(config).eval()
    mask = torch.ones(3, 7, dtype=torch.int64)
    mask[1, 4:] = 0
    ids = torch.randint(61, (3, 7))
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).last_hidden_state[mask.bool()]
    pyfused.fuse_(model)
    traced = torch.jit.trace(model, (torch.randint(61, (2, 9)), torch.ones(2, 9, dtype=torch.int64)), strict=False)
    found = traced(ids, mask)["last_hidden_state"]
    torch.testing.assert_close(found[mask.bool()], expected)


def in_a_new_process(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


LOAD = """
import sys, traceback
import torch
torch.set_num_threads({threads})
given, expected = torch.load({directory!r} + "/example.pt")
for first in ("", "import pyfused"):
    exec(first)
    for load in (lambda path: torch.export.load(path + "/program.pt2").module(),
                 lambda path: torch._inductor.aoti_load_package(path + "/package.pt2")):
        try:
            found = load({directory!r})(given)
        except Exception:
            traceback.print_exc()
            print("no such operator")
        else:
            for name in expected:  # a compiled package rounds in another way than torch where the processor has wider vectors
                torch.testing.assert_close(found[name], expected[name])
            print("right")
        print("---", file=sys.stderr)
"""


def test_the_saved_program_and_the_package_run_in_a_process_that_imports_pyfused(tmp_path):
    """Both name operators that importing pyfused registers. Without the import, loading names the missing operator."""
    model = backbone("fnet", num_layers=1).eval()
    program = exported("fnet", model)
    given = inputs("fnet", 4, 7)
    with torch.no_grad():
        torch.save((given, model(given)), tmp_path / "example.pt")
    torch.export.save(program, tmp_path / "program.pt2")
    quick = {"aot_inductor.compile_wrapper_opt_level": "O0", "aot_inductor.precompile_headers": False}
    torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "package.pt2"), inductor_configs=quick
    )
    ran = in_a_new_process(LOAD.format(directory=str(tmp_path), threads=torch.get_num_threads()))
    assert ran.stdout.splitlines() == ["no such operator"] * 2 + ["right"] * 2, ran.stdout + ran.stderr
    assert all("pyfused" in error for error in ran.stderr.split("---\n")[:2]), ran.stderr
