"""Are ALBERT's ids, of one text and of two, those of transformers, KerasHub and SentencePiece?"""

import json
import random
import shutil
from pathlib import Path

import pytest
import tokenizers

from pyfused.checkpoints import load_tokenizer
from pyfused.checkpoints.sentencepiece import _parse

transformers = pytest.importorskip("transformers")

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
TEXTS = [
    "In the Beginning (God) created the heaven, and the earth.", " Hello World", "", "  two  spaces   here ", "    ",
    "tab\tsep\r\nwin\n", "ﬁne ½ ² Ａ\u00a0nbsp\u3000wide", "Naïve CAFÉ e\u0301 ÅΩ 日本語", "a" * 300, "x-y. z",
    "evening,and  the morning", "\u2581low", "emoji 🙂", "say ``yes'' and \"no\"", "1,000, 20,", "!!!...??",
]  # fmt: skip
SPECIAL = ["a[SEP]b", "The [MASK] of god", "<pad> light", "[CLS][CLS]", "x <unk> y [SEP]"]


def made(folder, **options):
    """As from_pretrained makes it of spiece.model where protobuf is installed: pieces, scores, and what is not split."""
    pieces, _, normalizer = _parse((folder / "spiece.model").read_bytes())
    whole = [transformers.AddedToken(p.text, normalized=False, special=p.kind == 3) for p in pieces if p.kind in (3, 4)]
    return transformers.AlbertTokenizer(
        vocab=[(piece.text, piece.score) for piece in pieces], additional_special_tokens=whole,
        _spm_precompiled_charsmap=normalizer[2], **options,
    )  # fmt: skip


@pytest.fixture
def files():
    return GOLDEN / "albert_tokenizer"


def texts(count=150):
    generator = random.Random(0)
    kinds = (lambda: generator.randrange(32, 127), lambda: generator.randrange(0xD7FF), lambda: 32, lambda: 0xC9)
    return ["".join(chr(generator.choice(kinds)()) for _ in range(generator.randrange(40))) for _ in range(count)]


@pytest.mark.parametrize(
    "options",
    [{}, {"do_lower_case": False}, {"keep_accents": True}, {"do_lower_case": False, "keep_accents": True}],
    ids=lambda options: "-".join(options) or "default",
)
def test_transformers(files, tmp_path, options):
    directory = shutil.copytree(files, tmp_path / "files")
    (directory / "tokenizer_config.json").write_text(json.dumps(options | {"tokenizer_class": "AlbertTokenizer"}))
    ours, theirs = load_tokenizer(directory), made(files, **options)
    assert (ours.vocabulary_size, ours.end_token_id) == (400, 3)
    for text in TEXTS + SPECIAL + texts():
        ids = ours.encode(text)
        assert ids == theirs(text)["input_ids"], text
        assert ours.decode(ids) == theirs.decode(ids), text
        assert (ids[0], ids[-1]) == (2, 3)


def test_two_texts(files):
    ours, theirs = load_tokenizer(files), made(files)
    for first, second in zip(TEXTS, reversed(TEXTS + SPECIAL)):
        ids, segments = ours.encode_pair(first, second)
        found = theirs(first, second, return_token_type_ids=True)
        assert (ids, segments) == (found["input_ids"], found["token_type_ids"])
    assert ours.encode_pair("god", "light") == ([2, *ours.encode("god")[1:], *ours.encode("light")[1:]], [0, 0, 0, 1, 1])
    with pytest.raises(TypeError, match="text must be str, got int"):
        ours.encode_pair("a", 3)
    for other in ("t5_tokenizer", "gpt2_tokenizer"):
        with pytest.raises(ValueError, match=r"this tokenizer takes one text: it has no template for two, with \[SEP\]"):
            load_tokenizer(GOLDEN / other).encode_pair("a", "b")


def test_tokenizer_json(files, tmp_path):
    """As transformers saves it, which is how most repositories have it."""
    ours, theirs = load_tokenizer(files), made(files)
    theirs.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    saved = load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    bare = load_tokenizer(tmp_path)
    for tokenizer in (saved, bare):
        assert (tokenizer.vocabulary_size, tokenizer.end_token_id) == (400, 3)
        for text in TEXTS + SPECIAL:
            ids = ours.encode(text)
            assert tokenizer.encode(text) == ids
            assert tokenizer.decode(ids) == ours.decode(ids)
        assert tokenizer.encode_pair("god", "light") == ours.encode_pair("god", "light")


def keras_directory(files, directory, name="AlbertTokenizer"):
    (directory / "assets" / "tokenizer").mkdir(parents=True)
    shutil.copy(files / "spiece.model", directory / "assets" / "tokenizer" / "vocabulary.spm")
    (directory / "tokenizer.json").write_text(json.dumps({"class_name": name, "config": {"dtype": "int32"}}))
    return directory


def test_keras_hub_and_sentencepiece(files, tmp_path):
    """The file alone decides there: no lower case, and nothing that a text could write out."""
    keras_hub = pytest.importorskip("keras_hub")
    sentencepiece = pytest.importorskip("sentencepiece")
    ours = load_tokenizer(keras_directory(files, tmp_path))
    theirs = keras_hub.models.AlbertTokenizer(str(files / "spiece.model"))
    plain = sentencepiece.SentencePieceProcessor(model_file=str(files / "spiece.model"))
    assert ours.vocabulary_size == theirs.vocabulary_size() == 400
    assert (theirs.cls_token_id, theirs.sep_token_id) == (2, 3)
    for text in TEXTS:
        ids = [int(index) for index in theirs(text)]
        assert ids == plain.encode(text)
        assert ours.encode(text) == [2, *ids, 3], text
    assert ours.encode("LIGHT") != ours.encode("light")


def test_other_classes_of_keras_are_refused(files, tmp_path):
    with pytest.raises(ValueError, match="the class is 'BertTokenizer'; pyfused reads GPT2Tokenizer, AlbertTokenizer"):
        load_tokenizer(keras_directory(files, tmp_path, "BertTokenizer"))


def test_bad_options(files, tmp_path):
    directory = shutil.copytree(files, tmp_path / "files")
    (directory / "tokenizer_config.json").write_text('{"do_lower_case": "yes"}')
    with pytest.raises(ValueError, match=r"tokenizer_config.json: do_lower_case is 'yes'; it takes true or false"):
        load_tokenizer(directory)


def test_it_is_the_tokenizers_library_that_does_the_work(files):
    assert isinstance(load_tokenizer(files).backend, tokenizers.Tokenizer)
