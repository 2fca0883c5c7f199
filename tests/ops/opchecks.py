"""Do an operator's registered forms pass torch.library.opcheck and agree with each other?"""

import torch


def check_registered(name, arguments, *, save=None, summed=False):
    """Checks pyfused::<name> for these arguments, and its form without gradients for the same arguments, detached.

    save: the position of the argument that asks for the backward's tensors. summed: whether x + residual is a result.
    """
    operator = getattr(torch.ops.pyfused, name)
    torch.library.opcheck(operator, arguments)
    plain = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    if save is not None:
        plain[save] = False
    plain += [a.default_value for a in operator.default._schema.arguments[len(plain) :]]
    inference = getattr(torch.ops.pyfused, f"{name}_inference" + ("_sum" if summed else ""))
    torch.library.opcheck(
        inference, plain, test_utils=("test_schema", "test_faketensor")
    )  # test_compile.py tests the rest
    found, expected = inference(*plain), operator(*plain)
    found = found if isinstance(found, tuple) else (found,)
    expected = expected if isinstance(expected, tuple) else (expected,)
    assert len(found) == (2 if summed else 1)
    for f, e in zip(found, expected, strict=False):
        assert torch.equal(f, e)
