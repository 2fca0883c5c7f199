"""Over which axes do the models' tests run?"""

from contextlib import ExitStack

import pytest
import torch

import pyfused
from pyfused import dispatch
from pyfused.testing import available

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=available(DEVICE))
def each_backend(request):
    """Runs the test once on every backend of this machine. If a backend lacks an operator, the next one runs; the operators'
    own tests are strict."""
    name, _, isa = request.param.partition(":")
    with ExitStack() as stack:
        if isa:
            stack.enter_context(dispatch.use_isa(isa))
        stack.enter_context(pyfused.backend(name))
        yield request.param


@pytest.fixture
def device():
    return DEVICE
