"""Does pytorch_model.bin load, in every form of torch.save and for every class, and is every pickle that does more refused?"""

import collections
import json
import os
import pickle
import re
import struct
import zipfile

import pytest
import torch
from safetensors.torch import load_file
from test_heads_and_prefixes import BACKBONE, CLASSES, check, make

from pyfused.checkpoints import open_checkpoint

LEGACY = {"_use_new_zipfile_serialization": False}  # the form before PyTorch 1.6, of most files on the hubs


def pickled(directory, **form):
    """Replaces a folder's safetensors by pytorch_model.bin."""
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    torch.save(weights, directory / "pytorch_model.bin", **form)
    return directory / "pytorch_model.bin"


@pytest.mark.parametrize("family, kind", [(family, kind) for family, kinds in CLASSES.items() for kind in kinds])
def test_every_class_of_transformers(tmp_path, family, kind):
    theirs = make(family, kind)
    theirs.config.architectures = [type(theirs).__name__]
    theirs.config.save_pretrained(tmp_path)
    state = theirs.state_dict()  # tied tensors under all their names, unlike safetensors
    heads = [name for name in state if not name.startswith(BACKBONE) and not name.endswith(".decoder.weight")]
    torch.save(state, tmp_path / "pytorch_model.bin", **(LEGACY if len(kind) % 2 else {}))
    check(tmp_path, theirs, heads)


