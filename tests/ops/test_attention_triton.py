"""Are the paths right that only Triton's attention has? Packed heads, split keys, skipped tiles, dropout bits, and a program's
search for its tile of packed sequences."""

import itertools

import pytest
import torch

from pyfused import dispatch, tiles
from pyfused.kernels.reference import attention as reference
from pyfused.kernels.reference._philox import keep_mask
from pyfused.testing import assert_close, available

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from pyfused.kernels.triton._attention_tiles import sequence_tile  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif("triton" not in available(DEVICE), reason="Triton cannot run here")


@pytest.fixture(scope="module")
def kernel():
    return dispatch.kernel("triton", "attention")


def make(b, h, hkv, sq, sk, d, dtype=torch.float32):
    shapes = ((b, sq, h, d), (b, sk, hkv, d), (b, sk, hkv, d))
    return [torch.randn(s, device=DEVICE).to(dtype).transpose(1, 2) for s in shapes]


def check(kernel, qkv, is_causal, mask, bias=None, scale=0.3, p=0.0, seed=None, poisoned=None):
    """Compares forward and lse with the reference in float64; returns the kernel's results."""
    rest = (is_causal, mask, bias, scale, p, seed, True)
    out, lse = kernel.forward(*(poisoned or qkv), *rest)
    plain, _ = reference.forward(*qkv, *rest)
    wide = (is_causal, mask, None if bias is None else bias.double(), scale, p, seed, True)
    truth, true_lse = reference.forward(*(t.double() for t in qkv), *wide)
    assert_close(out, plain, truth, "out")
    assert torch.equal(lse.isinf(), true_lse.isinf())
    seen = lse.isfinite()
    torch.testing.assert_close(lse[seen], true_lse[seen])
    return out, lse


@pytest.mark.parametrize("b, h, sq, sk, p", [(2, 2, 37, 70, 0.3), (1, 3, 1, 255, 0.75), (1, 1, 70, 130, 0.5)])
def test_dropout_bits_are_the_reference_s(kernel, b, h, sq, sk, p):
    """Scores are equal and each key has its own value dimension: output (i, j) is zero exactly if (i, j) is dropped."""
    query, key = torch.zeros(b, h, sq, 256, device=DEVICE), torch.randn(b, h, sk, 256, device=DEVICE)
    value = torch.eye(sk, 256, device=DEVICE).expand(b, h, sk, 256)
    seed = torch.randint(0, 2**63 - 1, (1,), device=DEVICE)
    out, _ = kernel.forward(query, key, value, False, None, None, 1.0, p, seed, False)
    assert torch.equal(out[..., :sk] != 0, keep_mask(seed, p, (b, h, sq, sk)))


@pytest.mark.parametrize(
    "pad, h, hkv, sq, d",
    [
        ("none", 4, 1, 1, 64),
        ("right", 2, 2, 3, 40),
        ("left", 2, 1, 16, 16),
        ("holes", 4, 2, 2, 8),
        ("all", 2, 1, 1, 16),
    ],
)
def test_few_queries_many_keys(kernel, pad, h, hkv, sq, d):
    """Programs split the keys and add up their parts; a group's heads are packed if they fit; padding's NaN stays there."""
    sk = 777
    j = torch.arange(sk, device=DEVICE)
    mask = {
        "none": None,
        "right": torch.stack((j < 300, j < sk)),
        "left": torch.stack((j >= 600, j >= 1)),
        "holes": torch.rand(2, sk, device=DEVICE) > 0.4,
        "all": torch.stack((j < 0, j < sk)),
    }[pad]
    qkv = make(2, h, hkv, sq, sk, d)
    poisoned = [t.clone() for t in qkv]
    if mask is not None:
        for t, garbage in zip(poisoned[1:], (float("nan"), float("inf"))):
            t.transpose(1, 2)[~mask] = garbage
    check(kernel, qkv, True, mask, poisoned=poisoned)


@pytest.fixture
def launched(monkeypatch):
    """(kernel, grid) of each launch, as on a chip of 40 multiprocessors."""
    module, found = dispatch.kernel("triton", "attention"), []
    start = module.starter

    def starter(kernel, grid, *rest, **options):
        found.append((kernel.fn.__name__, grid))
        return start(kernel, grid, *rest, **options)

    monkeypatch.setattr(module, "starter", starter)
    monkeypatch.setattr(tiles, "multiprocessors", lambda where: 40)
    monkeypatch.setattr(tiles, "architecture", lambda device: "interpreter")
    dispatch.forget()
    yield found
    monkeypatch.undo()
    dispatch.forget()


