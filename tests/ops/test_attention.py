"""Is attention right on every backend? Values, gradients, masks, bias, dropout, strides, memory, errors, opcheck."""

import functools

import pytest
import torch
import torch.nn.functional as F
from attention_cases import Case, drawn_seed, gradients, judge_backward, judge_forward, judge_threads, make, ones, plain
from draws import check
from opchecks import check_registered, opcheck

import pyfused
from pyfused import extensions
from pyfused.kernels.reference import attention as reference
from pyfused.kernels.reference._philox import keep_mask
from pyfused.testing import assert_close, running

CASES = [
    Case((1, 1, 1, 1, 1, 1)),
    Case((6, 3, 3, 7, 7, 8), is_causal=True),
    Case((6, 4, 2, 7, 2, 8), is_causal=True),  # the first queries see no key
    Case((12, 2, 1, 2, 7, 40), is_causal=True, bias="head"),
    Case((6, 2, 2, 7, 33, 13), padding="random", bias="full", hidden=True),
    Case((2, 2, 2, 20, 37, 16), is_causal=True, padding="left", bias="row"),
    Case((4, 2, 1, 17, 17, 8), is_causal=True, padding="left", dropout_p=0.3),
    Case((8, 2, 2, 5, 37, 8), padding="all", bias="batch", dropout_p=0.1, scale=0.7),
    Case((2, 2, 2, 16, 40, 3), padding="right", bias="full", dropout_p=0.5, scale=-0.4),
    Case((8, 4, 1, 1, 129, 64), padding="random"),
    Case((2, 2, 2, 127, 127, 40), is_causal=True, dropout_p=0.1, seldom=True),
    Case((1, 2, 1, 129, 137, 64), is_causal=True, bias="head", seldom=True),
    Case((2, 2, 2, 137, 129, 64), padding="right", seldom=True),
    Case((2, 2, 2, 129, 129, 80), padding="random", bias="full", seldom=True),
    Case((1, 2, 2, 127, 137, 128), is_causal=True, padding="left", seldom=True),
    Case((1, 2, 1, 33, 137, 256), bias="row", seldom=True),
    Case((1, 1, 1, 1025, 1025, 64), is_causal=True, seldom=True),
    Case((1, 2, 1, 2, 1025, 80), is_causal=True, padding="right", seldom=True),
]
# One query against a cache, which needs no gradient, and cases that only the forward kernels distinguish.
FORWARD_ONLY = [
    Case((4, 8, 2, 1, 1025, 40), bias="full", seldom=True),
    Case((2, 4, 4, 1, 137, 64), is_causal=True, padding="left", seldom=True),
    Case((2, 2, 2, 3, 70, 80), is_causal=True, padding="right"),
    # Long enough to split the keys, in every head size that a GPU's kernels distinguish.
    Case((2, 8, 2, 2, 777, 64), padding="all", bias="head", seldom=True),
    Case((1, 4, 2, 3, 777, 128), is_causal=True, padding="random", bias="full", dropout_p=0.2, seldom=True),
    Case((1, 4, 1, 1, 600, 256), padding="random", dropout_p=0.1, scale=-0.1, seldom=True),
    # Prefill: the kernels choose by head size, number of tiles, and whether there is a bias.
    Case((1, 3, 1, 70, 150, 64), is_causal=True, padding="random", seldom=True),
    Case((2, 2, 2, 40, 60, 80), is_causal=True, seldom=True),
    Case((2, 2, 1, 40, 70, 200), is_causal=True, padding="left", seldom=True),
    Case((2, 2, 1, 70, 90, 64), bias="full", padding="right", dropout_p=0.2, seldom=True),
]


def fused(inputs, options):
    return pyfused.attention(**inputs, **options)


@pytest.mark.parametrize("case", CASES + FORWARD_ONLY, ids=str)
def test_forward(each_backend, dtype, device, case):
    judge_forward(lambda: make(case, dtype, device), fused, plain)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward(each_backend, dtype, device, case):
    """test_few_queries_have_the_gradients_of_softmax covers float32 with few queries."""
    judge_backward(lambda: make(case, dtype, device), fused, plain)


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("sizes", [(1, 1, 1, 300, 300, 24), (2, 3, 3, 130, 170, 24), (1, 2, 2, 2, 1500, 24)], ids=str)
def test_threads_do_not_change_the_result(each_backend, sizes):
    judge_threads(lambda: make(Case(sizes, is_causal=True, padding="left"), torch.float32, "cpu"), fused, plain)


