"""The axes that the models' tests run over."""

from contextlib import ExitStack

import pytest
import torch

import pyfused
from pyfused import dispatch
from pyfused.testing import available

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=available(DEVICE))
def each_backend(request):
    """The test runs once on every backend of this machine; where it lacks an operator the next one steps in, since the
    operators' own tests are strict."""
    name, _, isa = request.param.partition(":")
    with ExitStack() as stack:
        if isa:
            stack.enter_context(dispatch.use_isa(isa))
        stack.enter_context(pyfused.backend(name))
        yield request.param


@pytest.fixture
def device():
    return DEVICE
