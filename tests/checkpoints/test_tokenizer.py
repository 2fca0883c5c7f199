"""Are the ids those of transformers and KerasHub from every set of files, and is no half character ever printed?

test_tokenizer_texts.py has hundreds of texts for each kind of vocabulary.
"""

import json
import random
import shutil
import sys
from pathlib import Path

import pytest
import tokenizers

from pyfused import Tokenizer

transformers = pytest.importorskip("transformers")

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
TEXTS = [
    "Hello world", " Hello world", "", "  two  spaces   here ", "I'm, we'LL, they'd DON'T", "12345678 90 3.14159",
    "emoji 👩‍👩‍👧‍👦🙂 naïve café e\u0301", "x<|endoftext|>y", "<|endoftext|><|endoftext|> hi", "tab\tsep\r\nwin\n",
    "日本語のテキスト, русский, العربية", "\u00a0nbsp\u3000wide\u2009thin", "\x00\x01\x7f", "۱۲۳ ½ ²", "!!!...??",
    "def f(x):\n    return x**2  # ok\n", "<|endoftext", "a" * 300, "\U0001f1e9\U0001f1ea\ufe0f\u200d",
]  # fmt: skip
# KerasHub without TensorFlow splits these words by the pattern of another model
OTHERWISE_SPLIT = ["'tis", "a\n\nb", "\n\n\n", "one\n\n\n two\n  \n", "\r\n\r\nx"]


@pytest.fixture(scope="module")
def files():
    return GOLDEN / "gpt2_tokenizer"


@pytest.fixture(scope="module")
def ours(files):
    return Tokenizer.from_preset(files)


@pytest.fixture(scope="module")
def theirs(files):
    return transformers.GPT2TokenizerFast.from_pretrained(files)


def test_published_ids(ours):
    assert ours.encode("Hello world") == [15496, 995]
    assert ours.encode(" Hello world") == [18435, 995]
    assert (ours.end_token_id, ours.vocabulary_size) == (50256, 50257)


def test_transformers(ours, theirs):
    for text in TEXTS + OTHERWISE_SPLIT:
        ids = ours.encode(text)
        assert ids == theirs(text)["input_ids"], text
        assert ours.decode(ids) == theirs.decode(ids) == text


def test_keras_hub(ours, files):
    keras_hub = pytest.importorskip("keras_hub")
    theirs = keras_hub.models.GPT2Tokenizer(str(files / "vocab.json"), str(files / "merges.txt"))
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == [int(index) for index in theirs(text)], text
        assert ours.decode(ids) == theirs.detokenize(ids)
    for text in OTHERWISE_SPLIT:
        assert ours.decode([int(index) for index in theirs(text)]) == text
    theirs._tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)  # OpenAI's pattern
    for text in TEXTS + OTHERWISE_SPLIT:
        assert ours.encode(text) == [int(index) for index in theirs(text)], text


def test_streaming(ours, theirs):
    """The pieces are whole characters and together what decode gives, for ids that are no valid UTF-8 too."""
    generator = random.Random(0)
    cases = [ours.encode(text) for text in TEXTS + OTHERWISE_SPLIT]
    cases += [[generator.randrange(256) if generator.random() < 0.7 else generator.randrange(50257)
               for _ in range(generator.randrange(12))] for _ in range(1000)]  # fmt: skip
    stream = ours.stream()
    for ids in cases:
        pieces = [stream.push(index) for index in ids]
        assert "".join(pieces) + stream.finish() == ours.decode(ids) == theirs.decode(ids)
    family = "👩‍👩‍👧‍👦"
    ids = ours.encode(family)
    assert len(ids) > len(family)
    pieces = [stream.push(index) for index in ids]
    assert "\ufffd" not in "".join(pieces)
    assert "" in pieces
    stream.finish()
    assert stream.push(ids[0]) == ""
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


def test_keras_assets(golden):
    directory = golden / "ckpt" / "keras_gpt2_task"
    tokenizer = Tokenizer.from_preset(directory)
    assert (tokenizer.vocabulary_size, tokenizer.end_token_id) == (10, 4)
    assert tokenizer.encode("air air<|endoftext|>ai") == [1, 2, 4, 8]
    assert tokenizer.decode([1, 2, 4]) == "air air<|endoftext|>"
    with pytest.raises(ValueError, match="text holds 'z', for which this vocabulary of 10 tokens has no token"):
        tokenizer.encode("air z")
    for index in (10, -1):
        with pytest.raises(IndexError, match=f"token id {index} is not in the vocabulary of 10 tokens"):
            tokenizer.decode([1, index])


def test_keras_options(preset, edit):
    directory = preset("keras_gpt2_task")
    config = json.loads((directory / "tokenizer.json").read_text())["config"]
    edit(directory / "tokenizer.json", config=config | {"add_prefix_space": True, "unsplittable_tokens": ["plane"]})
    assert Tokenizer.from_preset(directory).encode("air") == [2]
    assert Tokenizer.from_preset(directory).encode("plane air") == [3, 2]
    (directory / "tokenizer.json").unlink()
    assert Tokenizer.from_preset(directory).encode("air<|endoftext|>") == [1, 4]


