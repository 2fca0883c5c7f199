"""Does attention for Hopper compile to what it was written for: copies by TMA, products that nothing serialises, exponentials
while a product runs, and registers that fit?"""

import re

import pytest
from test_attention_codegen import bodies
from triton.experimental.gluon.language import NVMMASharedLayout

from pyfused.kernels.gluon.attention import _BLOCK_N, _ROWS, options_for
from pyfused.testing.triton_compile import Case, check_resources, compile_cases

MODULE = "pyfused.kernels.gluon._attention_forward"


def case(kind, d, given=""):
    """`given` names what is on: causal, relative (T5's bias), save (log-sum-exps)."""
    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    sides = {"query": _ROWS, "key": _BLOCK_N, "value": _BLOCK_N}
    types = {f"{name}_desc": f"tensordesc<{kind}[1, 1, {side}, {d}],{layout!r}>" for name, side in sides.items()}
    types |= {"out_ptr": f"*{kind}:16", "scale": "fp32"}
    types |= dict.fromkeys(("stride_ob", "stride_oh", "stride_os"), "i32:16")
    numbers = "span", "center", "blocks", "late", "blocks_of_head", "together", "heads", "group", "query_length", "key_length"
    types |= dict.fromkeys(numbers, "i32")
    constants = {"D": d, "BLOCK_N": _BLOCK_N, "IS_CAUSAL": "causal" in given, **options_for(d)}
    for name, option in (("spread_ptr", "relative"), ("lse_ptr", "save")):
        if option in given:
            types[name] = "*fp32:16"
        else:
            constants[name] = None
    return Case(f"{kind} D={d} {given}".strip(), f"{MODULE}:forward_kernel", types, constants)


CASES = [
    case("bf16", 64),
    case("fp16", 64, "causal save"),
    case("bf16", 64, "causal relative save"),
    case("bf16", 64, "relative"),
    case("bf16", 128),
    case("bf16", 128, "causal save"),
]


@pytest.fixture(scope="module")
def compiled():
    return compile_cases(CASES, "sm_90")


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_registers_and_copies(compiled, name):
    """All warps begin with the same part of a multiprocessor's registers. The warpgroups that attend go on with more."""
    found, d = compiled[name], 128 if " D=128" in name else 64
    check_resources(found, name, "sm_90")
    consumers = options_for(d)["CONSUMERS"]
    assert found.registers * (consumers + 1) * 128 <= 65536
    ptx = found.asm["ptx"]
    registers = {64: {24, 80, 160, 168, 256}, 128: {24, 120, 240, 256}}[d]
    assert set(map(int, re.findall(r"setmaxnreg\.\w+\.sync\.aligned\.u32\s+(\d+)", ptx))) == registers
    copies = re.findall(r"cp\.async\.bulk\.tensor\.4d", ptx)
    # queries, K_n and V_(n-1) twice, and the last V; a copy is at most 128 bytes wide
    assert len(copies) == (consumers + 5) * d // 64
    assert "fence.proxy.async" in ptx


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_exponentials_run_beside_a_product(compiled, name):
    """A step waits for its turn, starts both products, gives the turn away, waits for the first product, computes the
    exponentials, and waits for the second. ptxas has waited in front of the exponentials, and has made every product wait for
    the one before. A near tile's bias is loaded behind the product with the values, and both products are waited for."""
    d = 128 if " D=128" in name else 64
    found = bodies(compiled[name].asm["sass"])
    parts = 1 + ("causal" in name) + ("relative" in name)  # of the keys: far; masked; near
    assert len(found) == options_for(d)["CONSUMERS"] * parts
    for body in found:
        kinds = [(r"SYNCS\.PHASECHK", "w"), (r"SYNCS\.ARRIVE", "a"), (r"HGMMA", "p"), (r"MUFU\.EX2", "e"), (r"LDG", "l")]
        kinds += [(r"WARPGROUP\.DEPBAR.* 0x1\b", "1"), (r"WARPGROUP\.DEPBAR.* 0x0\b", "0")]
        order = "".join(letter for line in body for pattern, letter in kinds if re.match(pattern, line))
        scores, outputs = "p" * (d // 16), "p" * (_BLOCK_N // 16)  # instructions of the two products
        exponentials = "e" * (_ROWS * _BLOCK_N // 128 + 2)  # of a thread, and for its two rows
        if loads := order.count("l"):
            assert loads == _ROWS * _BLOCK_N // 128 // 2  # pairs of numbers
            assert order.index("p") < order.rindex("l") < order.index("0")
            assert order.replace("l", "").replace("0a", "0") == "ww" + outputs + "w" + scores + "a0" + exponentials, order
        else:
            assert order == "ww" + scores + "w" + outputs + "a1" + exponentials + "0a", order
        assert sum(line.startswith("BAR") for line in body) <= 3
        assert not any(line.startswith(("LDL", "STL")) for line in body)
        assert {line.split()[0] for line in body if line.startswith("LDG")} <= {"LDG.E.64"}
        # P stays in pairs from step to step, no sum is handed on, and a masked score costs two instructions more
        names = [line.split()[0].partition(".")[0] for line in body]
        assert names.count("PRMT") == 0
        assert names.count("SHFL") == 4
        assert len(body) <= (d // 64 * 32 + 400) + 210 * ("FSEL" in names) + 50 * (loads > 0)
