"""Does every CUDA launch fit a GPU's limits for tensors as large as its memory? The shim checks launches and runs none."""

import os

import pytest
import shim
import torch

import pyfused
from pyfused import extensions
from pyfused.kernels.cuda import attention, fourier_mix
from pyfused.kernels.shared import prepared
from pyfused.kernels.shared.attention_layout import AttentionLayout
from pyfused.kernels.shared.fourier import plan
from pyfused.testing import running

if not extensions.emulating_cuda():
    pytest.skip("this machine has a GPU: the kernels run there", allow_module_level=True)

P = 1 << 40  # an unused address, aligned for the widest accesses
SHARED = 99 * 1024  # per block on sm_86, sm_89 and sm_120; an A100 has 163 KB, an H100 227
CODES = (0, 1, 2)


def launches(call):
    with shim.looking(shim.load()) as seen:
        call(shim.load())
    assert seen
    return seen


def layout(b, h, hkv, sq, sk, d, chunk=0, span=0):
    sizes = {"batch": b, "heads": h, "kv_heads": hkv, "query_length": sq, "key_length": sk, "head_size": d}
    of_query, of_key = ((heads * length * d, d, heads * d) for heads, length in ((h, sq), (hkv, sk)))
    strides = {"query": of_query, "key": of_key, "value": of_key, "out": of_query, "chunk": chunk}
    strides |= {"bias": (h * sq * sk, sq * sk, sk, 1), "table_bucket": h, "table_head": 1}
    return AttentionLayout(**sizes, **strides, span=span, is_causal=1, scale=0.1)


def attend(b, h, hkv, sq, sk, d, dtype, bias=0, table=0):
    def call(cuda):
        sizes = layout(b, h, hkv, sq, sk, d, span=255 if table else 0)
        cuda.attention_forward(P, P, P, P, bias, table, table, 0, 0, P, P, sizes.address, 132, dtype, 0, 0)

    return call


