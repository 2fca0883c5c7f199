"""Does any header, configuration or model file end in anything but a ValueError that names the file?"""

import json
import os
import re
import string
import struct
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyfused import GPT2Backbone, Tokenizer
from pyfused.checkpoints import open_checkpoint
from pyfused.checkpoints.hf import _LARGEST_HEADER, read_header
from pyfused.checkpoints.storage import LONGEST_NAME, MOST_TENSORS

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
# The same examples in every run
tries = settings(max_examples=150, derandomize=True, deadline=None, database=None,
                 suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])  # fmt: skip

NUMBERS = st.sampled_from(
    [-1, 0, 1, 2, 29, 12, 348, 2**31, 2**63 - 1, 2**63, 2**64, 10**30, 0.5, float("nan"), float("inf")]
)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
TENSOR = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "BF16", "I8", "F4", ""]) | JSON,
     "shape": st.lists(NUMBERS, max_size=9) | JSON, "data_offsets": st.lists(NUMBERS, min_size=1, max_size=3) | JSON},
    optional={"strides": JSON},
)  # fmt: skip


def refused(where, read, *arguments):
    """The message of the ValueError that names a place, or None if there is none."""
    try:
        read(*arguments)
    except ValueError as error:
        if str(where) not in str(error):
            raise AssertionError(f"the error names no file: {error}") from error
        return str(error)
    return None


def safetensors(path, header, data=b""):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


@tries
@given(header=st.dictionaries(st.text(max_size=12), TENSOR | JSON, max_size=3), size=st.integers(0, 2000))
def test_safetensors_headers(tmp_path, header, size):
    path = tmp_path / "model.safetensors"
    safetensors(path, header, bytes(size))
    if refused(path, read_header, path) is None:
        entries = read_header(path).values()
        assert sum(entry.nbytes for entry in entries) == size
        assert all(entry.offset > 0 and entry.offset + entry.nbytes <= path.stat().st_size for entry in entries)


@pytest.mark.parametrize("name", ["hf_gpt2", "hf_t5", "hf_albert_mlm", "hf_fnet_pretraining", "keras_gpt2", "keras_t5"])
def test_configurations(preset, name):
    directory = preset(name)
    file = directory / "config.json"
    good = json.loads(file.read_text())
    options = good["config"] if name.startswith("keras") else good

    @settings(tries, max_examples=60)
    @given(
        changes=st.dictionaries(st.sampled_from(sorted(options)), NUMBERS | JSON, min_size=1, max_size=3), extra=JSON
    )
    def check(changes, extra):
        changed = {**options, **changes, "extra": extra}
        file.write_text(json.dumps({**good, "config": changed} if name.startswith("keras") else changed))
        refused(directory, lambda: open_checkpoint(directory, weights=False).dtype)

    check()


def varint(value):
    return bytes([value & 127 | 128]) + varint(value >> 7) if value > 127 else bytes([value])


FIELDS = st.builds(
    lambda number, kind, body: varint(number << 3 | kind) + (varint(len(body)) + body if kind == 2 else body),
    st.sampled_from([1, 2, 3, 4, 24, 2**40]), st.integers(0, 7), st.binary(max_size=24),
)  # fmt: skip
PIECES = st.builds(
    lambda text, score, kind: (lambda body: b"\x0a" + varint(len(body)) + body)(
        b"\x0a" + varint(len(text)) + text + b"\x15" + struct.pack("<f", score) + b"\x18" + varint(kind)
    ),
    st.sampled_from([b"</s>", b"<unk>", b"[CLS]", b"[SEP]", b"a", b"\xe2\x96\x81", b"", b"\xff"]),
    st.floats(width=32), st.integers(0, 7),
)  # fmt: skip


@tries
@given(parts=st.lists(PIECES | FIELDS, max_size=8), tail=st.binary(max_size=4))
def test_sentencepiece_models(tmp_path, parts, tail):
    path = tmp_path / "spiece.model"
    path.write_bytes(b"".join(parts) + tail)
    if refused(tmp_path, Tokenizer.from_preset, tmp_path) is None:
        tokenizer = Tokenizer.from_preset(tmp_path)
        tokenizer.decode(tokenizer.encode("a text"))


