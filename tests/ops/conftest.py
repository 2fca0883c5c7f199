"""The axes that every operator's test runs over."""

import pytest
import torch

from pyfused.testing import available, running

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=available(DEVICE))
def each_backend(request):
    """The test runs once on every backend of this machine, strictly: no silent fall-through."""
    with running(request.param):
        yield request.param


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=["float32", "float16", "bfloat16"])
def dtype(request):
    return request.param


@pytest.fixture
def device():
    return DEVICE
