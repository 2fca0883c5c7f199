"""Does the host shim behave like CUDA and find faults in kernels? planted.cu has right and faulty kernels."""

import sys

import pytest
import shim
import torch

ORDERS = (0, 1, 2, 3)
PLANTED = (*shim.ENGINE, shim.HERE / "planted.cu", shim.HERE / "planted_bindings.cpp")


@pytest.fixture(scope="module")
def planted():
    return shim.load("planted", PLANTED)


def sums(planted, x, flaw=0):
    out = torch.full((x.shape[0],), torch.nan)
    planted.sum(x.data_ptr(), out.data_ptr(), x.shape[0], flaw)
    return out


def test_barriers_hold_in_every_order(planted):
    x = torch.randint(-9, 9, (5, 256)).float()
    for order in ORDERS:
        with shim.order(planted, order):
            assert torch.equal(sums(planted, x), x.sum(1))


def test_a_missing_barrier_shows(planted):
    """Some order gives another result, because a block's threads no longer wait for each other."""
    x = torch.randint(1, 9, (1, 256)).float()
    results = []
    for order in ORDERS:
        with shim.order(planted, order):
            results.append(sums(planted, x, flaw=1))
    assert not all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("sync", [True, False])
def test_a_missing_syncwarp_shows(planted, sync):
    x = torch.arange(64.0)
    right = []
    for order in ORDERS:
        out = torch.full((64,), torch.nan)
        with shim.order(planted, order):
            planted.exchange(x.data_ptr(), out.data_ptr(), sync)
        right.append(torch.equal(out, x.view(32, 2).flip(1).flatten()))
    assert all(right) == sync


@pytest.mark.parametrize(
    "flaw, message",
    [
        (2, "divergent barrier: another thread is at __syncthreads .planted.cu:"),
        (3, "divergent barrier in block .*1 threads .first 77. have returned"),
        (4, "divergent barrier: another thread is at __syncthreads .planted.cu:"),
    ],
)
def test_a_divergent_barrier_is_an_error(planted, flaw, message):
    with pytest.raises(RuntimeError, match=message):
        sums(planted, torch.ones(2, 256), flaw)
    assert torch.equal(sums(planted, torch.ones(2, 256)), torch.full((2,), 256.0))  # the next launch works


def test_shared_memory_starts_as_nan_in_every_block(planted):
    out = torch.zeros(32)
    planted.read_unwritten(out.data_ptr())  # the second block must not see the first one's values
    assert out.isnan().all()


@pytest.mark.parametrize("which", ["global memory", "static shared memory", "dynamic shared memory"])
@pytest.mark.parametrize("beyond", [0, 1])
def test_the_sanitizer_finds_a_read_out_of_bounds(which, beyond):
    number = ["global memory", "static shared memory", "dynamic shared memory"].index(which)
    folder = shim.build("planted", PLANTED, sanitize=True).parent
    program = (  # without shim, which imports torch: three seconds under the sanitizers
        "import ctypes, planted\n"
        "x, out = (ctypes.c_float * 64)(*[1.0] * 64), (ctypes.c_float * 64)()\n"
        f"planted.read_beyond(ctypes.addressof(x), ctypes.addressof(out), {number}, {beyond})\n"
        "print('done', sum(out))"
    )
    done = shim.sanitized([sys.executable, "-c", program], cwd=folder)
    if beyond:
        assert done.returncode != 0
        assert "buffer-overflow" in done.stderr, done.stderr
        assert "overrun" in done.stderr, done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert "done 64.0" in done.stdout


@pytest.mark.parametrize(
    "grid_x, grid_y, threads, shared, ask, message",
    [
        (1, 1, 1025, 0, False, "a block of 1025 threads"),
        (0, 1, 32, 0, False, "a grid of .0, 1, 1. blocks"),
        (1, 65536, 32, 0, False, "a grid of .1, 65536, 1. blocks"),
        (1, 1, 32, 47 * 1024 + 1, False, "48129 bytes of dynamic shared memory; allowed are 48128"),
        (1, 1, 32, 228 * 1024, True, "invalid argument"),
    ],
)
def test_the_limits_of_a_launch(planted, grid_x, grid_y, threads, shared, ask, message):
    with pytest.raises(RuntimeError, match=message):
        planted.launch_nothing(grid_x, grid_y, threads, shared, ask)


def test_more_shared_memory_when_asked_for(planted):
    planted.launch_nothing(3, 2, 1024, 227 * 1024, True)


