"""Do decode's C structs, their Python mirrors and the plan's flat form agree?"""

import ctypes
import re
from pathlib import Path

import pytest
import torch

from pyfused.decode_plan import DecodeLayer, DecodePlan, DecodeStep, Matrix, Norm
from pyfused.kernels.shared.decode_plan import CCall, CLayer, CMatrix, CNorm, CPlan

ROOT = Path(__file__).resolve().parents[2]
HEADER = (ROOT / "csrc" / "include" / "pyfused" / "decode_plan.h").read_text()
MIRRORS = {"DecodeMatrix": CMatrix, "DecodeNorm": CNorm, "DecodeLayer": CLayer, "DecodePlan": CPlan, "DecodeCall": CCall}
TYPES = {"std::uintptr_t": ctypes.c_size_t, "int64_t": ctypes.c_int64, "double": ctypes.c_double, **MIRRORS}


@pytest.mark.parametrize("name", MIRRORS)
def test_a_struct_is_the_header_s(name):
    """Every field is a multiple of 8 bytes, so the structs have no padding."""
    struct = re.search(rf"struct {name} \{{(.*?)\n\}};", HEADER, re.S).group(1)
    declared = []
    for kind, names in re.findall(r"(\S+) ([^;]*);", re.sub(r"//.*", "", struct)):
        declared += [(field.strip(), TYPES[kind]) for field in names.split(",")]
    assert list(MIRRORS[name]._fields_) == declared
    assert ctypes.sizeof(MIRRORS[name]) == sum(ctypes.sizeof(kind) for _, kind in declared)


def test_a_layer_s_struct_has_the_layer_s_fields():
    assert {name for name, _ in CLayer._fields_} == set(DecodeLayer._fields)


def test_a_step_is_the_schema_s():
    names = [a.name for a in torch.ops.pyfused.decode.default._schema.arguments]
    assert names == ["weights", "numbers", "activation", *DecodeStep._fields]


def test_a_plan_survives_its_flat_form():
    count = iter(range(1000))

    def vector():
        return torch.full((2,), float(next(count)))

    def matrix():
        return Matrix(vector(), vector(), vector())

    def norm(eps):
        return Norm(vector(), None, eps)

    layer = DecodeLayer(norm(0.5), *[matrix() for _ in range(4)], norm(0.25), matrix(), Matrix(vector()), scale=0.125)
    whole = layer._replace(gate=matrix(), cross_norm=norm(2.0), cross_query=matrix(), cross_output=matrix(), cross_scale=3.0)
    plan = DecodePlan(
        layers=(layer, whole), token_embedding=matrix(), head=matrix(), final_norm=norm(1.5), heads=6, kv_heads=3,
        head_size=5, is_rms=True, activation="relu", position_embedding=Matrix(vector()), logits_scale=0.75,
        bias_table=vector(), max_distance=99,
    )  # fmt: skip
    again = DecodePlan.of_leaves(*plan.leaves())
    assert again.layers == plan.layers  # the same tensors, compared by identity first
    assert vars(again) == vars(plan)
    assert [type(v) for v in vars(again).values()] == [type(v) for v in vars(plan).values()]
