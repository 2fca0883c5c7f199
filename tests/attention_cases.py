"""What do the tests of attention share? Their cases, attention in plain PyTorch, and how they judge.

Below, `fused` and `plain` are functions of inputs (tensors by name, each with a gradient) and options. `make` draws both.
"""

import dataclasses
import functools

import torch
from draws import check

from pyfused.kernels.reference._philox import keep_mask


def plain(inputs, options, seed=None, logarithm=False):
    """Softmax attention in plain PyTorch, every step in the inputs' dtype; rows that see no key are zeros.

    logarithm: computes softmax as exp(s - logsumexp(s)), for comparing gradients. A kernel that keeps one log-sum-exp per
    row for the backward instead of the probabilities, as SDPA's flash kernels do, has that number's rounding in its gradients.
    """
    query, key, value = inputs["query"], inputs["key"], inputs["value"]
    group, (sq, d), sk = query.shape[1] // key.shape[1], query.shape[2:], key.shape[2]
    scale = options["scale"] if options["scale"] is not None else d**-0.5
    s = query @ key.repeat_interleave(group, 1).transpose(-1, -2) * scale
    if "attn_bias" in inputs:
        s = s + inputs["attn_bias"]
    if options["is_causal"]:
        s = s.masked_fill(torch.ones(sq, sk, device=s.device).tril(sk - sq) == 0, -torch.inf)
    if "padding_mask" in options:
        s = s.masked_fill(~options["padding_mask"][:, None, None], -torch.inf)
    dead = (s == -torch.inf).all(-1, keepdim=True)
    s = s.masked_fill(dead, 0)
    p = ((s - s.logsumexp(-1, keepdim=True)).exp() if logarithm else torch.softmax(s, -1)).masked_fill(dead, 0)
    if seed is not None:
        p = p * keep_mask(seed, options["dropout_p"], p.shape) / (1 - options["dropout_p"])
    return p @ value.repeat_interleave(group, 1)


@dataclasses.dataclass(frozen=True)
class Case:
    """B, H, Hkv, Sq, Sk, D and the options of one comparison; seldom: too slow for an interpreter."""

    sizes: tuple[int, int, int, int, int, int]
    is_causal: bool = False
    padding: str = ""  # "random", "left", "right", "all" (one batch entry has no real token)
    bias: str = ""  # "full", "head" (1, H, Sq, Sk), "row" (B, 1, 1, Sk), "batch" (Sq, Sk)
    hidden: bool = False  # some of the bias is -inf
    dropout_p: float = 0.0
    scale: float | None = None
    seldom: bool = False

    def __str__(self):
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)[1:-1]}
        options = [name if value is True else str(value) for name, value in values.items() if value]
        return "-".join(["x".join(map(str, self.sizes)), *options])


def make_mask(kind, b, sk, device):
    position = torch.arange(sk, device=device)
    length = torch.tensor([1 + (sk - 1) * (n + 1) // (b + 1) for n in range(b)], device=device)[:, None]
    if kind == "random":
        return torch.rand(b, sk, device=device) < 0.6
    if kind == "all":
        return torch.arange(b, device=device)[:, None].ne(0).expand(b, sk)
    return position < length if kind == "right" else position >= sk - length


def make(case, dtype, device):
    b, h, hkv, sq, sk, d = case.sizes
    inputs = {"query": torch.randn(b, h, sq, d, device=device).to(dtype)}
    inputs["key"], inputs["value"] = (torch.randn(b, hkv, sk, d, device=device).to(dtype) for _ in range(2))
    options = {"is_causal": case.is_causal, "scale": case.scale, "dropout_p": case.dropout_p}
    if case.padding:
        options["padding_mask"] = make_mask(case.padding, b, sk, device)
    if case.bias:
        shape = {"full": (b, h, sq, sk), "head": (1, h, sq, sk), "row": (b, 1, 1, sk), "batch": (sq, sk)}[case.bias]
        hidden = torch.rand(shape, device=device) < (0.2 if case.hidden else 0.0)
        inputs["attn_bias"] = torch.randn(shape, device=device).to(dtype).masked_fill(hidden, -torch.inf)
    return inputs, options


def drawn_seed(options, device):
    """The seed that attention will draw next; the generator does not advance."""
    if not options["dropout_p"]:
        return None
    generator = torch.cuda if device == "cuda" else torch
    state = generator.get_rng_state()
    seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)
    generator.set_rng_state(state)
    return seed


def judge_forward(make, fused, plain):
    def once():
        inputs, options = make()
        query = inputs["query"]
        seed = drawn_seed(options, query.device.type)
        out = fused(inputs, options)
        assert out.dtype == query.dtype
        assert out.transpose(1, 2).is_contiguous()
        truth = plain({k: v.double() for k, v in inputs.items()}, options, seed)
        return {"output": (out, plain(inputs, options, seed), truth)}

    check(once)


def judge_backward(make, fused, plain):
    def once():
        inputs, options = make()
        cotangent = torch.randn_like(inputs["query"])
        yardstick = functools.partial(plain, options=options, seed=drawn_seed(options, cotangent.device.type))
        return gradients(lambda t: fused(t, options), yardstick, inputs, cotangent)

    check(once)


def judge_threads(make, fused, plain):
    """Checks that results and gradients are right, and repeatable bit for bit, with every number of threads."""

    def once(threads):
        torch.set_num_threads(threads)
        inputs, options = make()
        yardstick = functools.partial(plain, options=options)
        found = gradients(lambda t: fused(t, options), yardstick, inputs, torch.randn_like(inputs["query"]))
        truth = yardstick({k: v.double() for k, v in inputs.items()})
        return found | {"output": (fused(inputs, options), yardstick(inputs), truth)}

    for threads in (1, 2, 5):
        check(functools.partial(once, threads))
    first, again = (torch.manual_seed(7) and once(2) for _ in range(2))
    assert all(torch.equal(first[what][0], again[what][0]) for what in first)


def gradients(fused, plain, inputs, cotangent):
    """{name: (fused, plain, truth)} of every input's gradient; only plain gets `logarithm`, the truth does not."""

    def run(function, wide):
        leaves = {k: v.to(wide).requires_grad_() for k, v in inputs.items()}
        return torch.autograd.grad(function(leaves), list(leaves.values()), cotangent.to(wide))

    dtype = cotangent.dtype
    actual, expected = run(fused, dtype), run(lambda t: plain(t, logarithm=True), dtype)
    assert [t.dtype for t in actual] == [t.dtype for t in inputs.values()]
    return {f"gradient of {k}": found for k, *found in zip(inputs, actual, expected, run(plain, torch.float64))}


def ones(*shape, dtype=torch.float32, device="cpu"):
    return torch.ones(shape, dtype=dtype, device=device)