@pytest.fixture
def written(files, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(files / name, tmp_path / name)
    return tmp_path


def test_tokenizer_json(files, tmp_path, ours, theirs):
    theirs.save_pretrained(tmp_path)
    (tmp_path / "vocab.json").unlink(missing_ok=True)
    assert (tmp_path / "tokenizer.json").exists()
    tokenizer = Tokenizer.from_preset(tmp_path)
    assert (tokenizer.end_token_id, tokenizer.vocabulary_size) == (50256, 50257)
    for text in TEXTS + OTHERWISE_SPLIT:
        assert tokenizer.encode(text) == ours.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer.from_preset(tmp_path).end_token_id == 50256


def test_padding_and_truncation_in_the_file_do_not_cut_text(files, tmp_path, ours):
    ours.backend.enable_truncation(3)
    ours.backend.enable_padding(length=50)
    ours.backend.save(str(tmp_path / "tokenizer.json"))
    ours.backend.no_truncation()
    ours.backend.no_padding()
    text = "one two three four five"
    assert Tokenizer.from_preset(tmp_path).encode(text) == ours.encode(text)


def test_added_tokens_are_taken_literally(tmp_path, ours, theirs):
    theirs = transformers.GPT2TokenizerFast.from_pretrained(theirs.name_or_path)
    theirs.add_tokens(["<my token>"])
    theirs.save_pretrained(tmp_path)
    tokenizer = Tokenizer.from_preset(tmp_path)
    ids = tokenizer.encode("a<my token>b")
    assert ids == theirs("a<my token>b")["input_ids"]
    assert 50257 in ids
    assert tokenizer.decode(ids) == "a<my token>b"


def test_tokenizer_config(written, edit):
    config = written / "tokenizer_config.json"
    config.write_text(json.dumps({"add_prefix_space": True, "eos_token": {"content": "<|endoftext|>"}}))
    assert Tokenizer.from_preset(written).encode("Hello world") == [18435, 995]
    edit(config, eos_token="</s>")
    with pytest.raises(ValueError, match=r"vocab.json: the special token '</s>' is missing"):
        Tokenizer.from_preset(written)
    edit(config, eos_token=3)
    with pytest.raises(ValueError, match=r"tokenizer_config.json: eos_token is 3"):
        Tokenizer.from_preset(written)
    config.write_text(json.dumps({"add_bos_token": True}))
    with pytest.raises(ValueError, match=r"tokenizer_config.json: add_bos_token"):
        Tokenizer.from_preset(written)


def test_bad_text(ours):
    for wrong in (b"bytes", None, ["a"]):
        with pytest.raises(TypeError, match="text must be str, got"):
            ours.encode(wrong)
    with pytest.raises(ValueError, match="text has no UTF-8 form"):
        ours.encode("a\ud800")


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("vocab.json", "{", "vocab.json: cannot be read as JSON"),
        ("vocab.json", '{"a": 0, "a": 1}', "vocab.json: .*'a' occurs twice"),
        ("vocab.json", '{"a": -1}', "vocab.json: token 'a' has the id -1"),
        ("vocab.json", '{"a": "0"}', "vocab.json: token 'a' has the id '0'"),
        ("vocab.json", '{"a": 0, "b": 0}', "vocab.json: two tokens have the same id"),
        ("vocab.json", '{"a": 0}', r"vocab.json: the special token '<\|endoftext\|>' is missing"),
        ("merges.txt", "#version: 0.2\nĠ t\nĠ zzzz", "merges.txt: line 3, 'Ġ zzzz', is not a pair"),
        ("merges.txt", "a b c", "merges.txt: line 1"),
        ("merges.txt", b"\xff\xfe", "merges.txt: cannot be read"),
        ("merges.txt", None, "merges.txt: cannot be read"),
        ("tokenizer.json", '{"model": {"type": "WordPiece"}}', "nor a unigram model: the model is 'WordPiece'"),
        ("tokenizer.json", '{"model": {"type": "BPE"}, "decoder": {"type": "ByteLevel"}}', "read as a tokenizer"),
        ("tokenizer.json", '{"model": 3}', "neither byte-level BPE"),
        ("tokenizer.json", '{"class_name": "BertTokenizer", "config": {}}', "the class is 'BertTokenizer'"),
        ("tokenizer.json", '{"class_name": "GPT2Tokenizer", "config": {"sequence_length": 8}}', "sequence_length is 8"),
    ],
)  # fmt: skip
def test_bad_files(written, name, content, said):
    if content is None:
        (written / name).unlink()
    elif isinstance(content, bytes):
        (written / name).write_bytes(content)
    else:
        (written / name).write_text(content)
    with pytest.raises(ValueError, match=said):
        Tokenizer.from_preset(written)


def test_nothing_there(tmp_path, monkeypatch, files):
    with pytest.raises(
        ValueError, match=r"no tokenizer found; looked for tokenizer.json, vocab.json with merges.txt, spiece"
    ):
        Tokenizer.from_preset(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"text needs the tokenizers package: pip install"):
        Tokenizer.from_preset(files)
