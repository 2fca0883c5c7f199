"""Are instructions for dot products used where they were measured to be faster, and never without that unless forced?"""

import platform
import re
import subprocess
import sysconfig
from pathlib import Path

import dot_emulation
import pybind11
import pytest
import shim
import torch

import pyfused
from pyfused import dispatch, environment, evidence, extensions
from pyfused.evidence import machine
from pyfused.kernels.shared import int8, product
from pyfused.testing import assert_close
from pyfused.tune import run

X, W = torch.randn(40, 64).bfloat16(), torch.randn(48, 64).bfloat16()
INTEGERS, SCALE = torch.randint(-127, 128, (48, 64), dtype=torch.int8), torch.ones(48)
UNKNOWN = "not yet measured on this processor; `pyfused tune` does it"


@pytest.fixture
def zen4(tmp_path, monkeypatch):
    """A processor with AVX512_BF16 and VNNI, as torch sees it too, of a kind without a shipped file; an empty cache folder."""
    monkeypatch.setenv("PYFUSED_EVIDENCE", str(tmp_path))
    monkeypatch.setattr(machine, "_vendor", lambda: "amd")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(int8, "library_multiplies", lambda: True)
    monkeypatch.setattr(product, "is_slow", lambda dtype: False)
    monkeypatch.delenv("PYFUSED_ISA", raising=False)
    with dot_emulation.processor("avx512_bf16") as kernels:
        yield kernels
    monkeypatch.undo()
    dispatch.forget()


@pytest.fixture
def few_points(monkeypatch):
    """`pyfused tune` measures small products alone."""
    monkeypatch.setattr(run, "_ROWS", (1, 2, 4, 20))  # with quick=True the first and the last
    monkeypatch.setattr(run, "_NETWORK_ROWS", (1, 2, 20))
    monkeypatch.setattr(run, "_WIDTHS", (32,))


def tuned(**speeds):
    """Runs `pyfused tune` with these speeds by instruction set instead of times, and keeps what it finds."""

    def speed(point, seconds, clock):
        point.in_plain_torch()
        return speeds[extensions.isa()]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_speed", speed)
        found = run.tune(quick=True, operators=["linear", "ffn", "gated_ffn"], threads=[1])
    evidence.write(evidence.own_file(), found)
    return found


def said(name, *args, **options):
    return next(v.reason for v in pyfused.explain(name, *args, **options).verdicts if v.runs)


def everything():
    """Calls that the set has: (name, arguments, options)."""
    yield "linear", (X, W), {}
    yield "ffn", (X, W, None, W.t().contiguous(), None), {"activation": "relu"}
    yield "gated_ffn", (X, W, W, W.t().contiguous()), {"activation": "relu"}
    yield "linear", (X, INTEGERS), {"scale": SCALE, "dynamic": True}


def test_nothing_changes_before_a_measurement(zen4):
    assert extensions.isa() == extensions.base_isa() == "avx512"
    for name, args, options in everything():
        reason = said(name, *args, **options)
        assert f"without avx512_bf16: {UNKNOWN}" in reason
        assert "by PyTorch's own code" in reason  # of the evidence of a similar kind, and torch._int_mm
        getattr(pyfused, name)(*args, **options)
    assert zen4.ran == []


def test_tune_measures_them_and_they_are_used(zen4, few_points):
    found = tuned(avx512=0.9, avx512_bf16=1.4)
    by_class = {(line["dtype"], line["shapes"]): line["speed"] for line in found["lines"] if line["operator"] == "linear"}
    assert by_class["bfloat16", "small"].keys() == {"cpu", "avx512_bf16"}
    for dtype in ("float32", "bfloat16", "float16"):
        assert by_class[dtype, "small, int8, dynamic"].keys() == {"avx512_bf16"}
    by_columns = ("bfloat16", "small, by columns"), ("bfloat16", "small, by columns, many rows")
    for other in (("float32", "small"), *by_columns, ("bfloat16", "small, int8")):
        assert by_class[other].keys() == {"cpu"}
    for name, args, options in everything():
        zen4.ran.clear()
        assert "with avx512_bf16: 1.40 times the speed of plain PyTorch" in said(name, *args, **options)
        y = getattr(pyfused, name)(*args, **options)
        assert zen4.ran == [f"{name}_dynamic_forward" if options.get("dynamic") else f"{name}_forward"]
        with pyfused.backend("reference"):
            assert_close(y, getattr(pyfused, name)(*args, **options), _truth(name, args, options))
    zen4.ran.clear()
    pyfused.linear(X.float(), W.float())
    pyfused.linear(X[:8], W.t().contiguous().t())
    assert zen4.ran == []


