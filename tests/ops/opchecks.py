"""torch.library.opcheck of a differentiable operator in all its registered forms, and whether they say the same."""

import torch


def check_registered(name, arguments, *, save=None, summed=False):
    """pyfused::<name> for these arguments, and its form without gradients for the same, detached.

    save: the position of the argument that asks for what a gradient needs. summed: whether x + residual is a result.
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
    )  # the rest is test_compile.py's
    found, expected = inference(*plain), operator(*plain)
    found = found if isinstance(found, tuple) else (found,)
    expected = expected if isinstance(expected, tuple) else (expected,)
    assert len(found) == (2 if summed else 1)
    for f, e in zip(found, expected, strict=False):
        assert torch.equal(f, e)
    check_into(name, plain, found)


def check_into(name, arguments, expected):
    """pyfused::<name>_into writes the same: twice, the second time by a prepared launch; and into strided memory too."""
    into = getattr(torch.ops.pyfused, f"{name}_into" + ("_sum" if len(expected) == 2 else ""))
    outputs = [torch.empty_strided(e.shape, e.stride(), dtype=e.dtype, device=e.device) for e in expected]
    torch.library.opcheck(into, (*arguments, *outputs), test_utils=("test_schema", "test_faketensor"))
    with torch.no_grad():
        strided = [torch.empty((*e.shape, 2), dtype=e.dtype, device=e.device)[..., 0] for e in expected]
        for given in (outputs, outputs, strided, strided):
            for output in given:
                output.fill_(torch.nan)
            assert into(*arguments, *given) is None
            for output, e in zip(given, expected, strict=True):
                assert torch.equal(output, e)
