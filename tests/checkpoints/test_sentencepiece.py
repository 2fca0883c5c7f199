"""Are T5's ids those of transformers, KerasHub and SentencePiece, and ByT5's those of transformers?"""

import json
import random
import shutil
from pathlib import Path

import pytest
import tokenizers

from pyfused import Tokenizer
from pyfused.checkpoints.sentencepiece import _parse

transformers = pytest.importorskip("transformers")

TEXTS = [
    "In the beginning God created the heaven and the earth.", " Hello world", "", "  two  spaces   here ", "    ",
    "tab\tsep\r\nwin\n", "ﬁne ½ ² Ａ\u00a0nbsp\u3000wide", "naïve café e\u0301 日本語", "a" * 300, "x y",
    "evening,and  the morning", "\u2581low", "emoji 🙂", "<extra_id_", "!!!...??",
]  # fmt: skip
SPECIAL = ["a</s>b", "The <extra_id_0> of <extra_id_99>", "<pad> light", "<extra_id_1><extra_id_2>", "x <unk> y</s>"]


@pytest.fixture(scope="module")
def files():
    return Path(__file__).resolve().parent.parent / "golden" / "t5_tokenizer"


@pytest.fixture(scope="module")
def ours(files):
    return Tokenizer.from_preset(files)


@pytest.fixture(scope="module")
def theirs(files):
    """As from_pretrained makes it of spiece.model where protobuf is installed: pieces and scores from SentencePiece."""
    model = pytest.importorskip("sentencepiece").SentencePieceProcessor(model_file=str(files / "spiece.model"))
    pieces = [(model.id_to_piece(i), model.get_score(i)) for i in range(len(model))]
    pieces += [(f"<extra_id_{i}>", 0.0) for i in range(99, -1, -1)]
    charsmap = _parse((files / "spiece.model").read_bytes())[2][2]
    return transformers.T5Tokenizer(vocab=pieces, _spm_precompiled_charsmap=charsmap)


def test_sizes(ours):
    assert (ours.vocabulary_size, ours.end_token_id) == (400, 1)
    assert ours.encode("<extra_id_0>") == [399, 1]
    assert ours.encode("<extra_id_99>") == [300, 1]


def test_transformers(ours, theirs):
    for text in TEXTS + SPECIAL:
        ids = ours.encode(text)
        assert ids == theirs(text)["input_ids"], text
        assert ours.decode(ids) == theirs.decode(ids), text
        assert ids[-1] == 1


def test_sentencepiece(ours, files):
    sentencepiece = pytest.importorskip("sentencepiece")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(files / "spiece.model"))
    for text in TEXTS:
        assert ours.encode(text) == [*theirs.encode(text), 1], text
    ids = theirs.encode(TEXTS[0])
    assert ours.decode(ids) == theirs.decode(ids) == TEXTS[0]


def keras_directory(files, directory):
    (directory / "assets" / "tokenizer").mkdir(parents=True)
    shutil.copy(files / "spiece.model", directory / "assets" / "tokenizer" / "vocabulary.spm")
    (directory / "tokenizer.json").write_text(json.dumps({"class_name": "T5Tokenizer", "config": {"dtype": "int32"}}))
    return directory


def test_keras_hub(files, tmp_path):
    keras_hub = pytest.importorskip("keras_hub")
    pytest.importorskip("sentencepiece")
    ours = Tokenizer.from_preset(keras_directory(files, tmp_path))
    theirs = keras_hub.models.T5Tokenizer(str(files / "spiece.model"))
    assert ours.vocabulary_size == theirs.vocabulary_size() == 300
    for text in TEXTS:
        ids = [int(index) for index in theirs(text)]
        assert ours.encode(text) == [*ids, theirs.end_token_id], text
        if 2 not in ids:  # the unknown piece: "<unk>" here, as in transformers
            assert ours.decode(ids) == theirs.detokenize(ids)


def test_tokenizer_json(ours, theirs, tmp_path):
    """As transformers saves it, which is how most repositories have it."""
    theirs.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    saved = Tokenizer.from_preset(tmp_path)
    assert saved.vocabulary_size == ours.vocabulary_size
    assert saved.end_token_id == 1
    for text in TEXTS + SPECIAL:
        ids = ours.encode(text)
        assert saved.encode(text) == ids
        assert saved.decode(ids) == ours.decode(ids)