def _truth(name, args, options):
    wide = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
    with pyfused.backend("reference"):
        return getattr(pyfused, name)(*wide, **options)


@pytest.mark.parametrize("speeds", [{"avx512": 1.5, "avx512_bf16": 1.4}, {"avx512": 0.5, "avx512_bf16": 0.9}])
def test_slower_ones_are_not_used(zen4, few_points, speeds):
    tuned(**speeds)
    kernel = speeds["avx512"] > 1
    assert ("by PyTorch's own code" in said("linear", X, W)) != kernel
    assert "without avx512_bf16" in said("linear", X, W)
    pyfused.linear(X, W)
    assert zen4.ran == []
    with pyfused.backend("cpu"):  # the library does not count here
        pyfused.linear(X, W)
    assert zen4.ran == ([] if kernel else ["linear_forward"])


def test_the_number_of_threads_decides(zen4, few_points):
    found = tuned(avx512=0.9, avx512_bf16=1.4)
    for line in [dict(line) for line in found["lines"]]:
        found["lines"].append(line | {"threads": 2, "speed": {name: {"20": 0.5} for name in line["speed"]}})
    evidence.write(evidence.own_file(), found)
    with torch.no_grad():
        for threads, expected in ((1, ["linear_forward"]), (2, []), (1, ["linear_forward"])):
            torch.set_num_threads(threads)
            zen4.ran.clear()
            pyfused.linear(X, W)
            assert zen4.ran == expected


def test_forced_by_name_they_run(zen4):
    with dispatch.use_isa("avx512_bf16"):
        assert extensions.base_isa() == "avx512"
        for name, args, options in everything():
            zen4.ran.clear()
            assert "with avx512_bf16: forced" in said(name, *args, **options)
            getattr(pyfused, name)(*args, **options)
            assert len(zen4.ran) == 1
        zen4.ran.clear()
        pyfused.linear(X.float(), W.float())
        pyfused.layer_norm(X, W[0])
        assert zen4.ran == []


def test_a_lower_set_has_none(zen4, few_points, monkeypatch):
    tuned(avx512=0.9, avx512_bf16=1.4)
    kind = evidence.kind()
    for lower in ("avx512", "baseline"):
        monkeypatch.setenv("PYFUSED_ISA", lower)
        extensions._forced_isa.cache_clear()
        dispatch.forget()
        assert extensions.dot_products() is None
        assert "avx512_bf16" not in said("linear", X, W)
        assert (evidence.kind() == kind) == (lower == "avx512")
        pyfused.linear(X, W)
    assert zen4.ran == []
    monkeypatch.setenv("PYFUSED_ISA", "avx512_bf16")
    extensions._forced_isa.cache_clear()
    dispatch.forget()
    assert evidence.kind() == kind
    assert "forced" in said("linear", X, W)


def test_a_wrong_output_is_refused(zen4, few_points, monkeypatch):
    right = zen4.linear_forward

    def wrong(*given):
        right(*given)
        given[5].mul_(1.5)

    monkeypatch.setattr(zen4, "linear_forward", wrong)
    found = run.tune(quick=True, operators=["linear", "ffn", "gated_ffn"], threads=[1], clock=iter(range(10**9)).__next__)
    assert found["refused"] == [f"linear, bfloat16, small, size {size}, avx512_bf16" for size in (1, 20)]
    speeds = {line["dtype"]: line["speed"] for line in found["lines"] if line["shapes"] == "small"}
    assert speeds["bfloat16"].keys() == {"cpu"}
    assert [line["speed"].keys() for line in found["lines"] if "dynamic" in line["shapes"]] == [{"avx512_bf16"}] * 3


