"""Does fuse_ change only this instance, and only its forward?"""

import copy
import functools
import io
import pickle

import pytest
import torch
from torch import nn

import pyfused
from pyfused.own_forward import is_bare, is_fused


class Doubled(nn.LayerNorm):
    def forward(self, input):
        return 2 * super().forward(input)


class Named(nn.LayerNorm):
    """A subclass that computes the same as its base."""


def small():
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Sequential(nn.LayerNorm((2, 4)), nn.RMSNorm(8)))
    model.append(Doubled(8)).append(Named(8)).append(nn.LayerNorm(8, elementwise_affine=False))
    return model


def forwards_of(model):
    return [name for name, module in model.named_modules() if is_fused(module)]


def test_report_and_what_stays():
    model = small()
    kinds = [type(m) for m in model.modules()]
    keys, untouched = list(model.state_dict()), small()
    report = pyfused.fuse_(model)
    assert {e.name: e.note for e in report.replaced} == {
        "1": "pyfused.layer_norm",
        "2.1": "pyfused.rms_norm",
        "4": "pyfused.layer_norm",
    }
    assert {e.name: e.note for e in report.left} == {
        "2.0": "normalises over 2 dimensions; the kernels take the last one",
        "3": "its class has a forward other than LayerNorm's",
        "5": "has no weight",
    }
    assert "* (Doubled): its class has a forward other than LayerNorm's" in str(report)
    assert forwards_of(model) == ["1", "2.1", "4"]
    assert [type(m) for m in model.modules()] == kinds
    assert list(model.state_dict()) == keys
    assert forwards_of(untouched) == []


def test_same_output_and_back():
    model, x = small(), torch.randn(3, 6)
    del model[2][0]  # it takes (2, 4), a shape that no other module returns
    before = model(x)
    pyfused.fuse_(model)
    with pyfused.backend("reference", strict=True):
        torch.testing.assert_close(model(x), before)
    assert pyfused.fuse_(model).replaced  # a second call changes nothing
    assert pyfused.unfuse_(model) is model
    assert forwards_of(model) == []
    assert torch.equal(model(x), before)


def test_filter():
    model = small()
    report = pyfused.fuse_(model, filter_fn=lambda name, module: isinstance(module, nn.RMSNorm))
    assert [e.name for e in report.replaced] == ["2.1"]
    assert {e.note for e in report.left if e.name in ("1", "4")} == {"filter_fn says no"}


@pytest.mark.parametrize("clone", ["deepcopy", "pickle", "torch.save"])
def test_copies_have_their_own_forward(clone):
    model, x = nn.Sequential(nn.LayerNorm(6)), torch.randn(3, 6)
    pyfused.fuse_(model)
    if clone == "deepcopy":
        other = copy.deepcopy(model)
    elif clone == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert forwards_of(other) == ["0"]
    assert other[0].__dict__["forward"].args[0] is other[0]
    with torch.no_grad():
        other[0].weight.fill_(3.0)
    torch.testing.assert_close(other(x), 3 * model(x))
    torch.testing.assert_close(model(x), nn.functional.layer_norm(x, (6,)))


def test_hooks_still_run():
    model, seen = nn.Sequential(nn.LayerNorm(6)), []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    pyfused.fuse_(model)
    assert model(torch.randn(2, 6)) is seen[0]
    assert not is_bare(model[0])
    assert is_bare(model, None)


def test_a_forward_of_someone_else_stays():
    norm = nn.LayerNorm(6)
    norm.forward = functools.partial(nn.functional.layer_norm, normalized_shape=(6,))
    assert not is_bare(norm)
    (entry,) = pyfused.fuse_(norm).left
    assert (entry.name, entry.note) == ("", "this instance has a forward of its own already")
    pyfused.unfuse_(norm)
    assert "forward" in norm.__dict__


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes_that_torch_takes_still_run(dtype):
    """float64, and bfloat16 beside float32 weights, run torch's own function."""
    norm, x = nn.LayerNorm(6), torch.randn(3, 6, dtype=dtype)
    norm = norm.double() if dtype == torch.float64 else norm
    expected = norm(x)
    pyfused.fuse_(norm)
    assert torch.equal(norm(x), expected)


def test_bad_arguments():
    with pytest.raises(TypeError, match="model is an int"):
        pyfused.fuse_(3)
    with pytest.raises(TypeError, match="model is a str"):
        pyfused.unfuse_("gpt2")
    with pytest.raises(TypeError, match="filter_fn is a list"):
        pyfused.fuse_(nn.LayerNorm(3), filter_fn=["0"])
