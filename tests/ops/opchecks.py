"""Do an operator's registered forms pass torch.library.opcheck and agree with each other?"""

import torch

from pyfused import dispatch

OF_KERNELS = ("test_schema", "test_faketensor")
OF_REGISTRATION = ("test_autograd_registration", "test_aot_dispatch_dynamic")


def opcheck(operator, arguments):
    """torch.library.opcheck. What a kernel returns is checked on every backend. What is registered, and how it is traced for
    any size, is the same for all of them: those checks take nine tenths of the time and run on one."""
    forced = dispatch.forced()
    everything = forced is None or forced[0] == "reference"
    torch.library.opcheck(operator, arguments, test_utils=OF_KERNELS + (OF_REGISTRATION if everything else ()))


def check_registered(name, arguments, *, save=None, summed=False):
    """Checks pyfused::<name> for these arguments, and its form without gradients for the same arguments, detached.

    save: the position of the argument that asks for the backward's tensors. summed: whether x + residual is a result.
    """
    operator = getattr(torch.ops.pyfused, name)
    opcheck(operator, arguments)
    plain = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    if save is not None:
        plain[save] = False
    plain += [a.default_value for a in operator.default._schema.arguments[len(plain) :]]
    inference = getattr(torch.ops.pyfused, f"{name}_inference" + ("_sum" if summed else ""))
    torch.library.opcheck(inference, plain, test_utils=OF_KERNELS)  # test_compile.py tests the rest
    found, expected = inference(*plain), operator(*plain)
    found = found if isinstance(found, tuple) else (found,)
    expected = expected if isinstance(expected, tuple) else (expected,)
    assert len(found) == (2 if summed else 1)
    for f, e in zip(found, expected, strict=False):
        assert torch.equal(f, e)