@pytest.mark.parametrize("sizes", [(4, 4, 4, q, k, 24) for q, k in [(1, 1), (1, 40), (3, 70), (8, 33)]], ids=str)
def test_few_queries_have_the_gradients_of_softmax(device, sizes):
    """Forces no backend and compares with ordinary softmax, which rounds no log-sum-exp to float32."""

    def once():
        inputs, options = make(Case(sizes), torch.float32, device)
        cotangent = torch.randn(inputs["query"].shape, device=device)
        return gradients(lambda t: fused(t, options), lambda t, logarithm=False: plain(t, options), inputs, cotangent)

    check(once)


@pytest.mark.parametrize("half, bound", [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)], ids=str)
@pytest.mark.parametrize("hidden", [0, 63])
def test_the_gradients_of_a_few_scores_in_half_precision(each_backend, device, hidden, half, bound):
    """Gradients of two scores cancel but for a rest. Each draw counts: their mean hides an error of a percent in one. With
    `hidden` padding before them the two keys lie in two tiles of a kernel."""

    def once():
        inputs, options = make(Case((1, 1, 1, 3, hidden + 2, 40), is_causal=not hidden), half, device)
        if hidden:
            options["padding_mask"] = torch.arange(hidden + 2, device=device)[None] >= hidden
        cotangent, yardstick = torch.randn_like(inputs["query"]), functools.partial(plain, options=options)
        return gradients(lambda t: fused(t, options), yardstick, inputs, cotangent)

    for _ in range(40):
        for what, (actual, _, truth) in once().items():
            assert (actual - truth).norm() < bound * truth.norm(), what


def test_agrees_with_sdpa(each_backend, dtype, device):
    query, key, value = (torch.randn(2, 3, 33, 16, device=device).to(dtype) for _ in range(3))
    out = pyfused.attention(query, key, value, is_causal=True)
    truth = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), is_causal=True)
    assert_close(out, F.scaled_dot_product_attention(query, key, value, is_causal=True), truth)


@pytest.mark.parametrize("sizes", [(2, 2, 2, 20, 20, 8), (2, 2, 1, 2, 40, 8)], ids=str)
def test_what_padding_hides_does_not_matter(each_backend, device, sizes):
    """Keys and values at padding hold garbage: 1e30 on every backend, NaN if the backend never reads hidden rows."""
    inputs, options = make(Case(sizes, is_causal=True, padding="random", bias="full"), torch.float32, device)
    options["padding_mask"][:, 0] = True
    hidden = ~options["padding_mask"][:, None, :, None]
    cotangent = torch.randn(inputs["query"].shape, device=device)

    def run(garbage):
        leaves = {k: v.clone().requires_grad_() for k, v in inputs.items()}
        changed = {k: v.masked_fill(hidden, garbage) if k in ("key", "value") else v for k, v in leaves.items()}
        out = pyfused.attention(**changed, **options)
        return out.detach(), *torch.autograd.grad(out, list(leaves.values()), cotangent)

    clean = run(0.0)
    for garbage in (1e30, *((torch.nan, torch.inf) if each_backend.startswith("cpu") else ())):
        for a, b in zip(clean, run(garbage)):
            assert torch.equal(a, b)


@pytest.mark.parametrize("queries", [1, 20])
def test_nan_reaches_the_gradients(each_backend, device, queries):
    """Also where it is the only score, or the only one of the last tile of keys."""
    if each_backend == "cuda":
        pytest.skip("csrc/cuda has no backward")
    for keys, lone in (65, False), (300, False), (40, True):
        query, key, value, bias = (torch.randn(1, 1, s, 16, device=device) for s in (queries, keys, keys, keys))
        (key[:, :, 3] if lone else query[:, :, 0]).fill_(torch.nan)
        bias = bias[..., 0][:, :, None].masked_fill((torch.arange(keys, device=device) != 3) & lone, -torch.inf)
        cotangent = torch.randn_like(query)

        def gradients(query=query, key=key, value=value, bias=bias, cotangent=cotangent):
            leaves = [t.clone().requires_grad_() for t in (query, key, value)]
            return torch.autograd.grad(pyfused.attention(*leaves, attn_bias=bias), leaves, cotangent)

        found = gradients()
        with running("reference"):
            for one, plain in zip(found, gradients()):
                assert torch.equal(one.isnan(), plain.isnan())


