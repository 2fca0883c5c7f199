"""What is a file that cannot be read, or a folder without weights, and what should the user do about it?

Downloads fail in few ways, and each leaves its own mark in the file's first bytes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_AGAIN = "download it again"
_HEAD = 4096  # bytes read from a file's start

_MAGIC = (
    (b"version https://git-lfs", "a git-lfs pointer instead of the file: run `git lfs pull` in the clone"),
    (b"GGUF", "a GGUF file of llama.cpp: get the safetensors checkpoint that it was made from"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file: a Keras preset has it as model.weights.h5, beside Keras's config.json"),
    (b"PK\x03\x04", "a zip archive, as written by torch.save or Keras (.keras): {pickle}"),
    (b"\x80", "a Python pickle, as written by torch.save: {pickle}"),
    (b"\x1f\x8b", "compressed with gzip: unpack it"),
)  # fmt: skip

# A pickle can run any code when it is read, so pyfused reads only those that name nothing but tensors.
# clone() is for tied weights: safetensors refuses shared memory
_PICKLE = (
    "if you trust it, convert it once: transformers' from_pretrained, then save_pretrained; or, without a configuration, "
    'safetensors.torch.save_file({{name: tensor.contiguous().clone() for name, tensor in torch.load("{name}", '
    'weights_only=True).items()}}, "model.safetensors")'
)

# (endings of file names, advice): weights in other formats, for a folder that pyfused finds no weights in
_SAFE = "get the safetensors checkpoint that it was made from"
_FROM_4 = "load it with transformers 4 (from_pretrained(..., from_{}=True)), then save_pretrained"
_OTHER_WEIGHTS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("adapter_model.safetensors", "adapter_model.bin"),
        "an adapter (LoRA) without its model; merge the two with peft's merge_and_unload, then save_pretrained",
    ),
    (
        (".bin", ".pt", ".pth", ".ckpt"),
        "pickled weights; pyfused reads them if they are named pytorch_model.bin and stand beside Hugging Face's config.json; "
        "or {pickle}",
    ),
    ((".gguf",), f"a GGUF file of llama.cpp; {_SAFE}"),
    ((".msgpack",), f"Flax's format; {_FROM_4.format('flax')}"),
    (("tf_model.h5",), f"TensorFlow's format; {_FROM_4.format('tf')}"),
    ((".keras",), "a Keras archive; load it with Keras, then save_to_preset"),
    (
        (".h5",),
        "an HDF5 file; a Keras preset has model.weights.h5 beside Keras's config.json, as save_to_preset writes them",
    ),
    ((".onnx",), f"an exported graph; {_SAFE}"),
    (
        (".safetensors",),
        "safetensors under another name; if these are the weights, rename the file to model.safetensors",
    ),
)

_ANSWERS = (b"access denied", b"access to", b"entry not found", b"not found", b"repository not found", b"unauthorized")


def looks_like(path: Path) -> str:
    """The end of an error message that says what the file probably is and what to do: "; it looks like ...". "" if it is
    unknown."""
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD)
    except OSError:
        return ""
    kind = _kind_of(head, path.name)
    return f"; it looks like {kind}" if kind else ""


def _kind_of(head: bytes, name: str) -> str | None:
    if not head:
        return f"an empty file, left by an interrupted download: {_AGAIN}"
    if not head.strip(b"\0"):
        return f"a file of zeros, left by a download that reserved the space and never filled it: {_AGAIN}"
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and 2 <= length < 100_000_000:
        right = name.endswith(".safetensors")
        return None if right else "a safetensors file: rename it to end in .safetensors"
    for magic, what in _MAGIC:
        if head.startswith(magic):
            right = "{pickle}" in what and name.endswith(".bin")
            return f"a damaged one: {_AGAIN}" if right else what.format(pickle=how_to_convert(name))
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text[:1] == b"<":
        return f"an HTML or XML page, such as a server's error or login page: log in, then {_AGAIN}"
    if text[:1] == b"{" and not name.endswith(".json"):
        return f"a JSON text, such as a server's error message ({_beginning(text)}): {_AGAIN}"
    if text.lower().startswith(_ANSWERS):
        return f"a server's error message ({_beginning(text)}): {_AGAIN}"
    return None


def how_to_convert(name: str) -> str:
    """What to do with a pickle of weights that pyfused does not read."""
    return _PICKLE.format(name=name)


def _beginning(text: bytes) -> str:
    return repr(" ".join(text[:100].decode("utf-8", errors="replace").split()))


def error_answer(raw: dict[str, Any]) -> str:
    """The end of an error message about a configuration that is really a server's error message; "" if it is not."""
    answer = next((raw[key] for key in ("error", "message", "detail", "errors") if key in raw), None)
    if answer is None or len(raw) > 5:
        return ""
    return f"; it looks like a server's error message ({json.dumps(answer)[:100]}): {_AGAIN}"


def other_weights(directory: Path) -> str:
    """The end of an error message: what a folder without readable weights holds instead, and what to do."""
    names = sorted(path.name for path in directory.iterdir() if path.is_file())
    for endings, what in _OTHER_WEIGHTS:
        if found := [name for name in names if name.endswith(endings)]:
            return f"; {found[0]}: {what.format(pickle=how_to_convert(found[0]))}"
    return f"; the folder holds {', '.join(names) or 'nothing'}"


def no_configuration(directory: Path) -> str:
    """The end of an error message: what a folder without config.json may be."""
    if (directory / "model_index.json").is_file():
        parts = sorted(path.parent.name for path in directory.glob("text_encoder*/config.json"))
        return (
            f"; it is a diffusers pipeline: its text encoders are in the folders {', '.join(parts) or 'text_encoder*'}"
        )
    if found := sorted(directory.glob("*/config.json")):
        return f"; there is one in {', '.join(path.parent.name for path in found[:5])}"
    if found := sorted((*directory.glob("model*.safetensors"), *directory.glob("model*.weights.h5"))):
        return f"; there are weights, {found[0].name}: get the config.json that was published beside them"
    return other_weights(directory)
