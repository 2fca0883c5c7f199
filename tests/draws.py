"""How does a test judge a few numbers? By one draw if it meets the tolerance rule, else by several draws together."""

import torch

from pyfused.testing import judge


def check(once, draws=20):
    """once() -> {name: (actual, plain, truth)} from new random numbers at every call; plain may be a list, as for `judge`.

    Elements may share one cause of error (the log-sum-exp of a row, the only row of a product). Then one draw may break the
    rule by chance. Several draws together do not, and a real fault still shows.
    """
    drawn = {}
    for draw in range(draws):
        if draw:  # new numbers, even if once() sets a seed
            torch.manual_seed(torch.initial_seed() + draw)
        for what, tensors in once().items():
            drawn.setdefault(what, []).append(tensors)
        judged = {what: judge(*together(found)) for what, found in drawn.items()}
        failed = {what: judgement for what, judgement in judged.items() if not judgement.ok}
        if not failed:
            return
    raise AssertionError(f"{draws} draws together: {failed}")


def together(found):
    """Joins [(actual, plain, truth), ...] of several draws into one tensor each."""
    actual, plain, truth = zip(*found)
    plain = torch.stack(plain) if isinstance(plain[0], torch.Tensor) else list(map(torch.stack, zip(*plain)))
    return torch.stack(actual), plain, torch.stack(truth)


def with_gradients(ours, plain, tensors, cotangents):
    """{"output 0": (actual, plain, truth), ...} of two functions: their results, then the gradients of all tensors but None.

    cotangents: one for each result; a function that gives fewer results takes the first. plain may be a list, as for `judge`.
    """
    dtype = cotangents[0].dtype

    def run(function, dtype):
        leaves = [None if t is None else t.to(dtype).requires_grad_() for t in tensors]
        out = function(*leaves)
        out = out if isinstance(out, tuple) else (out,)
        loss = sum((o * c.to(dtype)).sum() for o, c in zip(out, cotangents))
        return [*out, *torch.autograd.grad(loss, [t for t in leaves if t is not None])]

    actual = run(ours, dtype)
    assert {t.dtype for t in actual} == {dtype}
    ways = plain if isinstance(plain, list) else [plain]
    expected = zip(*(run(way, dtype) for way in ways))
    expected = map(list, expected) if isinstance(plain, list) else (one for (one,) in expected)
    return {
        f"output {i}": found for i, found in enumerate(zip(actual, expected, run(ways[0], torch.float64), strict=True))
    }


def check_modules(modules, inputs, run):
    """Judges values, and gradients of parameters and inputs.

    Args:
        modules: pyfused's, the plain one, and the plain one in float64.
        inputs: tensors that give the shapes of random inputs; a tensor given twice stays one tensor.
        run: (module, leaves, convert) -> output. For the last module, `convert` makes other floats float64.
    """

    def once():
        values, cotangent, found = {id(t): torch.randn_like(t) for t in inputs}, None, []
        for module, convert in zip(modules, (lambda t: t, lambda t: t, to_double), strict=True):
            leaves = {key: convert(t).clone().requires_grad_() for key, t in values.items()}
            out = run(module, [leaves[id(t)] for t in inputs], convert)
            cotangent = torch.randn(out.shape) if cotangent is None else cotangent
            module.zero_grad()
            (out * cotangent.to(out.dtype)).sum().backward()
            grads = {f"gradient of {name}": p.grad for name, p in module.named_parameters()}
            grads |= {f"gradient of input {i}": leaf.grad for i, leaf in enumerate(leaves.values())}
            found.append({"output": out, **grads})
        assert found[0].keys() == found[1].keys()
        return {what: [one[what] for one in found] for what in found[0]}

    check(once)


def to_double(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def chained_linear(x, weight, bias=None):
    """x W^T + b with each element one chain of multiply-adds from the first feature to the last."""
    y = x[..., :1] * weight[:, 0]
    for k in range(1, x.shape[-1]):
        y = y + x[..., k, None] * weight[:, k]
    return y if bias is None else y + bias
