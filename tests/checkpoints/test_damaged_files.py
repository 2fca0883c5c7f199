"""Does the error about a file that is something else say what it probably is, and what to do?"""

import json
import re
import zipfile

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file

from pyfused import Tokenizer
from pyfused.checkpoints import open_checkpoint

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1\nsize 548105171\n"
HTML = b"<!DOCTYPE html>\n<html><head><title>Log in</title></head></html>"
KINDS = {
    "pointer": (POINTER, "a git-lfs pointer.*git lfs pull"),
    "page": (b"\xef\xbb\xbf\n" + HTML, "an HTML or XML page.*log in, then download it again"),
    "xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "an HTML or XML page.*download it again"),
    "zeros": (bytes(5000), "a file of zeros.*download it again"),
    "empty": (b"", "an empty file.*download it again"),
    "gguf": (b"GGUF\x03\0\0\0" + bytes(40), "a GGUF file of llama.cpp: get the safetensors checkpoint"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(40), "an HDF5 file"),
    "pickle": (b"\x80\x02}q\x00.", r"a Python pickle.*torch.load\(.*weights_only=True"),
    "archive": (b"PK\x03\x04" + bytes(40), r"a zip archive.*torch.load\(.*weights_only=True"),
    "gzip": (b"\x1f\x8b\x08\x00" + bytes(range(40)), "compressed with gzip: unpack it"),
    "said": (b"Access denied: token expired", "a server's error message.*Access denied.*download it again"),
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize(
    "name, file",
    [
        ("hf_gpt2", "model.safetensors"), ("hf_gpt2", "config.json"), ("keras_gpt2", "model.weights.h5"),
        ("keras_gpt2", "config.json"), ("hf_t5_sharded", "model.safetensors.index.json"),
    ],
)  # fmt: skip
def test_another_file_in_its_place(preset, name, file, kind):
    if (file, kind) == ("model.weights.h5", "hdf5"):
        return  # it is one, and cut off
    directory = preset(name)
    content, said = KINDS[kind]
    (directory / file).write_bytes(content)
    with pytest.raises(ValueError, match=rf"(?s)^{re.escape(str(directory / file))}: .*it looks like {said}"):
        open_checkpoint(directory)


def test_an_error_in_json(preset):
    answer = json.dumps({"error": "Repository not found"}).encode()
    for name, file in (("hf_gpt2", "model.safetensors"), ("keras_gpt2", "model.weights.h5")):
        directory = preset(name)
        (directory / file).write_bytes(answer)
        with pytest.raises(ValueError, match=r"it looks like a JSON text.*Repository not found.*download it again"):
            open_checkpoint(directory)
        (directory / "config.json").write_bytes(answer)
        with pytest.raises(ValueError, match=r"it looks like a server's error message.*Repository not found"):
            open_checkpoint(directory)


def test_weights_under_the_wrong_name(preset, golden):
    directory = preset("keras_gpt2")
    content = (golden / "ckpt" / "hf_gpt2" / "model.safetensors").read_bytes()
    (directory / "model.weights.h5").write_bytes(content)
    with pytest.raises(ValueError, match="it looks like a safetensors file: rename it"):
        open_checkpoint(directory)
    directory = preset("hf_gpt2")
    (directory / "expected.safetensors").unlink()
    (directory / "model.safetensors").rename(directory / "gpt2.safetensors")
    with pytest.raises(
        ValueError, match=r"gpt2.safetensors: safetensors under another name.*rename the file to model.safe"
    ):
        open_checkpoint(directory)


@pytest.mark.parametrize(
    "file, said",
    [
        (
            "weights.bin",
            r"pickled weights; .* named pytorch_model.bin .*torch.load\(\"weights.bin\", weights_only=True\)",
        ),
        ("pytorch_model-00001-of-00002.bin", "pickled weights; pyfused reads them if they are named pytorch_model.bin"),
        ("model.pt", "pickled weights; pyfused reads them if they are named pytorch_model.bin"),
        ("model-q4_0.gguf", "a GGUF file of llama.cpp; get the safetensors checkpoint"),
        ("flax_model.msgpack", r"Flax's format; load it with transformers 4 .*from_flax=True.*save_pretrained"),
        ("tf_model.h5", r"TensorFlow's format; load it with transformers 4 .*from_tf=True.*save_pretrained"),
        ("adapter_model.safetensors", r"an adapter \(LoRA\).*merge_and_unload"),
        ("model.keras", "a Keras archive; load it with Keras, then save_to_preset"),
        ("model.onnx", "an exported graph"),
    ],
)
@pytest.mark.parametrize("name, weights", [("hf_gpt2", "model.safetensors"), ("keras_gpt2", "model.weights.h5")])
def test_a_folder_with_other_weights_alone(preset, name, weights, file, said):
    directory = preset(name)
    (directory / weights).unlink()
    for path in directory.glob("expected*"):
        path.unlink()
    (directory / file).write_bytes(b"\x80\x02.")
    with pytest.raises(ValueError, match=f"no weights found; looked for {weights}.*; {re.escape(file)}: {said}"):
        open_checkpoint(directory)


def test_a_folder_with_something_else_alone(tmp_path, preset):
    with pytest.raises(ValueError, match=r"not a preset, it has no config.json; the folder holds nothing"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"not a preset, it has no config.json; model.gguf: a GGUF file"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no config.json; there are weights, model.safetensors: get the config.json"):
        open_checkpoint(tmp_path)
    preset("hf_t5").rename(tmp_path / "text_encoder_2")
    with pytest.raises(ValueError, match=r"no config.json; there is one in text_encoder_2"):
        open_checkpoint(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"a diffusers pipeline: its text encoders are in the folders text_encoder_2"):
        open_checkpoint(tmp_path)


def test_a_pickle_read_as_the_error_says(preset, same, monkeypatch):
    directory = preset("hf_t5")
    path = directory / "model.safetensors"
    expected = dict(open_checkpoint(directory).tensors())
    weights = load_file(path)
    tied = {f"{stack}.embed_tokens.weight": weights["shared.weight"] for stack in ("encoder", "decoder")}
    torch.save(weights | tied, directory / "model.pt")
    assert zipfile.is_zipfile(directory / "model.pt")
    path.unlink()
    with pytest.raises(ValueError) as error:
        open_checkpoint(directory)
    monkeypatch.chdir(directory)
    command = re.search(r"safetensors.torch.save_file.*", str(error.value))
    exec(command[0], {"torch": torch, "safetensors": safetensors})  # as it stands there
    same(open_checkpoint(directory).tensors(), expected)


@pytest.mark.parametrize("kind", ["pointer", "page", "zeros", "empty", "said"])
@pytest.mark.parametrize("file", ["vocab.json", "merges.txt", "spiece.model", "tokenizer.json"])
def test_tokenizers(tmp_path, file, kind):
    if file == "merges.txt":
        (tmp_path / "vocab.json").write_text(json.dumps({"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3}))
    content, said = KINDS[kind]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=rf"(?s){re.escape(file)}: .*it looks like {said}"):
        Tokenizer.from_preset(tmp_path)
