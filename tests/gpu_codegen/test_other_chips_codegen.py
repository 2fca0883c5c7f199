"""Do Triton's kernels compile without spills for chips that lend or borrow tiles? sm_100 takes sm_80's, with each kernel once.
sm_86 has 99 KB of shared memory and rows of its own."""

import dataclasses

import pytest
import test_attention_codegen as attention
import test_gated_ffn_codegen as gated_ffn
import test_layer_norm_codegen as layer_norm

from pyfused.testing.triton_compile import check_resources, compile_cases

T5 = "causal mask relative table"


def of_attention(chip, kernel, d=64, given=T5):
    return attention.case(kernel, d, "bf16", chip, given)


def on_blackwell(chip):
    yield of_attention(chip, "few")  # a forward with T5's bias, too
    yield of_attention(chip, "grad_key_value")
    yield of_attention(chip, "grad_table")
    yield from gated_ffn.product(chip)
    yield layer_norm.forward("bf16", 768, chip)
    yield layer_norm.backward("bf16", 768, chip)


def on_small_chips(chip):
    yield of_attention(chip, "grad_query")
    yield of_attention(chip, "grad_key_value", 128)
    yield layer_norm.backward("fp32", 4096, chip)


@pytest.mark.parametrize(
    "target, chip, cases", [("sm_100", "sm_80", on_blackwell), ("sm_86", "sm_86", on_small_chips)], ids=["sm_100", "sm_86"]
)
def test_nothing_spills(target, chip, cases):
    listed = [dataclasses.replace(case, sass=False) for case in cases(chip)]
    for name, compiled in compile_cases(listed, target).items():
        check_resources(compiled, name, target)
        if target == "sm_86":  # tiles come by asynchronous copies, and two blocks share a multiprocessor
            assert "cp.async" in compiled.asm["ptx"], name