FEW = {  # sizes; options; chunks
    "chunks beyond the diagonal": ((1, 1, 1, 130, 130, 16), {"is_causal": True}, 2),
    "a cached prefix": ((1, 2, 1, 40, 300, 16), {"is_causal": True, "pad": [211]}, 4),
    "T5's bias": ((1, 2, 2, 33, 260, 24), {"table": (8, 12, True)}, 3),
    "queries that see nothing": ((2, 1, 1, 90, 70, 8), {"is_causal": True, "pad": [0, 70]}, 1),
    "dropout": ((1, 1, 1, 20, 200, 8), {"p": 0.3, "table": (8, 12, False)}, 3),
}


@pytest.mark.parametrize("case", FEW)
def test_few_blocks_split_the_keys(kernel, launched, case):
    """A grid smaller than the chip has smaller tiles, and chunks of keys while programs are fewer than multiprocessors."""
    sizes, options, chunks = FEW[case]
    qkv, (b, h, _, sq, sk, _) = make(*sizes), sizes
    mask, table, p = None, None, options.get("p", 0.0)
    if "pad" in options:
        mask = torch.arange(sk, device=DEVICE) < torch.tensor(options["pad"], device=DEVICE)[:, None]
    relative = (None, True, 128)
    if "table" in options:
        num_buckets, *kind = options["table"]
        table = torch.randn(num_buckets, h, device=DEVICE)
        relative = (table, kind[1], kind[0])
    seed = torch.tensor([5], device=DEVICE) if p else None
    rest = (options.get("is_causal", False), mask, None, 0.3, p, seed, True, *relative)
    out, lse = kernel.forward(*qkv, *rest)
    assert launched[0 if table is None else 1] == ("forward_kernel", (b * h * -(-sq // 16), chunks))
    assert ("combine_kernel", (b * h * sq,)) in launched or chunks == 1
    assert torch.equal(out, kernel.forward(*qkv, *rest)[0])
    plain, _ = reference.forward(*qkv, *rest)
    wide = None if table is None else table.double()
    truth, true_lse = reference.forward(*(t.double() for t in qkv), *rest[:7], wide, *relative[1:])
    assert_close(out, plain, truth, "out")
    assert torch.equal(lse.isinf(), true_lse.isinf())
    torch.testing.assert_close(lse[lse.isfinite()], true_lse[lse.isfinite()])


def test_few_blocks_of_packed_sequences(kernel, launched):
    qkv, cu_seqlens = make(1, 2, 1, 42, 42, 8), sequences(19, 0, 22, 1)
    rest = (True, None, None, 0.3, 0.0, None, True, None, True, 128, cu_seqlens, 22)
    out, lse = kernel.forward(*qkv, *rest)
    assert launched == [("forward_kernel", (2 * (42 // 16 + 4), 1))]
    truth, true_lse = reference.forward(*(t.double() for t in qkv), *rest)
    assert_close(out, reference.forward(*qkv, *rest)[0], truth, "out")
    torch.testing.assert_close(lse, true_lse, check_dtype=False)


@pytest.mark.parametrize("scale", [-0.7, 0.0, 3.0])
def test_any_sign_of_scale(kernel, scale):
    check(kernel, make(1, 2, 1, 40, 70, 8), True, None, scale=scale)


def test_backward_is_bitwise_repeatable_and_skips_padding(kernel):
    query, key, value = make(2, 2, 1, 33, 70, 24)
    mask = torch.arange(70, device=DEVICE)[None] < torch.tensor([[20], [70]], device=DEVICE)
    bias = torch.randn(1, 2, 1, 70, device=DEVICE).expand(2, 2, 33, 70)
    seed = torch.randint(0, 2**63 - 1, (1,), device=DEVICE)
    rest = (True, mask, bias, 0.3, 0.2, seed)
    out, lse = kernel.forward(query, key, value, *rest, True)
    grad_out = torch.randn_like(out)
    first, second = (kernel.backward(grad_out, query, key, value, out, lse, *rest, True) for _ in range(2))
    for a, b in zip(first[:4], second[:4]):  # there is no table
        assert torch.equal(a, b)
    for name, grad in zip(("key", "value"), first[1:3]):
        assert (grad.transpose(1, 2)[~mask] == 0).all(), name
    assert (first[3].permute(0, 3, 1, 2)[~mask] == 0).all()


def test_one_key_has_zero_gradient(kernel):
    """The softmax of one score is always 1."""
    query, key, value = make(2, 2, 2, 5, 1, 24)
    bias = torch.randn(2, 2, 5, 1, device=DEVICE)
    out, lse = kernel.forward(query, key, value, False, None, bias, 0.3, 0.0, None, True)
    grads = kernel.backward(torch.randn_like(out), query, key, value, out, lse, False, None, bias, 0.3, 0.0, None, True)
    assert [bool((g == 0).all()) for g in grads[:4]] == [True, True, False, True]


@triton.jit(do_not_specialize=["sequences"])
def search_kernel(cu_seqlens_ptr, slots_ptr, found_ptr, sequences):
    program = tl.program_id(0)
    slot = tl.load(slots_ptr + program)
    sequence, tile, start, length = sequence_tile(cu_seqlens_ptr, sequences, slot, 4)
    tl.store(found_ptr + 4 * program, sequence)
    tl.store(found_ptr + 4 * program + 1, tile)
    tl.store(found_ptr + 4 * program + 2, start)
    tl.store(found_ptr + 4 * program + 3, length)


def sequences(*lengths):
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("n", [1, 7, 130, 40_000])
def test_a_slot_s_sequence(kernel, n):
    """For any N, every tile of every sequence has one slot, and there are no other slots."""
    cu_seqlens = sequences(*torch.randint(0, 14, (n,)).tolist())
    ends = cu_seqlens.tolist()
    total = ends[-1] // 4 + n
    slots = torch.arange(total)
    if n > 1000:
        slots = slots[[0, *torch.randint(0, total, (100,)).tolist(), total - 1]]
    found = torch.full((len(slots), 4), -1, dtype=torch.int64, device=DEVICE)
    search_kernel[(len(slots),)](cu_seqlens, slots.to(DEVICE), found, n)
    rows = found.tolist()
    for slot, (sequence, tile, start, length) in zip(slots.tolist(), rows):
        assert (start, length) == (ends[sequence], ends[sequence + 1] - ends[sequence])
        assert slot == start // 4 + sequence + tile
        assert 0 <= tile <= -(-length // 4)
    if n < 1000:
        lengths = [b - a for a, b in itertools.pairwise(ends)]
        tiles = [(sequence, tile) for sequence, tile, _, length in rows if 4 * tile < length]
        assert tiles == [(i, tile) for i, length in enumerate(lengths) for tile in range((length + 3) // 4)]


def packed(kernel, lengths, seed=None):
    """The kernel's lse and gradients for packed sequences with one group of two heads and T5's bias."""
    cu_seqlens = sequences(*lengths)
    query, key, value = make(1, 2, 1, sum(lengths), sum(lengths), 8)
    table = torch.randn(8, 2, device=DEVICE)
    rest = (False, None, None, 0.3, 0.2 if seed is not None else 0.0, seed)
    relative, behind = (table, True, 12), (cu_seqlens, max(lengths))
    forward = (query, key, value, *rest, True, *relative, *behind)
    out, lse = kernel.forward(*forward)
    _, true_lse = reference.forward(*forward)
    torch.testing.assert_close(lse, true_lse)
    backward = (torch.randn_like(out), query, key, value, out, lse, *rest, False, *relative, True, *behind)
    first, second = kernel.backward(*backward), kernel.backward(*backward)
    names = ("query", "key", "value", "bias", "table")
    for name, a, b in zip(names, first, second):
        assert name == "bias" or torch.equal(a, b), name
    return dict(zip(names, first))


def test_packed_sequences_are_bitwise_repeatable(kernel):
    """So is the table's gradient, although spare programs write no sums; and lse equals the reference's in each row."""
    packed(kernel, (33, 0, 3, 40, 1), torch.tensor([9], device=DEVICE))


def test_packed_sequences_of_one_token_have_zero_gradient(kernel):
    """The softmax of one score is 1, whether or not longer sequences are packed beside it."""
    grads = packed(kernel, (1, 5, 1, 0, 1))
    alone = torch.tensor([0, 6, 7], device=DEVICE)
    for name in ("query", "key"):
        assert (grads[name][:, :, alone] == 0).all(), name
        assert (grads[name][:, :, 1:6] != 0).all(), name
    grads = packed(kernel, (1, 1, 1))
    assert [bool((grads[name] == 0).all()) for name in ("query", "key", "value", "table")] == [True, True, False, True]
