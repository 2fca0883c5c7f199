"""Do the CUDA kernels give the same bits in every order of threads and blocks, and touch only their own memory?"""

import os
import re
import sys

import operator_calls
import pytest
import shim
import torch

import pyfused
from pyfused import dispatch, extensions
from pyfused.testing import running

if not extensions.emulating_cuda():
    pytest.skip("this machine has a GPU: the kernels run there", allow_module_level=True)
# bfloat16's kernels are float16's templates: the same addresses and barriers. tests/ops judge its values.
FLOAT_TYPES = {"float32": torch.float32, "float16": torch.float16}
SANITIZED = os.environ.get("PYFUSED_SANITIZE") == "1"


def on_cuda_kernels(name, dtype):
    """The call's results by csrc/cuda, or None if explain() says that these kernels lack the case."""
    try:
        torch.manual_seed(3)  # for dropout
        with running("cuda"):
            return operator_calls.prepared(name, "cpu", FLOAT_TYPES[dtype])()
    except dispatch.BackendError:
        return None


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("name", operator_calls.CALLS)
def test_every_order_gives_the_same_bits(name, dtype):
    expected = on_cuda_kernels(name, dtype)
    if expected is None:
        assert name in LACKING
        return
    for order in () if SANITIZED else (1, 2):
        with shim.order(shim.load(), order):
            for one, other in zip(expected, on_cuda_kernels(name, dtype), strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    assert all(torch.isfinite(t).all() for t in expected)


# Operators that csrc/cuda lacks: the materialised bias is a gather, which the Triton kernel does as well.
LACKING = ("relative_bias",)


def test_a_cuda_error_names_operator_shape_and_device(monkeypatch):
    """The shim has no cuda:1; and the next launch does not get a failed launch's error."""
    from pyfused.kernels.cuda import _row_norm

    x, weight = torch.ones(3, 768), torch.ones(768)
    with monkeypatch.context() as patched:
        patched.setattr(_row_norm, "where", lambda device: lambda: (1, 0))
        with (
            running("cuda"),
            pytest.raises(RuntimeError, match=r"layer_norm .*shape \(3, 768\) on cuda:1: invalid argument"),
        ):
            pyfused.layer_norm(x, weight)
    dispatch.forget()  # the launch prepared for cuda:1
    with running("cuda"):
        assert pyfused.layer_norm(x, weight).isfinite().all()


@pytest.mark.skipif(SANITIZED, reason="this is the run under the sanitizers")
def test_no_access_out_of_bounds_and_no_undefined_behaviour():
    """Runs the calls above again, in a process under AddressSanitizer and UBSan."""
    options = ["-x", "--capture=sys", "-p", "no:cacheprovider", "-o", "addopts="]
    command = [sys.executable, "-m", "pytest", *options, __file__]
    done = shim.sanitized(command, cwd=shim.ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[:6000]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 2 * len(operator_calls.CALLS)