def test_shuffles_and_votes(planted):
    x, out = torch.randn(32), torch.full((32, 8), torch.nan)
    lanes = torch.arange(32)
    expected = torch.stack(
        [
            x[5].expand(32),
            x[lanes ^ 12],
            x[torch.where(lanes + 3 < 32, lanes + 3, lanes)],
            x[torch.where(lanes >= 3, lanes - 3, lanes)],
            x[lanes // 8 * 8 + (lanes + 1) % 8],
            (x > 0).sum().float().expand(32),
            torch.ones(32),
            x[torch.where(lanes < 16, lanes ^ 1, lanes ^ 2)],
        ],
        1,
    )
    for order in ORDERS:
        with shim.order(planted, order):
            planted.shuffle(x.data_ptr(), out.data_ptr())
        assert torch.equal(out, expected)


@pytest.mark.parametrize(
    "flaw, message",
    [
        (0, "16 threads .first 16. have returned; 16 threads .first 0. wait at __shfl_xor_sync"),
        (1, "divergent warp operation: another lane is at __shfl_xor_sync"),
        (2, "the source lane is not in the mask"),
    ],
)
def test_a_divergent_warp_operation_is_an_error(planted, flaw, message):
    with pytest.raises(RuntimeError, match=message):
        planted.break_shuffle(torch.empty(32).data_ptr(), flaw)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tensor_core_product(planted, dtype, transposed):
    a, b = torch.randint(-8, 8, (16, 16)).to(dtype), torch.randint(-8, 8, (16, 8)).to(dtype)
    stored = (b if transposed else b.T).contiguous()
    c = torch.full((16, 8), torch.nan)
    call = getattr(planted, f"multiply_{str(dtype).removeprefix('torch.')}")
    call(a.data_ptr(), stored.data_ptr(), c.data_ptr(), transposed, True)
    assert torch.equal(c, a.float() @ b.float())


def test_a_copy_that_was_not_waited_for_is_nan(planted):
    a, b = torch.ones(16, 16, dtype=torch.float16), torch.ones(8, 16, dtype=torch.float16)
    c = torch.zeros(16, 8)
    planted.multiply_float16(a.data_ptr(), b.data_ptr(), c.data_ptr(), False, False)
    assert c.isnan().all()


def counts(planted, blocks, barrier=True, cooperative=True):
    counter, seen = torch.zeros(1, dtype=torch.int32), torch.zeros(blocks, dtype=torch.int32)
    planted.count(counter.data_ptr(), seen.data_ptr(), blocks, barrier, cooperative)
    return seen


def test_grid_barrier(planted):
    expected = 64 * sum(range(1, 8)) + 1000 * torch.arange(
        1, 8, dtype=torch.int32
    )  # each block has its own shared memory
    for order in ORDERS:
        with shim.order(planted, order):
            assert torch.equal(counts(planted, 7), expected)
    assert not torch.equal(counts(planted, 7, barrier=False), expected)
    with pytest.raises(RuntimeError, match="grid barrier in a launch that is not cooperative"):
        counts(planted, 7, cooperative=False)


def relayed(planted, begins=True, cooperative=True):
    sums = torch.full((7,), -1, dtype=torch.int32)  # all bits set: nothing has been sent
    planted.relay(sums.data_ptr(), 7, begins, cooperative)
    return sums.view(torch.float32)


def test_floats_for_other_blocks(planted):
    expected = torch.arange(6, -1, -1.0).cumsum(0).flip(0)
    for order in ORDERS:
        with shim.order(planted, order):
            assert torch.equal(relayed(planted), expected)
    with pytest.raises(RuntimeError, match="what a thread looks for is never written"):
        relayed(planted, begins=False)
    with pytest.raises(RuntimeError, match="a wait for another block in a launch that is not cooperative"):
        relayed(planted, cooperative=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_conversions_round_as_torch_does(planted, dtype):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    exact = bits.view(dtype).float()
    near = exact * (1 + 2.0**-9)  # between two neighbours
    x = torch.cat([exact, near, torch.randn(4096) * 1e-6, torch.tensor([1e30, -1e30, 0.0, -0.0])])
    out, wide = torch.empty_like(x, dtype=dtype), torch.empty_like(x)
    call = getattr(planted, f"round_trip_{str(dtype).removeprefix('torch.')}")
    call(x.data_ptr(), out.data_ptr(), wide.data_ptr(), x.numel())
    torch.testing.assert_close(out, x.to(dtype), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(wide, x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)