def test_dead_rows_are_zero(each_backend, dtype, device):
    query, key, value = (torch.randn(2, 2, 6, 8, device=device).to(dtype).requires_grad_() for _ in range(3))
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [0] * 6], device=device)
    out = pyfused.attention(query, key, value, is_causal=True, padding_mask=mask)
    assert (out[0, :, :3] == 0).all()
    assert (out[1] == 0).all()
    out.backward(torch.ones_like(out))
    assert (query.grad[0, :, :3] == 0).all()
    assert (value.grad[0, :, :3] == 0).all()
    assert all((t.grad[1] == 0).all() for t in (query, key, value))
    tensors, options = [t.detach() for t in (query, key, value)], (True, mask != 0, None, 0.3, 0.0, None, True)
    _, lse = torch.ops.pyfused.attention(*tensors, *options)
    assert (lse[0, :, :3] == torch.inf).all()
    assert (lse[1] == torch.inf).all()
    _, plain_lse = reference.forward(*tensors, *options)
    truth = torch.logsumexp(reference.scores(*(t.double() for t in tensors[:2]), *options[:4]), -1)
    assert_close(lse[0, :, 3:], plain_lse[0, :, 3:], truth[0, :, 3:])


@pytest.mark.parametrize("sizes", [(2, 2, 2, 20, 20, 8), (2, 2, 2, 1, 40, 8)], ids=str)
def test_views_go_through_without_a_copy(each_backend, device, sizes):
    """Views of one (B, S, 3, H, D) tensor reach the kernel with their own pointers and strides."""
    from pyfused.ops.attention import bind

    b, h, _, sq, sk, d = sizes
    packed = torch.randn(b, sk, 3, h, d, device=device)
    views = [packed[:, :, i].transpose(1, 2) for i in range(3)]
    views[0] = views[0][:, :, sk - sq :]
    for view, bound in zip(views, bind(*views, is_causal=True)):
        assert (bound.data_ptr(), bound.stride()) == (view.data_ptr(), view.stride())
    dense = [v.contiguous() for v in views]
    expected = pyfused.attention(*dense, is_causal=True)
    assert torch.equal(pyfused.attention(*views, is_causal=True), expected)
    last = [v.transpose(2, 3).contiguous().transpose(2, 3) for v in dense]  # a last dimension that is not contiguous
    assert torch.equal(pyfused.attention(*last, is_causal=True), expected)
    shared = dense[0][:, :1].expand(b, h, sq, d)  # stride 0 over the heads
    assert torch.equal(pyfused.attention(shared, *dense[1:]), pyfused.attention(shared.contiguous(), *dense[1:]))


def test_bias_of_any_strides(each_backend, device):
    query, key, value = (torch.randn(2, 2, n, 8, device=device) for n in (18, 21, 21))
    full = torch.randn(2, 2, 18, 21, device=device)
    for bias in (full.transpose(2, 3).contiguous().transpose(2, 3), torch.randn(21, device=device),
                 torch.randn(18, 1, device=device), torch.randn(2, 1, 1, 1, device=device),
                 torch.randn(2, 2, 18, 42, device=device)[..., ::2]):  # fmt: skip
        dense = bias.expand(2, 2, 18, 21).contiguous()
        a, b = (pyfused.attention(query, key, value, attn_bias=t) for t in (bias, dense))
        assert torch.equal(a, b)


