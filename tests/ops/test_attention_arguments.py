"""Do attention's schema, named arguments, launches and C struct agree on the arguments and their order?"""

import ctypes
import re
from pathlib import Path

import pytest
import torch

from pyfused.arguments import AttentionBackward, AttentionForward, backward_launch, forward_launch
from pyfused.kernels.shared.attention_layout import AttentionLayout

ROOT = Path(__file__).resolve().parents[2]
HEADER = ROOT / "csrc" / "include" / "pyfused" / "attention_layout.h"
C_TYPES = {"int64_t": ctypes.c_int64, "double": ctypes.c_double}
KINDS = {"Optional[Tensor]": "Tensor | None", "SymInt": "int"}
CLASSES = {"attention": AttentionForward, "attention_backward": AttentionBackward}


@pytest.mark.parametrize("name, arguments", CLASSES.items())
def test_arguments_are_the_schema_s(name, arguments):
    schema = getattr(torch.ops.pyfused, name).default._schema
    expected = {a.name: KINDS.get(str(a.real_type), str(a.real_type)) for a in schema.arguments}
    kinds = {n: getattr(kind, "__forward_arg__", kind) for n, kind in arguments.__annotations__.items()}
    assert list(kinds.items()) == list(expected.items())
    assert arguments._field_defaults == {a.name: a.default_value for a in schema.arguments if a.has_default_value()}


def test_the_struct_is_the_header_s():
    """Every field is a multiple of 8 bytes, so the struct has no padding."""
    struct = re.search(r"struct AttentionLayout \{(.*?)\n\};", HEADER.read_text(), re.S).group(1)
    declared = []
    for kind, names in re.findall(r"(int64_t|double) ([^;]*);", re.sub(r"//.*", "", struct)):
        for name, count in re.findall(r"(\w+)(?:\[(\d+)\])?", names):
            declared.append((name, C_TYPES[kind], int(count or 1)))
    fields = [
        (name, kind._type_, kind._length_) if issubclass(kind, ctypes.Array) else (name, kind, 1)
        for name, kind in AttentionLayout._fields_
    ]
    assert fields == declared
    assert ctypes.sizeof(AttentionLayout) == 8 * sum(count for _, _, count in declared)


def test_a_launch_gets_the_tensors_alone():
    """In their order, by position or with trailing defaults left out."""
    forward = forward_launch(lambda *tensors: tensors)
    args = AttentionForward(*range(15))
    tensors = (*args[:3], args.padding_mask, args.attn_bias, args.seed, args.bias_table, args.cu_seqlens)
    assert forward(*args) == tensors
    assert forward(*args[:10]) == (0, 1, 2, 4, 5, 8, None, None)
    backward = backward_launch(lambda *tensors: tensors)
    assert backward(*range(19)) == (0, 1, 2, 3, 4, 5, 7, 8, 11, 13, 17)


def test_a_backward_has_what_its_forward_had():
    call = AttentionForward(*range(15)).backward("grad_out", "out", "lse", wants_bias=True, wants_table=False)
    assert call == ("grad_out", 0, 1, 2, "out", "lse", 3, 4, 5, 6, 7, 8, True, 10, 11, 12, False, 13, 14)
