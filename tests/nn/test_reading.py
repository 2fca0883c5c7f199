"""Do modules that read their parameters through functions survive copies and pickles, also with several functions?"""

import copy
import pickle

import pytest
import torch
from torch import nn

from pyfused.nn.reading import read_through


def doubled(parameter):
    return 2 * parameter


def less_one(parameter):
    return parameter - 1


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("steps", [[(doubled, ())], [(doubled, ("weight",)), (less_one, ())]], ids=["one", "two"])
def test_copies(clone, steps):
    module, x = nn.Linear(3, 2), torch.randn(4, 3)
    weight, bias = module.weight.detach().clone(), module.bias.detach().clone()
    for read, names in steps:
        read_through(module, read, *names)
    expected = nn.functional.linear(x, *((2 * weight, 2 * bias) if len(steps) == 1 else (2 * weight - 1, bias - 1)))
    for found in (module, clone(module)):
        torch.testing.assert_close(found(x), expected)
        assert found.state_dict().keys() == {"weight", "bias"}
        assert torch.equal(found.state_dict()["weight"], weight)