def test_a_bias_of_a_conjugated_tensor(each_backend, device):
    """torch keeps its imaginary part as a view with a sign bit, which the kernels do not see."""
    query, key, value = (torch.randn(2, 2, n, 8, device=device) for n in (18, 21, 21))
    bias = torch.randn(2, 2, 18, 21, dtype=torch.complex64, device=device)
    found = [pyfused.attention(query, key, value, attn_bias=t) for t in (bias.imag, bias.conj().imag, -bias.imag)]
    assert torch.equal(found[1], found[2])
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("sizes", [(2, 2, 2, 19, 23, 32), (1, 2, 1, 1, 30, 32)], ids=str)
def test_dropout_keeps_what_philox_says(each_backend, device, sizes):
    """With value = identity the output is the probabilities, exactly 0 where the generator drops one."""
    b, h, hkv, sq, sk, d = sizes
    query, key = torch.randn(b, h, sq, d, device=device), torch.randn(b, hkv, sk, d, device=device)
    value = torch.eye(sk, d, device=device).expand(b, hkv, sk, d)
    seed = drawn_seed({"dropout_p": 0.4}, device)
    out = pyfused.attention(query, key, value, dropout_p=0.4)
    assert torch.equal(out[..., :sk] != 0, keep_mask(seed, 0.4, (b, h, sq, sk)))


def test_dropout_is_reproducible_and_fair(each_backend, device):
    sk = d = 64
    query, key = torch.randn(2, 2, 40, d, device=device), torch.randn(2, 2, sk, d, device=device)
    value = torch.eye(sk, device=device).expand(2, 2, sk, d)

    def draw(seed):
        torch.manual_seed(seed)
        return pyfused.attention(query, key, value, dropout_p=0.25)

    first, again, other = draw(0), draw(0), draw(1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    kept, n = (first != 0).double().mean().item(), first.numel()
    assert abs(kept - 0.75) < 5 * (0.25 * 0.75 / n) ** 0.5


def test_dropout_is_the_same_backwards(each_backend, device):
    """With a cotangent of ones, grad_value sums the probabilities that the forward kept over the queries."""
    query, key = torch.randn(1, 2, 20, 8, device=device), torch.randn(1, 2, 24, 8, device=device)
    value = torch.eye(24, device=device).expand(1, 2, 24, 24).contiguous()
    padded = [F.pad(t, (0, 16)).requires_grad_() for t in (query, key)]
    value.requires_grad_()
    out = pyfused.attention(*padded, value, dropout_p=0.5)
    (grad,) = torch.autograd.grad(out, value, torch.ones_like(out))
    weights = out.detach()
    assert_close(grad[..., 0], weights.sum(2), weights.double().sum(2))
    assert torch.equal(grad[..., 0] == 0, (weights == 0).all(2))


@pytest.mark.parametrize("full", [True, False])
def test_opcheck(each_backend, device, full):
    query = torch.randn(1, 2, 4, 8, device=device, requires_grad=True)
    key, value = (torch.randn(1, 1, 5, 8, device=device, requires_grad=True) for _ in range(2))
    mask = torch.ones(1, 5, dtype=torch.bool, device=device) if full else None
    bias = torch.randn(1, 2, 4, 5, device=device, requires_grad=True) if full else None
    seed = torch.tensor([7], device=device) if full else None
    common = (True, mask, bias, 0.3, 0.2 if full else 0.0, seed)
    check_registered("attention", (query, key, value, *common, True), save=9)
    args = [None if t is None else t.detach() for t in (query, key, value)]
    out, lse = torch.ops.pyfused.attention(*args, *(t.detach() if t is bias and full else t for t in common), True)
    common = tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in common)
    opcheck(torch.ops.pyfused.attention_backward, (torch.randn_like(out), *args, out, lse, *common, full))


def test_no_grad_matches_grad(each_backend, device):
    query, key, value = (torch.randn(1, 2, 9, 8, device=device, requires_grad=True) for _ in range(3))
    with torch.no_grad():
        alone = pyfused.attention(query, key, value)
    assert torch.equal(alone, pyfused.attention(query, key, value).detach())