def decode(b, h, hkv, sq, sk, d, dtype, chunk, table=0):
    def call(cuda):
        sizes = layout(b, h, hkv, sq, sk, d, b * h * sq * d, 255 if table else 0)
        cuda.attention_decode_forward(P, P, P, P, 0, table, table, 0, 0, P, P, sizes.address, chunk, dtype, 0, 0)
        cuda.attention_combine(P, P, P, P, sizes.address, -(-sk // chunk), dtype, 0, 0)

    return call


def packed(rows, sequences, h, d, dtype):
    def call(cuda):
        sizes = layout(sequences, h, h, rows, rows, d)
        cuda.attention_packed_forward(P, P, P, 0, 0, 0, 0, 0, P, P, P, sizes.address, 132, dtype, 0, 0)

    return call


def norms(rows, n, dtype):
    def call(cuda):
        cuda.layer_norm_forward(P, P, P, P, P, P, P, P, rows, n, n, n, 1e-5, dtype, 0, 0)
        parts = cuda.layer_norm_backward_parts(rows, n, 132)
        cuda.layer_norm_backward(P, P, P, P, P, P, P, P, P, P, parts, rows, n, n, dtype, 0, 0)
        cuda.rms_norm_forward(P, P, P, 0, P, P, 0, P, rows, n, n, n, 1e-5, dtype, 0, 0)
        parts = cuda.rms_norm_backward_parts(rows, n, 132)
        cuda.rms_norm_backward(P, P, P, P, 0, P, P, P, 0, P, parts, rows, n, n, dtype, 0, 0)

    return call


def passes(rows, f, dtype):
    def call(cuda):
        cuda.ffn_activation(P, P, P, P, rows * f, 4, dtype, 0, 0)
        cuda.gated_ffn_activation(P, P, P, P, P, P, rows * f, 4, dtype, 0, 0)
        cuda.gated_ffn_scaled(P, P, P, P, rows, f, 4, 0, 0)
        cuda.gated_ffn_unscale(P, P, P, rows, f, f, 0, 0)

    return call


def few(rows, n, f, dtype):
    def call(cuda):
        for by_columns in {False, rows <= 8}:
            into, out = (f, n) if by_columns else (n, f)
            cuda.linear_forward(P, P, P, P, P, P, rows, f, n, n, into, by_columns, f, 4, False, dtype, 0, 0)
            both = into, by_columns, out, by_columns
            cuda.ffn_forward(P, P, P, P, P, P, P, P, P, rows, n, f, n, n, *both, n, 4, dtype, 0, 0)
        cuda.gated_ffn_forward(P, P, P, P, P, P, P, P, P, rows, n, f, n, n, n, n, f, n, 4, dtype, 0, 0)

    return call


def mix(b, s, n, dtype):
    def call(cuda):
        (along_s, _), (along_n, _) = plan(s), plan(n)
        cuda.fourier_mix_forward(P, P, P, along_s.data_ptr(), P, along_n.data_ptr(), P, b, s, n, s * n, n, dtype, 0, 0)

    return call


CALLS = {
    "attention": lambda dtype: attend(4096, 64, 8, 256, 256, 64, dtype),
    "attention long": lambda dtype: attend(8, 64, 64, 131072, 131072, 64, dtype),
    "attention wide": lambda dtype: attend(64, 64, 64, 1024, 1024, 256, dtype, bias=P, table=P),
    "attention relative": lambda dtype: attend(64, 64, 64, 4096, 4096, 128, dtype, table=P),
    "attention few": lambda dtype: decode(4096, 64, 8, 2, 8192, 64, dtype, 8192),
    "attention chunks": lambda dtype: decode(1, 8, 1, 1, 131072, 128, dtype, 2048, table=P),
    "attention few wide": lambda dtype: decode(1, 7, 1, 1, 131072, 256, dtype, 2048, table=P),
    "attention packed": lambda dtype: packed(2**24, 2**20, 64, 64, dtype),
    "norms": lambda dtype: norms(2**20, 8192, dtype),
    "norms of many rows": lambda dtype: norms(2**34, 8, dtype),
    "norms of long rows": lambda dtype: norms(2**10, 2**24, dtype),
    "passes": lambda dtype: passes(2**22, 16384, dtype),
    "passes of many rows": lambda dtype: passes(2**31 - 1, 8, dtype),
    "few": lambda dtype: few(16, 1024, 2**24, dtype),
    "one": lambda dtype: few(1, 1024, 2**29, dtype),
    "fourier_mix": lambda dtype: mix(2**18, 512, 768, dtype),
    "fourier_mix of many": lambda dtype: mix(2**33, 2, 3, dtype),
}


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("name", CALLS)
def test_a_gpu_takes_the_largest(name, dtype):
    for launch in launches(CALLS[name](dtype)):  # the shim refuses a grid that a GPU refuses
        assert launch.shared <= SHARED, launch


def test_what_a_small_chip_cannot_hold_is_left_to_others(monkeypatch):
    """The same calls fit an H100; the longest call that fits a small chip asks for no more than its shared memory."""

    def reasons():
        bias = (torch.randn(32, 16), True, 300)
        query, key = torch.randn(1, 16, 1, 256), torch.randn(1, 1, 5, 256)
        options = (False, None, None, 1.0, 0.0, None, False)
        mixes = [fourier_mix.unsupported_forward(torch.empty(1, 1, n)) for n in (5904, 6000, 9216)]
        return [attention.unsupported_forward(query, key, key, *options, *bias), *mixes]

    assert reasons() == [None] * 4
    for module in (attention, fourier_mix):
        monkeypatch.setattr(module, "shared_memory", lambda device: SHARED)
    heads, fits, *long = reasons()
    assert "16 heads that share a key head" in heads
    assert fits is None
    assert all("does not fit in a block's shared memory" in reason for reason in long)
    assert max(launch.shared for launch in launches(mix(1, 1, 5904, 0))) <= SHARED


@pytest.mark.parametrize("dtype", CODES)
def test_a_grid_that_no_gpu_takes_is_refused_by_name(dtype):
    """2^32 blocks and a few more: cut to 32 bits they would be a few."""
    with pytest.raises(RuntimeError, match=r"gated_ffn scaled of shape \(4294967301, 8\): a grid of 4294967301 blocks"):
        launches(lambda cuda: cuda.gated_ffn_scaled(P, P, P, P, 2**32 + 5, 8, 4, 0, 0))
    with pytest.raises(RuntimeError, match=r"attention forward .*: a grid of \d+ blocks; a GPU takes 2147483647"):
        launches(attend(2**20, 2**12, 2**12, 17, 17, 8, dtype))


def test_weights_stored_transposed_are_not_copied(monkeypatch):
    monkeypatch.setattr(prepared, "_contiguous", lambda args: pytest.fail("weights are copied"))
    x, into, out = torch.randn(8, 44), torch.randn(44, 20), torch.randn(20, 44)
    with running("cuda"):
        pyfused.linear(x, into.t())
        pyfused.ffn(x, into.t(), None, out.t(), None, activation="relu")
        pyfused.gated_ffn(x, into.t(), into.t(), out.t(), activation="relu")  # the library's products


@pytest.mark.skipif(os.environ.get("PYFUSED_SANITIZE") == "1", reason="no kernel runs")
def test_looking_ends():
    with shim.looking(shim.load()):
        pass
    x = torch.randn(3, 8)
    with running("cuda"):
        assert pyfused.rms_norm(x, torch.ones(8)).isfinite().all()
