"""Are the results right with two threads, and without this processor's newest instructions in torch and its libraries? The
short form of `make test-machines`."""

import machines
import pytest

from pyfused import extensions

# Tests that would notice another library product, order of summation or torch formula.
TESTS = (
    "test_ffn.py::test_far_inputs_give_the_limits",
    "test_ffn.py::test_strides",
    "test_gated_ffn.py::test_products_beyond_float16_stay_finite",
    "test_linear.py::test_infinity_and_nan_stay_in_their_row",
    "test_linear.py::test_stored_transposed",
    "test_repeated_calls.py::test_same_as_when_every_call_is_checked",
)


@pytest.mark.parametrize("library", ["default", "avx2"])
def test_older_processors(library):
    isas = extensions.cpu_supported()
    machine = library, 2, "avx2" if library in isas else isas[0] if isas else ""
    for done in machines.verified(machine), machines.tested(machine, [f"tests/ops/{test}" for test in TESTS]):
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_every_kind_of_machine_is_among_them(monkeypatch):
    monkeypatch.setattr(extensions, "cpu_supported", lambda: ["baseline", "avx2", "avx512"])
    found = machines.machines()
    assert {threads for _, threads, _ in found} == {1, 2}
    assert {isa for _, _, isa in found} == {"baseline", "avx2", "avx512"}
    assert {library for library, _, _ in found} == set(machines.LIBRARIES)
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert "ATEN_CPU_CAPABILITY" not in machines.environment("everything", 1, "avx2")
    assert machines.environment("default", 1, "avx2")["ATEN_CPU_CAPABILITY"] == "default"