def test_without_integers_in_torch(monkeypatch):
    """AVX-VNNI alone: `dynamic` stays in floating point until it is measured."""
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    with dot_emulation.processor("avx2_vnni") as kernels:
        options = {"scale": SCALE, "dynamic": True}
        assert f"keeps x in floating point: avx2_vnni: {UNKNOWN}" in said("linear", X.float(), INTEGERS, **options)
        assert "avx2_vnni" not in said("linear", X, W)  # it has no product of bfloat16
        with dispatch.use_isa("avx2_vnni"):
            assert "with avx2_vnni: forced" in said("linear", X.float(), INTEGERS, **options)
            pyfused.linear(X.float(), INTEGERS, **options)
        assert kernels.ran == ["linear_dynamic_forward"]


def test_env_names_them(zen4):
    facts = environment.describe()["cpu"]
    assert (facts["in_use"], facts["dot_products"]) == ("avx512", "avx512_bf16")
    assert "avx512_bf16: where `pyfused tune` measured them" in environment.render(environment.describe())
    with dispatch.use_isa("avx512_bf16"):
        assert "avx512_bf16: forced" in environment.render(environment.describe())


def test_an_unproven_set_runs_if_it_is_forced(monkeypatch):
    """AMX: whatever the processor has, neither it nor evidence chooses the set."""
    monkeypatch.delenv("PYFUSED_ISA", raising=False)
    with dot_emulation.processor("avx512_amx") as kernels:
        assert "avx512_amx (unproven: forced or never)" in environment.render(environment.describe())
        assert extensions.isa() == "avx512"
        assert extensions.dot_products() is None  # so `pyfused tune` does not measure it
        for name, args, options in everything():
            assert "amx" not in said(name, *args, **options)
            getattr(pyfused, name)(*args, **options)
        assert kernels.ran == []
        with dispatch.use_isa("avx512_amx"):
            for name, args, options in everything():
                assert "with avx512_amx: forced, unproven" in said(name, *args, **options)
                getattr(pyfused, name)(*args, **options)
        assert len(kernels.ran) == 4


def flags_of_linux():
    found = re.search(r"^flags.*", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return set(found[0].split()) if found else set()


@pytest.mark.parametrize("capability", [None, "avx512", "default"])
def test_no_set_that_the_processor_lacks(monkeypatch, capability):
    """Whatever torch is told: the processor's own answer counts, which Linux knows too."""
    if capability:
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", capability)
    monkeypatch.delenv("PYFUSED_ISA", raising=False)
    module, flags = extensions._load.__wrapped__("_cpu")[0], flags_of_linux()
    needs = {
        "baseline": set(),
        "avx2": {"avx2", "fma", "f16c"},
        "avx2_vnni": {"avx2", "avx_vnni"},
        "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
        "avx512_vnni": {"avx512vl", "avx512_vnni"},
        "avx512_bf16": {"avx512_vnni", "avx512_bf16"},
        "avx512_amx": {"avx512_bf16", "amx_tile", "amx_bf16", "amx_int8"},
    }
    built = [name for name in needs if hasattr(module, name)]
    assert list(module.supported) == [name for name in built if needs[name] <= flags]
    assert extensions._default_isa.__wrapped__() in module.supported
    assert extensions._default_isa.__wrapped__() not in extensions.DOT_PRODUCTS


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the sets are those of x86")
@pytest.mark.parametrize("sets", ["avx512", "baseline avx512 avx512_vnni avx512_bf16 avx512_amx"])
def test_an_extension_may_have_any_sets(sets):
    """PYFUSED_BUILD_ISAS chooses them."""
    folders = *dot_emulation.INCLUDES, pybind11.get_include(), sysconfig.get_path("include")
    given = *(f"-DPYFUSED_HAS_{name}" for name in sets.split()), *(f"-I{folder}" for folder in folders)
    source = dot_emulation.ROOT / "csrc" / "cpu_bindings.cpp"
    command = [shim.compiler(), "-std=c++17", "-fsyntax-only", *given, str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:3000]
