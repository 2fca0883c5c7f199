"""What is a file that cannot be read, or a folder without weights, probably, and what is to be done about it?

Downloads fail in few ways, and each leaves its own mark in the file's first bytes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_AGAIN = "download it again"
_HEAD = 4096  # bytes that are looked at

_MAGIC = (
    (b"version https://git-lfs", "a git-lfs pointer, which stands for the file: run `git lfs pull` where it was cloned"),
    (b"GGUF", "a GGUF file of llama.cpp: get the checkpoint in safetensors that it was made from"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras and TensorFlow write: a Keras preset has model.weights.h5 and its own config.json"),
    (b"PK\x03\x04", "a zip archive, as torch.save and Keras (.keras) write: {pickle}"),
    (b"\x80", "a Python pickle, as torch.save writes: {pickle}"),
    (b"\x1f\x8b", "compressed with gzip: unpack it"),
)  # fmt: skip

# A pickle can run any code when it is read, so none is read here
_PICKLE = (
    'where you trust it, convert it once: safetensors.torch.save_file(torch.load("{name}", weights_only=True), '
    '"model.safetensors"), or transformers\' from_pretrained, then save_pretrained'
)

# Weights in other formats by how their names end, for a folder that has none to be read
_OTHER_WEIGHTS = (
    (("adapter_model.safetensors", "adapter_model.bin"), "an adapter (LoRA) without the model that it changes; merge the two with peft's merge_and_unload, then save_pretrained"),
    ((".bin", ".pt", ".pth", ".ckpt"), "a pickled file can run any code when it is read, so only safetensors are read; {pickle}"),
    ((".gguf",), "a GGUF file of llama.cpp; get the checkpoint in safetensors that it was made from"),
    ((".msgpack",), "Flax's format; load it with transformers 4 (from_pretrained(..., from_flax=True)), then save_pretrained"),
    (("tf_model.h5",), "TensorFlow's format; load it with transformers 4 (from_pretrained(..., from_tf=True)), then save_pretrained"),
    ((".keras",), "a Keras archive; load it with Keras, then save_to_preset"),
    ((".h5",), "an HDF5 file; a Keras preset, of config.json and model.weights.h5, is what KerasHub's save_to_preset writes"),
    ((".onnx",), "an exported graph; get the checkpoint in safetensors that it was made from"),
    ((".safetensors",), "safetensors under another name; if these are the model's weights, rename the file to model.safetensors"),
)  # fmt: skip


def looks_like(path: Path) -> str:
    """What the file probably is and what to do, as an end of an error message: "; it looks like ..."; "" if it tells
    nothing."""
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD)
    except OSError:
        return ""
    found = _of_bytes(head, path.name)
    return f"; it looks like {found}" if found else ""


def _of_bytes(head: bytes, name: str) -> str | None:
    if not head:
        return f"an empty file, of a download that was cut off: {_AGAIN}"
    if not head.strip(b"\0"):
        return f"a file of zeros, of a download that reserved the space and never filled it: {_AGAIN}"
    for magic, what in _MAGIC:
        if head.startswith(magic):
            return what.format(pickle=_PICKLE.format(name=name))
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text[:1] == b"<":
        return f"an HTML or XML page, with which a server answers an error or asks for a login: log in, then {_AGAIN}"
    if text[:1] == b"{" and not name.endswith(".json"):
        return f"a JSON text, with which a server answers an error ({_shown(text)}): {_AGAIN}"
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and 2 <= length < 100_000_000 and not name.endswith(".safetensors"):
        return "a safetensors file: give it back its name, which ends in .safetensors"
    if text.lower().startswith((b"access denied", b"access to", b"entry not found", b"invalid", b"not found", b"repository not found", b"unauthorized")):  # fmt: skip
        return f"a server's error message ({_shown(text)}): {_AGAIN}"
    return None


def _shown(text: bytes) -> str:
    return repr(" ".join(text[:100].decode("utf-8", errors="replace").split()))


def error_answer(raw: dict[str, Any]) -> str:
    """What to add where a configuration is in truth a server's answer: "" if it is none."""
    said = next((raw[key] for key in ("error", "message", "detail", "errors") if key in raw), None)
    if said is None or len(raw) > 5:
        return ""
    return f"; it looks like a server's error message ({json.dumps(said)[:100]}): {_AGAIN}"


def other_weights(directory: Path) -> str:
    """What a folder without readable weights holds instead, and what to do, as an end of an error message."""
    names = sorted(path.name for path in directory.iterdir() if path.is_file())
    for endings, what in _OTHER_WEIGHTS:
        if found := [name for name in names if name.endswith(endings)]:
            return f"; {found[0]}: {what.format(pickle=_PICKLE.format(name=found[0]))}"
    return f"; the folder holds {', '.join(names) or 'nothing'}"


def no_configuration(directory: Path) -> str:
    """What a folder without config.json may be, as an end of an error message."""
    if (directory / "model_index.json").is_file():
        parts = sorted(path.parent.name for path in directory.glob("text_encoder*/config.json"))
        return f"; it is a pipeline of diffusers: its text encoders are the folders {', '.join(parts) or 'text_encoder*'} in it"
    found = [path for path in sorted(directory.glob("*/config.json"))]
    if found:
        return f"; there is one in {', '.join(path.parent.name for path in found[:5])}"
    return other_weights(directory)