MEMORY = """
import resource, torch, pyfused
from pyfused.testing import running
torch.set_num_threads(1)
def step(h, s, biased):
    q, k, v = (torch.randn(1, h, s, 16, requires_grad=True) for _ in range(3))
    table = pyfused.RelativeBias(torch.randn(32, h, requires_grad=True), True) if biased else None
    pyfused.attention(q, k, v, is_causal=not biased, relative_bias=table).sum().backward()
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for isa in {isas}:
    with running("cpu:" + isa):
        for h, s, biased in ((1, 8192, False), (2, 4096, True)):
            step(h, 256, biased)
            before = peak()
            step(h, s, biased)
            print(isa, peak() - before)
"""


def test_memory_is_linear():
    """The scores would be 256 MiB, then they or T5's bias 128 MiB; inputs, gradients and scratch are some 6 MiB. One process
    measures every instruction set, each beyond the peak so far."""
    import subprocess
    import sys

    isas = [isa for isa in extensions.cpu_supported() if isa not in extensions.DOT_PRODUCTS]
    done = subprocess.run([sys.executable, "-c", MEMORY.format(isas=isas)], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2 * len(isas)
    for line, most in zip(lines, (32 * 1024, 16 * 1024) * len(isas)):  # KiB
        assert int(line.split()[1]) < most, lines


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"query": [1.0]}, TypeError, "query is a list"),
        ({"query": ones(2, 4, 3, 8, dtype=torch.int64)}, TypeError, "query is int64"),
        ({"query": ones(4, 3, 8)}, ValueError, r"query has shape \(4, 3, 8\)"),
        ({"key": ones(2, 5, 8)}, ValueError, r"key has shape \(2, 5, 8\)"),
        ({"key": 3}, TypeError, "key is an int"),
        ({"key": ones(2, 2, 5, 8, dtype=torch.float16)}, TypeError, "key is float16; it takes query's dtype, float32"),
        ({"value": ones(2, 2, 5, 8, dtype=torch.float16)}, TypeError, "value is float16"),
        ({"key": ones(3, 2, 5, 8)}, ValueError, "key has shape"),
        ({"key": ones(2, 2, 5, 9)}, ValueError, "key has shape"),
        ({"key": ones(2, 2, 5, 8, device="meta")}, ValueError, "key is on meta"),
        ({"value": ones(2, 2, 6, 8)}, ValueError, "value has shape"),
        ({"key": ones(2, 3, 5, 8), "value": ones(2, 3, 5, 8)}, ValueError, "key has 3 heads"),
        ({"key": ones(2, 0, 5, 8), "value": ones(2, 0, 5, 8)}, ValueError, "key has 0 heads"),
        ({k: ones(2, 2, 5, 257) for k in ("query", "key", "value")}, ValueError, "head size 257"),
        ({"relative_bias": object()}, TypeError, "relative_bias is an object"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p is 1.0"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p is -0.1"),
        ({"dropout_p": "0.1"}, TypeError, "dropout_p is '0.1'; it takes a number"),
        ({"scale": "1"}, TypeError, "scale is '1'; it takes a number"),
        ({"padding_mask": ones(2, 5).to_sparse()}, TypeError, "padding_mask has the layout sparse_coo"),
        ({"padding_mask": [[1] * 5] * 2}, TypeError, "padding_mask is a list"),
        ({"padding_mask": ones(2, 3)}, ValueError, r"padding_mask has shape \(2, 3\)"),
        ({"padding_mask": ones(2, 5, device="meta")}, ValueError, "padding_mask is on meta"),
        ({"attn_bias": 1.0}, TypeError, "attn_bias is a float"),
        ({"attn_bias": ones(3, 5, dtype=torch.bool)}, TypeError, "attn_bias is bool"),
        ({"attn_bias": ones(3, 5, dtype=torch.float16)}, TypeError, "attn_bias is float16"),
        ({"attn_bias": ones(4, 5)}, ValueError, r"attn_bias has shape \(4, 5\)"),
        ({"attn_bias": ones(1, 2, 4, 3, 5)}, ValueError, "attn_bias has shape"),
    ],
)
def test_bad_input_names_the_argument(change, error, message):
    arguments = {"query": ones(2, 4, 3, 8), "key": ones(2, 2, 5, 8), "value": ones(2, 2, 5, 8), **change}
    with pytest.raises(error, match=message):
        pyfused.attention(**arguments)
