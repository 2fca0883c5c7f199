"""Is an extension found that was built for another interface or another processor, and does its user read what to do?"""

import shutil
from types import SimpleNamespace

import pytest

from pyfused import extensions, interface

CODES = "include/pyfused/activation_codes.h"


@pytest.mark.parametrize("name", interface.FILES)
def test_the_built_extension_has_this_checkout_s(name):
    module, reason = extensions._load(name)
    if module is None:
        pytest.skip(reason)
    assert module.interface == interface.digest(name)


@pytest.mark.parametrize(
    "file, before, after, changes",
    [
        (CODES, "kRelu = 1", "kRelu = 7", ["_cpu", "_cuda"]),
        ("cpu/kernels.h", "addr lse, addr layout", "addr layout, addr lse", ["_cpu"]),
        ("cuda/kernels.h", "int device, addr stream", "addr stream, int device", ["_cuda"]),
        ("include/pyfused/decode_plan.h", "int64_t n, k;", "int64_t k, n;", ["_cpu", "_cuda"]),
        (CODES, "#pragma once", "// Codes.\n#pragma  once\n", []),
    ],
)
def test_code_counts_and_comments_do_not(tmp_path, file, before, after, changes):
    copy = tmp_path / "csrc"
    shutil.copytree(interface.SOURCES, copy)
    text = (copy / file).read_text()
    assert before in text
    (copy / file).write_text(text.replace(before, after))
    assert [name for name in interface.FILES if interface.digest(name, copy) != interface.digest(name)] == changes


@pytest.mark.parametrize("says", [{"interface": "0123456789abcdef"}, {}], ids=["another", "older than the check"])
def test_another_interface_is_a_warning_and_not_used(monkeypatch, says):
    old = SimpleNamespace(**says, supported=["baseline"])
    monkeypatch.setattr(extensions.importlib, "import_module", lambda name: old)
    with pytest.warns(RuntimeWarning, match="_cpu was built from other sources: build it again .`pip install -e .`"):
        module, reason = extensions._load.__wrapped__("_cpu")
    assert module is None
    assert "build it again" in reason


@pytest.mark.parametrize("built, sources", [("", interface.SOURCES), ("0123456789abcdef", interface.SOURCES / "none")])
def test_what_cannot_be_compared_is_used(monkeypatch, built, sources):
    """Built by CMake alone; and an installed wheel, which has no sources."""
    found = interface.digest("_cpu", sources)
    monkeypatch.setattr(interface, "digest", lambda name: found)
    assert extensions._outdated("_cpu", SimpleNamespace(interface=built)) == ""


def test_an_extension_without_a_set_for_this_processor_is_a_warning_and_not_used(monkeypatch):
    """Its sets are chosen when it is built (PYFUSED_BUILD_ISAS), perhaps on another machine."""
    wheel = SimpleNamespace(interface=interface.digest("_cpu"), supported=[])
    monkeypatch.setattr(extensions.importlib, "import_module", lambda name: wheel)
    with pytest.warns(RuntimeWarning, match="_cpu was built for instruction sets that this processor lacks"):
        module, reason = extensions._load.__wrapped__("_cpu")
    assert module is None
    assert "this processor lacks" in reason
