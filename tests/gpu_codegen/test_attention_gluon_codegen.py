"""Does attention for Hopper compile to what it was written for: copies by TMA, products that nothing serialises, exponentials
while a product runs, and registers that fit?"""

import re

import pytest
from test_attention_codegen import bodies
from triton.experimental.gluon.language import NVMMASharedLayout

from pyfused.kernels.gluon.attention import _BLOCK_N, _ROWS, _STAGES
from pyfused.testing.triton_compile import Case, check_resources, compile_cases

MODULE = "pyfused.kernels.gluon._attention_forward"


def case(kind, d, given=""):
    """`given` names what is on: causal, relative (T5's bias), save (log-sum-exps); alone: the warpgroups take no turns."""
    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    sides = {"query": _ROWS, "key": _BLOCK_N, "value": _BLOCK_N}
    types = {f"{name}_desc": f"tensordesc<{kind}[1, 1, {side}, {d}],{layout!r}>" for name, side in sides.items()}
    types |= {"out_ptr": f"*{kind}:16", "scale": "fp32"}
    types |= dict.fromkeys(("stride_ob", "stride_oh", "stride_os"), "i32:16")
    types |= dict.fromkeys(("span", "center", "heads", "query_length", "key_length"), "i32")
    constants = {"D": d, "BLOCK_N": _BLOCK_N, "STAGES": _STAGES, "GROUP": 1, "IS_CAUSAL": "causal" in given}
    constants["TURNS"] = "alone" not in given
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
    case("bf16", 128, "causal save"),
    case("bf16", 64, "alone"),
]


@pytest.fixture(scope="module")
def compiled():
    return compile_cases(CASES, "sm_90")


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_registers_and_copies(compiled, name):
    """12 warps begin with 168 registers a thread, which are all of a multiprocessor's. Two warpgroups go on with 240."""
    found = compiled[name]
    check_resources(found, name, "sm_90")
    assert found.registers * 12 * 32 <= 65536
    ptx = found.asm["ptx"]
    assert set(map(int, re.findall(r"setmaxnreg\.\w+\.sync\.aligned\.u32\s+(\d+)", ptx))) == {24, 120, 240, 256}
    copies = re.findall(r"cp\.async\.bulk\.tensor\.4d", ptx)
    boxes = 2 if " D=128" in name else 1  # a copy is at most 128 bytes wide
    assert len(copies) == boxes * (2 + 4)  # the queries of two warpgroups; K_0, K_i, V_(i-1) and the last V
    assert "fence.proxy.async" in ptx


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_exponentials_run_beside_a_product(compiled, name):
    """A step waits for its turn, starts both products, gives the turn away, waits for the first product, computes the
    exponentials, and waits for the second. ptxas has waited in front of the exponentials, and has made every product wait for
    the one before."""
    turns = "alone" not in name
    d = 128 if " D=128" in name else 64
    found = bodies(compiled[name].asm["sass"])
    assert len(found) == 2 * (3 if "relative" in name else 2)  # for each warpgroup: masked, far, near
    for body in found:
        kinds = [(r"SYNCS\.PHASECHK", "w"), (r"SYNCS\.ARRIVE", "a"), (r"HGMMA", "p"), (r"MUFU\.EX2", "e")]
        kinds += [(r"WARPGROUP\.DEPBAR.* 0x1\b", "1"), (r"WARPGROUP\.DEPBAR.* 0x0\b", "0")]
        order = "".join(letter for line in body for pattern, letter in kinds if re.match(pattern, line))
        scores, outputs = "p" * (d // 16), "p" * (_BLOCK_N // 16)  # instructions of the two products
        exponentials = _ROWS * _BLOCK_N // 128 + 2  # of a thread, and for its two rows
        waits, gives = ("ww", "a") if turns else ("w", "")  # for the keys, and for the turn
        assert order == waits + scores + "w" + outputs + gives + "1a" + "e" * exponentials + "0a", order
        assert sum(line.startswith("BAR") for line in body) <= 4
        assert not any(line.startswith(("LDL", "STL", "LDG.E.U16")) for line in body)
        loads = [line.split()[0] for line in body if line.startswith("LDG")]
        assert set(loads) <= {"LDG.E.64"}
        assert len(loads) in (0, _ROWS * _BLOCK_N // 128 // 2)  # near tiles read their bias in pairs