@pytest.mark.parametrize("form", [{}, LEGACY], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", ["hf_gpt2", "hf_t5", "hf_albert_mlm", "hf_fnet_pretraining"])
@pytest.mark.filterwarnings("ignore:.*left unread")
def test_the_values_are_those_of_safetensors(preset, golden, same, name, form):
    directory = preset(name)
    expected = dict(open_checkpoint(golden / "ckpt" / name).tensors())
    file = pickled(directory, **form)
    assert zipfile.is_zipfile(file) == (not form)
    same(open_checkpoint(directory).tensors(), expected)


@pytest.mark.parametrize("form", [{}, LEGACY], ids=["zip", "legacy"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_parameters_and_buffers(preset, same, dtype, form):
    directory = preset("hf_gpt2_lm")
    path = directory / "model.safetensors"
    weights = {name: torch.nn.Parameter(tensor.to(dtype)) for name, tensor in load_file(path).items()}
    weights["transformer.h.0.attn.bias"] = torch.ones(1, 1, 9, 9, dtype=torch.bool)
    weights["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    path.unlink()
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"dtype": str(dtype).removeprefix("torch.")}))
    state = collections.OrderedDict(weights)
    state._metadata = collections.OrderedDict(version=1)
    torch.save(state, directory / "pytorch_model.bin", **form)
    checkpoint = open_checkpoint(directory)
    assert checkpoint.dtype == dtype
    found = dict(checkpoint.tensors())["token_embedding.weight"]
    assert torch.equal(found, weights["transformer.wte.weight"])


@pytest.mark.parametrize("form", [{}, LEGACY], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", ["hf_gpt2", "hf_t5"])
def test_transposed_and_shared_matrices(preset, golden, same, name, form):
    """Files converted from TensorFlow hold matrices column after column; state dicts hold parts of one storage."""
    directory = preset(name)
    expected = dict(open_checkpoint(golden / "ckpt" / name).tensors())
    path = directory / "model.safetensors"
    weights = load_file(path)
    path.unlink()
    turned = {key: tensor.t().contiguous().t() if tensor.ndim == 2 else tensor for key, tensor in weights.items()}
    assert any(not tensor.is_contiguous() for tensor in turned.values())
    if name == "hf_t5":  # tied, one of them turned
        turned |= {"encoder.embed_tokens.weight": weights["shared.weight"], "lm_head.weight": weights["shared.weight"]}
    vectors = [key for key, tensor in weights.items() if tensor.ndim == 1]
    flat = torch.cat([weights[key] for key in vectors])
    turned |= dict(zip(vectors, flat.split([len(weights[key]) for key in vectors])))
    torch.save(turned, directory / "pytorch_model.bin", **form)
    same(open_checkpoint(directory).tensors(), expected)


def test_shards_variants_and_the_order_of_choice(preset, golden, same):
    directory = preset("hf_t5_sharded")
    expected = dict(open_checkpoint(golden / "ckpt" / "hf_t5_sharded").tensors())
    weight_map = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    renamed = {file: f"pytorch_{file.removesuffix('.safetensors')}.bin" for file in weight_map.values()}
    for old, new in renamed.items():
        torch.save(load_file(directory / old), directory / new)
    index = {"weight_map": {name: renamed[file] for name, file in weight_map.items()}}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    torch.save({}, directory / "pytorch_model.fp16.bin")
    same(open_checkpoint(directory).tensors(), expected)  # safetensors come first
    for path in directory.glob("model*"):
        path.unlink()
    same(open_checkpoint(directory).tensors(), expected)
    gone = next(iter(renamed.values()))
    (directory / gone).unlink()
    with pytest.raises(ValueError, match=f"{gone}: missing, although pytorch_model.bin.index.json lists it"):
        open_checkpoint(directory)
    (directory / "pytorch_model.bin.index.json").unlink()
    whole = {}
    for file in golden.glob("ckpt/hf_t5_sharded/model*.safetensors"):
        whole |= load_file(file)
    torch.save(whole, directory / "pytorch_model.fp16.bin")
    same(open_checkpoint(directory).tensors(), expected)


class Calls:
    """A pickle that calls a function when it is read."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def as_zip(path, data, compression=zipfile.ZIP_STORED, storages=("0",), order=b"little"):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", order)
        for key in storages:
            archive.writestr(f"archive/data/{key}", bytes(4096))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "function, arguments",
    [
        (os.system, ("touch TOUCHED",)), (eval, ("open('TOUCHED', 'w')",)), (print, ()), (bytearray, (10**12,)),
        (getattr, ("", "upper")), (torch.storage._load_from_bytes, (b"",)), (collections.Counter, ()),
    ],
)  # fmt: skip
def test_a_pickle_that_calls_anything_else_is_refused(preset, monkeypatch, function, arguments, legacy):
    directory = preset("hf_gpt2")
    monkeypatch.chdir(directory)
    (directory / "model.safetensors").unlink()
    data = pickle.dumps({"wte.weight": Calls(function, *arguments)})
    if legacy:
        head = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
        (directory / "pytorch_model.bin").write_bytes(b"".join(map(pickle.dumps, head)) + data)
    else:
        as_zip(directory / "pytorch_model.bin", data)
    with pytest.raises(
        ValueError, match=rf"pytorch_model.bin: needs .*{function.__name__}, which is more .*convert it once"
    ):
        open_checkpoint(directory)
    assert not (directory / "TOUCHED").exists()


REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
STORAGE = b"((S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI4\ntQ"


def tensor_of(offset, shape, strides):
    """The pickle of {"wte.weight": a tensor} over the storage 0 of 4,096 bytes."""
    return b"(dS'wte.weight'\n" + REBUILD + STORAGE + f"I{offset}\n({shape}t({strides}tt".encode() + b"Rs."


def numbers(*values):
    return "".join(f"I{value}\n" for value in values)


LAUGHS = b"\x80\x02)q\x00" + b"".join(
    b"(" + b"h" + bytes([i]) + b"h" + bytes([i]) + b"tq" + bytes([i + 1]) for i in range(60)
)


@pytest.mark.parametrize(
    "data, said",
    [
        (b"", "cannot be read"), (b"\x80\x02.", "cannot be read"), (b"\x80\x02}q\x00.", "hold 0 tensors"),
        (b"\x80\x04]\x94.", "holds content of type list, not a dictionary"), (b"(dI1\nI2\ns.", "with the name '1'"),
        (b"(dS'epoch'\nI3\ns.", "holds 'epoch', which is of type int"),
        (b"(dS'model'\n" + tensor_of(0, numbers(2, 2), numbers(2, 1))[:-1] + b"s.", "torch.save(content"),
        (b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b".", "cannot be read"),  # 1 TB of bytes
        (b"\x80\x04\x8e" + struct.pack("<Q", 2**63 - 1) + b".", "cannot be read"),
        (b"\x80\x02}r\xff\xff\xff\xff.", "takes more memory"),  # the memo's 4 billionth place
        (b"\x80\x02" + b"(" * 100_000, "cannot be read"), (b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".", "type list"),
        (LAUGHS + b"}h\x3cK\x01s.", "did not finish within"),  # the hash of 2**60 elements
        (tensor_of(0, numbers(29, 12), numbers(12, 1)), "hold 1 tensors"),
        (tensor_of(0, numbers(2**40, 2**40), numbers(2**40, 1)), "is not inside the storage"),
        (tensor_of(-1, numbers(2, 2), numbers(2, 1)), "not made of a storage and sizes"),
        (tensor_of(1000, numbers(29, 12), numbers(12, 1)), "is not inside the storage"),
        (tensor_of(0, numbers(2, 2), numbers(0, 0)), "is not one block"),
        (tensor_of(0, numbers(2, 2), numbers(4, 2)), "is not one block"),
        (tensor_of(0, numbers(*[1] * 9), numbers(*[1] * 9)), "9 sizes"),
        (tensor_of(0, numbers(2), numbers(2, 1)), "1 sizes and 2 strides"),
        (b"(dS'wte.weight'\n" + REBUILD + b"(I1\nI2\n(t(ttRs.", "not made of a storage"),
        (b"(dS'x'\nS'notastorage'\nQs.", "which is no storage"),
        (b"(dS'x'\nctorch\nComplexFloatStorage\ns.", "needs torch.ComplexFloatStorage"),
        (b"(dS'x'\nccollections\nOrderedDict\n(S'a'\nttR(dS'keys'\nI1\nsbs.", "cannot be read|not a tensor"),
    ],
)  # fmt: skip
def test_hostile_pickles(preset, data, said):
    directory = preset("hf_gpt2")
    (directory / "model.safetensors").unlink()
    as_zip(directory / "pytorch_model.bin", data)
    with pytest.raises(ValueError, match=f"(?s)pytorch_model.bin.*({re.escape(said) if '(' in said else said})"):
        open_checkpoint(directory)


def test_hostile_archives(preset):
    directory = preset("hf_gpt2")
    path = pickled(directory)
    good = path.read_bytes()

    def refused(said):
        with pytest.raises(ValueError, match=f"pytorch_model.bin: .*{said}"):
            open_checkpoint(directory)

    with zipfile.ZipFile(path) as archive:
        data = archive.read("pytorch_model/data.pkl")
    as_zip(path, data, storages=())
    refused("is not inside the storage '0' of -1 bytes")
    as_zip(path, data, compression=zipfile.ZIP_DEFLATED, storages=("0",))
    refused("compressed")
    as_zip(path, data, order=b"big")
    refused("byte order b'big'")
    as_zip(path, b"\x80\x02" + bytes(50_000_000), compression=zipfile.ZIP_DEFLATED, storages=())
    refused("cannot be read as a pickle")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../data.pkl", data)
    refused("without exactly one data.pkl")
    for size in (3, 10, 1000, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:size])
        refused("damaged one: download it again|truncated")


def test_hostile_legacy_files(preset):
    directory = preset("hf_gpt2")
    path = pickled(directory, **LEGACY)
    good = path.read_bytes()
    for size in (3, 10, 30, 1000, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:size])
        with pytest.raises(ValueError, match=r"pytorch_model.bin: .*(download it again|truncated)"):
            open_checkpoint(directory)
    for head, said in (
        ((1, 2), "not one of torch.save"),
        ((0x1950A86A20F9469CFC6C, 1001, {"little_endian": False}), "another byte order"),
        ((0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, {}, ["7"]), "lists the storage '7'"),
    ):
        path.write_bytes(b"".join(map(pickle.dumps, head)))
        with pytest.raises(ValueError, match=f"pytorch_model.bin: .*{said}"):
            open_checkpoint(directory)