@tries
@given(
    name=st.text(string.ascii_letters + "._\0/\\ é", max_size=40) | st.just("a." * 200),
    shape=st.lists(st.integers(0, 3), max_size=3),
)
def test_names_of_further_tensors(preset_once, name, shape):
    """Heads are left unread with a warning; whatever may belong to the model is refused."""
    directory, header, data = preset_once
    offset = len(data)
    count = 4
    for size in shape:
        count *= size
    field = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + count]}
    safetensors(directory / "model.safetensors", {**header, name: field}, data + bytes(count))
    refused(directory, lambda: open_checkpoint(directory))


@pytest.fixture
def preset_once(preset):
    directory = preset("hf_gpt2")
    content = (directory / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return directory, json.loads(content[8:end]), content[end:]


FIELD = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'


@pytest.mark.parametrize(
    "header, said",
    [
        (b"{" + b" " * _LARGEST_HEADER + b"}", "at most 2097152 are read"),
        (b"[" * (_LARGEST_HEADER - 8), "cannot be read as safetensors"),
        (b"[" + b"[]," * (_LARGEST_HEADER // 3 - 8) + b"0]", "not a JSON object"),
        (b"{" + b",".join(b'"%d":[]' % i for i in range(150_000)) + b"}", f"at most {MOST_TENSORS} are read"),
        (b"{" + b",".join(b'"%d":[]' % (i % 149_999) for i in range(150_000)) + b"}", "the key '0' occurs twice"),
        (b'{"' + b"a." * 1_000_000 + b'":' + FIELD.encode() + b"}", f"at most {LONGEST_NAME} are read"),
        (('{"' + "a." * 255 + '":' + FIELD + "}").encode(), "calls for 2 layers"),
        ((",".join(f'"h.{i}.ln_1.lora_{"a" * 400}.{i}":{FIELD}' for i in range(4_000)).join("{}")).encode(), "adapter"),
        ((",".join(f'"{"module." * 60}{i}":{FIELD}' for i in range(4_000)).join("{}")).encode(), "is missing"),
    ],
    ids=["spaces", "deep", "lists", "many", "duplicates", "long", "dots", "adapter", "wrapped"],
)  # fmt: skip
def test_huge_headers_end_soon(preset, header, said):
    directory = preset("hf_gpt2")
    safetensors(directory / "model.safetensors", header)
    begin = time.process_time()
    with pytest.raises(ValueError, match=said):
        open_checkpoint(directory)
    assert time.process_time() - begin < 20  # a second on a machine at rest; the limit is for hangs


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "model.weights.h5", "pytorch_model.bin"])
def test_loops_of_links_pipes_and_devices_are_no_files(preset, file):
    directory = preset("keras_gpt2" if file.endswith("h5") else "hf_gpt2")
    for path in directory.glob("model*"):
        path.unlink()
    path = directory / file
    for make in (
        lambda: path.symlink_to(path.name), lambda: os.mkfifo(path), lambda: path.symlink_to("/dev/zero"),
        path.mkdir, lambda: path.symlink_to(directory / "nowhere"),
    ):  # fmt: skip
        if path.exists():
            path.unlink()
        make()
        with pytest.raises(ValueError, match=re.escape(str(directory))):
            open_checkpoint(directory)
        path.rmdir() if path.is_dir() else path.unlink()


def test_a_file_that_changes_is_never_half_read(preset):
    directory = preset("hf_gpt2")
    path = directory / "model.safetensors"
    content = path.read_bytes()
    for change in (
        lambda: path.write_bytes(content[:-1]), lambda: path.write_bytes(content + b"\0"), lambda: path.write_bytes(b""),
        lambda: os.utime(path, ns=(1, 1)), path.unlink,
        lambda: (Path(f"{path}.new").write_bytes(content), os.replace(f"{path}.new", path)),
    ):  # fmt: skip
        path.write_bytes(content)
        checkpoint = open_checkpoint(directory)
        module = GPT2Backbone(**checkpoint.config)
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        change()
        with pytest.raises(ValueError, match=r"has changed since its header was read|cannot be read"):
            checkpoint.load_into(module)
        assert all(bool((tensor == before[name]).all()) for name, tensor in module.state_dict().items())
    path.write_bytes(content)
    tensors = open_checkpoint(directory).tensors()
    next(tensors)
    path.write_bytes(content[:200])  # while it is read: an error, where a mapped file would end the process
    with pytest.raises(ValueError, match="has changed since its header was read"):
        list(tensors)