def test_streaming(ours):
    generator = random.Random(0)
    cases = [ours.encode(text) for text in TEXTS + SPECIAL]
    cases += [[generator.randrange(400) for _ in range(generator.randrange(12))] for _ in range(200)]
    stream = ours.stream()
    for ids in cases:
        assert "".join([stream.push(index) for index in ids]) + stream.finish() == ours.decode(ids)
    with pytest.raises(IndexError, match="token id 400 is not in the vocabulary of 400 tokens"):
        ours.decode([400])


@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json"])
def test_byt5(tmp_path, where):
    (tmp_path / where).write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    ours, theirs = Tokenizer.from_preset(tmp_path), transformers.ByT5Tokenizer()
    assert (ours.vocabulary_size, ours.end_token_id) == (384, 1)
    for text in (*TEXTS, *SPECIAL, "a </s>", "日本語🙂\n"):
        assert ours.encode(text) == theirs(text)["input_ids"], text
    for text in (*TEXTS, "日本語🙂\n"):
        assert ours.decode(ours.encode(text)[:-1]) == text
    stream = ours.stream()
    assert [stream.push(index) for index in ours.encode("é")[:-1]] == ["", "é"]
    with pytest.raises(ValueError, match="text has no UTF-8 form"):
        ours.encode("\ud800")


def test_bad_files_fail_by_name(files, tmp_path, edit):
    path = tmp_path / "spiece.model"
    content = (files / "spiece.model").read_bytes()
    pieces, _, _ = _parse(content)
    assert len(pieces) == 300
    for damaged in (b"", content[:1000], b"\x0b" + content, b"\xff" * 20, content[:-1]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"spiece.model: cannot be read as a SentencePiece model"):
            Tokenizer.from_preset(tmp_path)
    # Fields that a message repeats count as the last one says: trainer_spec {model_type: BPE}, normalizer_spec {...: 0}
    for extra, said in (
        (b"\x12\x02\x18\x02", "model_type is 2; pyfused reads unigram"),
        (b"\x1a\x02\x18\x00", "add_dummy_prefix is off"),
        (b"\x1a\x02\x20\x00", "remove_extra_whitespaces is off"),
        (b"\x1a\x02\x28\x00", "escape_whitespaces is off"),
        (b"\x12\x03\xc0\x01\x01", "treat_whitespace_as_suffix is on"),
        (b"\x0a\x05\x0a\x03<s>" * 2, "a piece occurs twice"),
        (b"\x1a\x04\x12\x02xy", "spiece.model: "),
    ):
        path.write_bytes(content + extra)
        with pytest.raises(ValueError, match=rf"spiece.model: .*{said}|{said}"):
            Tokenizer.from_preset(tmp_path)
    path.write_bytes(b"\x0a\x05\x0a\x03<s>")
    with pytest.raises(ValueError, match="the model has no unknown piece"):
        Tokenizer.from_preset(tmp_path)
    path.write_bytes(content)
    (tmp_path / "tokenizer_config.json").write_text('{"extra_ids": "many"}')
    with pytest.raises(ValueError, match=r"tokenizer_config.json: extra_ids is 'many'"):
        Tokenizer.from_preset(tmp_path)
    edit(tmp_path / "tokenizer_config.json", extra_ids=3)
    assert Tokenizer.from_preset(tmp_path).vocabulary_size == 303


def test_other_unigram_models_are_refused(files, tmp_path, theirs):
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    raw = json.loads(path.read_text())
    for decoder in (None, {"type": "ByteLevel"}, {"type": "WordPiece"}):
        path.write_text(json.dumps(raw | {"decoder": decoder}))
        with pytest.raises(ValueError, match=r"tokenizer.json: neither byte-level BPE nor a unigram model"):
            Tokenizer.from_preset(tmp_path)
    never = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": True}
    path.write_text(json.dumps(raw | {"decoder": never}))
    with pytest.raises(ValueError, match=r"tokenizer.json: the decoder is .*'never'.*before each text"):
        Tokenizer.from_preset(tmp_path)
    directory = keras_directory(files, tmp_path / "keras")
    (directory / "tokenizer.json").write_text(json.dumps({"class_name": "T5Tokenizer", "config": {"add_bos": True}}))
    with pytest.raises(ValueError, match=r"tokenizer.json: add_bos is on"):
        Tokenizer.from_preset(directory)


def test_it_is_the_tokenizers_library_that_does_the_work(ours):
    assert isinstance(ours.backend, tokenizers.Tokenizer)
