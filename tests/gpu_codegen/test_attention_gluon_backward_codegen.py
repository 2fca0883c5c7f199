"""Does attention's backward for Hopper compile to what it was written for: copies by TMA, operands that stay in registers,
products that nothing serialises, exponentials while a product runs, and registers that fit?"""

import dataclasses
import re

import pytest
from test_attention_codegen import bodies
from triton.experimental.gluon.language import NVMMASharedLayout

from pyfused.kernels.gluon._attention_backward import _STAGES
from pyfused.kernels.gluon._attention_grad_query import ROWS, TILE
from pyfused.testing.triton_compile import Case, check_resources, compile_cases

MODULE = "pyfused.kernels.gluon._attention_grad_"


def case(kernel, kind, given=""):
    """`kernel` is query or key_value; `given` names what is on: causal, relative (T5's bias)."""
    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    own, other = ROWS.value, TILE.value
    sides = {"grad": other, "query": other, "key": own, "value": own}
    if kernel == "query":
        sides = {"grad": own, "query": own, "out": own, "key": other, "value": other}
    types = {f"{name}_desc": f"tensordesc<{kind}[1, 1, {side}, 64],{layout!r}>" for name, side in sides.items()}
    types |= dict.fromkeys(("span", "center", "query_length", "key_length", "works"), "i32")
    types["scale"] = "fp32"
    constants = {"D": 64, "STAGES": _STAGES, "GROUP": 1, "IS_CAUSAL": "causal" in given}
    if kernel == "query":
        types |= {"lse_ptr": "*fp32:16", "stats_ptr": "*fp32:16", "grad_query_ptr": f"*{kind}:16"}
        types |= dict.fromkeys(("heads", "stride_stats"), "i32")
        constants["FEW"] = 32 if "causal" in given else 0
    else:
        flat = NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
        types["stats_desc"] = f"tensordesc<fp32[1, {2 * other}],{flat!r}>"
        types |= {"grad_key_ptr": f"*{kind}:16", "grad_value_ptr": f"*{kind}:16", "key_heads": "i32"}
    if "relative" in given:
        types["spread_ptr"] = "*fp32:16"
    else:
        constants["spread_ptr"] = None
    return Case(f"{kernel} {kind} {given}".strip(), f"{MODULE}{kernel}:grad_{kernel}_kernel", types, constants)


CASES = [
    case("query", "bf16"),
    case("query", "fp16", "causal relative"),
    case("key_value", "bf16"),
    case("key_value", "fp16", "causal"),
    case("key_value", "bf16", "relative"),
]


@pytest.fixture(scope="module")
def compiled():
    return compile_cases(CASES, "sm_90")


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_registers_and_copies(compiled, name):
    found = compiled[name]
    if "key_value" in name:  # some numbers of a tile of keys, outside of the loops
        found = dataclasses.replace(found, spills=max(found.spills - 24, 0))
    check_resources(found, name, "sm_90")
    assert found.registers * 12 * 32 <= 65536
    ptx = found.asm["ptx"]
    assert set(map(int, re.findall(r"setmaxnreg\.\w+\.sync\.aligned\.u32\s+(\d+)", ptx))) == {24, 120, 240, 256}
    copies = re.findall(r"cp\.async\.bulk\.tensor\.(\d)d", ptx)
    own = 3 if name.startswith("query") else 2  # for each of two warpgroups
    assert sorted(copies) == sorted("4" * (2 * own + 2) + ("" if own == 3 else "2"))
    # Between two products no tile goes through shared memory: what is stored there is the gradients at the end, in 16 bits.
    assert len(re.findall(r"\bst\.shared|stmatrix", ptx)) <= 40


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_exponentials_run_beside_a_product(compiled, name):
    """ptxas has made every product wait for the one before, where a sum was in flight at the end of the loop."""
    found = bodies(compiled[name].asm["sass"])
    few = "query" in name and "causal" in name  # the sums of few keys' probabilities
    near = "query" in name and "relative" in name
    assert len(found) == 2 * (2 + near + few)  # for each warpgroup: with a mask, without, near
    orders = set()
    for body in found:
        kinds = [(r"SYNCS\.PHASECHK", "w"), (r"SYNCS\.ARRIVE", "a"), (r"HGMMA", "p"), (r"MUFU\.EX2", "e")]
        kinds += [(rf"WARPGROUP\.DEPBAR.* 0x{n}\b", str(n)) for n in range(4)]
        orders.add("".join(letter for line in body for pattern, letter in kinds if re.match(pattern, line)))
        assert sum(line.startswith("BAR") for line in body) <= 2
        assert not any(line.startswith(("LDL", "STL", "STS", "LDG.E.U16")) for line in body)
        assert {line.split()[0] for line in body if line.startswith("LDG")} <= {"LDG.E.64"}
    product = "p" * (64 // 16)  # the instructions for 64 terms of a sum
    if name.startswith("query"):
        # ptxas waits for dP when a part of the exponentials is done. Sums of few keys take two products.
        orders = {re.sub("e+0e+", "e0e", order) for order in orders if order.count("p") > 2 * len(product)}
        assert orders == {"w" + product * 2 + "1e0e" + product * 2 + "0a"}
    else:
        e = "e" * (64 * 64 // 128)
        assert orders == {
            "w" + product * 3 + "2" + e + product + "2" + product * 2 + "3" + e + product + "1" + product + "0a"
        }
