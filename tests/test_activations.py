"""Do the C header and torch's modules agree with the table of activations on names and numbers?"""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from pyfused.activations import ACTIVATIONS, SPELLINGS, canonical, name_of

HEADER = Path(__file__).resolve().parents[1] / "csrc" / "include" / "pyfused" / "activation_codes.h"


def test_the_codes_are_the_header_s():
    codes = dict(re.findall(r"\bk(\w+) = (\d+)", HEADER.read_text()))
    assert codes.pop("Identity") == "0"
    named = {re.sub(r"(?<=.)([A-Z])", r"_\1", name).lower(): int(code) for name, code in codes.items()}
    assert named == {row.name: row.code for row in ACTIVATIONS.values()}


def test_no_other_file_has_codes():
    sources = [p for p in HEADER.parents[2].rglob("*") if p.suffix in {".h", ".cuh", ".cpp", ".cu"} and p != HEADER]
    assert [p.name for p in sources if "enum ActivationCode" in p.read_text()] == []


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_gradient_is_its_function_s(name):
    row = ACTIVATIONS[name]
    x = torch.linspace(-6, 6, 25, dtype=torch.float64, requires_grad=True)
    y = row.function(x)
    expected = torch.autograd.grad(y, x, torch.ones_like(x))[0]
    with torch.no_grad():
        torch.testing.assert_close(row.gradient(torch.ones_like(x), x, y), expected)
    torch.testing.assert_close(row.gradient(torch.ones_like(x), x, y), expected)


def test_names():
    assert {canonical(name) for name in ACTIVATIONS} == set(ACTIVATIONS)
    assert canonical("gelu_new") == "gelu_tanh"
    spelled = {spelling: row.name for spelling, row in SPELLINGS.items()}
    assert (spelled["gelu_new"], spelled["gelu_python"], spelled["swish"]) == ("gelu_tanh", "gelu", "silu")
    with pytest.raises(ValueError, match=r"activation='swiglu' is unknown; it takes gelu_tanh, gelu, .*, gelu_new"):
        canonical("swiglu")


@pytest.mark.parametrize(
    "module, name",
    [
        *((nn.GELU(), "gelu"), (nn.GELU("tanh"), "gelu_tanh"), (nn.ReLU(), "relu"), (nn.SiLU(), "silu")),
        *((nn.Tanh(), "tanh"), (torch.relu, "relu"), (nn.functional.silu, "silu"), (nn.ELU(), None), ([], None)),
    ],
)
def test_what_torch_computes(module, name):
    assert name_of(module) == name
    if name is not None:
        x = torch.linspace(-3, 3, 9)
        assert torch.equal(module(x), ACTIVATIONS[name].function(x))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_gradient_is_finite_for_all_of_float16(name):
    """Also where a product inside the activation is infinite."""
    x = torch.tensor([-65504.0, -40000.0, 0.0, 40000.0, 65504.0], dtype=torch.float16, requires_grad=True)
    y = ACTIVATIONS[name].function(x)
    first = ACTIVATIONS[name].gradient(torch.ones_like(x), x, y)
    assert first.isfinite().all()
