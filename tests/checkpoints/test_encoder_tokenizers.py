"""Are the ids of ALBERT's and FNet's tokenisers those of transformers, KerasHub and SentencePiece, for one text and two?"""

import json
import shutil
from pathlib import Path

import pytest

from pyfused import Tokenizer
from pyfused.checkpoints.sentencepiece import _parse

transformers = pytest.importorskip("transformers")

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
TEXTS = [
    "In the beginning God created the heaven and the earth.", " Hello world", "", "  two  spaces   here ", "    ",
    "tab\tsep\r\nwin\n", "ﬁne ½ ² Ａ\u00a0nbsp\u3000wide", "naïve CAFÉ e\u0301 日本語", "a" * 300, "x y", "1,234, and 9,",
    "evening,and  the morning", "\u2581low", "emoji 🙂", "``quoted'' text", "[CLS", "!!!...??", "İstanbul ẞ",
]  # fmt: skip
SPECIAL = ["a[SEP]b", "The [MASK] of [MASK].", "<pad> light", "[MASK][MASK]", "x <unk> y[CLS]", "[mask]"]
CASED = {"do_lower_case": False, "keep_accents": True}


def field(number, value):
    """A field of bytes, as protocol buffers write it."""
    size, length = len(value), b""
    while size > 127:
        length, size = length + bytes([size & 127 | 128]), size >> 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + value


def encode_pair(tokenizer, first, second):
    """(ids, segment ids) of two texts."""
    found = tokenizer(first, pair=second)
    return found["token_ids"][0].tolist(), found["segment_ids"][0].tolist()


@pytest.fixture(scope="module", params=["identity", "nmt_nfkc"])
def model(request, tmp_path_factory):
    """The model file, as it is and with the normalisation of published ones."""
    path = tmp_path_factory.mktemp(request.param) / "spiece.model"
    content = (GOLDEN / "fnet_tokenizer" / "spiece.model").read_bytes()
    if request.param == "nmt_nfkc":
        charsmap = _parse((GOLDEN / "t5_tokenizer" / "spiece.model").read_bytes())[2][2]
        content += field(3, field(2, charsmap))
    path.write_bytes(content)
    return path


@pytest.fixture(scope="module", params=["fnet", "albert", "albert cased"])
def pair(request, model, tmp_path_factory):
    """(a directory as repositories have it, transformers' tokeniser made of the pieces as SentencePiece gives them)."""
    kind, _, cased = request.param.partition(" ")
    directory = tmp_path_factory.mktemp("files")
    shutil.copy(model, directory)
    (directory / "config.json").write_text(json.dumps({"model_type": kind}))
    if cased:
        (directory / "tokenizer_config.json").write_text(json.dumps(CASED))
    source = pytest.importorskip("sentencepiece").SentencePieceProcessor(model_file=str(model))
    made = transformers.FNetTokenizer if kind == "fnet" else transformers.AlbertTokenizer
    return directory, made(
        vocab=[(source.id_to_piece(i), source.get_score(i)) for i in range(len(source))],
        _spm_precompiled_charsmap=_parse(model.read_bytes())[2].get(2) or None,
        **(CASED if kind == "fnet" or cased else {}),
    )


def test_transformers(pair):
    directory, theirs = pair
    ours = Tokenizer.from_preset(directory)
    assert (ours.vocabulary_size, ours.end_token_id, ours.encode("")) == (300, 3, [2, 3])
    for text in TEXTS + SPECIAL:
        ids = ours.encode(text)
        assert ids == theirs(text)["input_ids"], text
        assert ours.decode(ids) == theirs.decode(ids), text


def test_pairs(pair):
    directory, theirs = pair
    ours = Tokenizer.from_preset(directory)
    for first, second in zip(
        TEXTS, [*SPECIAL, *filter(None, TEXTS)]
    ):  # transformers takes an empty second text for none
        expected = theirs(first, second, return_token_type_ids=True)
        assert encode_pair(ours, first, second) == (expected["input_ids"], expected["token_type_ids"])
    assert encode_pair(ours, "", "") == ([2, 3, 3], [0, 0, 1])
    ids, segments = encode_pair(ours, "God", "light")
    assert (ids.count(3), sum(segments), ids[0]) == (2, len(ours.encode("light")) - 1, 2)
    with pytest.raises(TypeError, match=r"pair\[1\] must be str, got NoneType"):
        ours(["a", "b"], pair=["a", None])


def test_tokenizer_json(pair, tmp_path):
    """As transformers saves it, which is how most repositories have it."""
    directory, theirs = pair
    theirs.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    saved, ours = Tokenizer.from_preset(tmp_path), Tokenizer.from_preset(directory)
    assert (saved.vocabulary_size, saved.end_token_id) == (300, 3)
    for text in TEXTS + SPECIAL:
        assert saved.encode(text) == ours.encode(text)
        assert encode_pair(saved, text, "and") == encode_pair(ours, text, "and")
        assert saved.decode(saved.encode(text)) == ours.decode(ours.encode(text))


@pytest.mark.parametrize("name", ["FNet", "Albert"])
def test_keras_hub(model, tmp_path, name):
    """Its tokeniser gives the pieces alone; [CLS] and [SEP] come from its preprocessor."""
    keras_hub = pytest.importorskip("keras_hub")
    pytest.importorskip("sentencepiece")
    (tmp_path / "assets" / "tokenizer").mkdir(parents=True)
    shutil.copy(model, tmp_path / "assets" / "tokenizer" / "vocabulary.spm")
    described = {"class_name": f"{name}Tokenizer", "config": {"dtype": "int32"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    ours, theirs = Tokenizer.from_preset(tmp_path), getattr(keras_hub.models, f"{name}Tokenizer")(str(model))
    assert ours.vocabulary_size == theirs.vocabulary_size() == 300
    assert ours.end_token_id == theirs.sep_token_id
    # Without rules of its own the model knows one space; the `tokenizers` library, as transformers uses it, knows them all
    plain = [text for text in TEXTS if text.split() == text.split(" ") and "\u2581" not in text]
    assert len(plain) >= 10
    for text in TEXTS if model.parent.name.startswith("nmt") else plain:
        ids = [int(index) for index in theirs(text)]
        assert ours.encode(text) == [theirs.cls_token_id, *ids, theirs.sep_token_id], text


def test_published_fnet_puts_the_unknown_piece_first(tmp_path):
    """Ids of <unk>, <s>, </s>, <pad>, [CLS], [SEP], [MASK]: 0 to 6, as SentencePiece makes them by default."""
    sentencepiece = pytest.importorskip("sentencepiece")
    text = Path(__file__).resolve().parents[1] / "data" / "genesis.txt"
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "spiece"), vocab_size=200, model_type="unigram", pad_id=3,
        control_symbols=["[CLS]", "[SEP]", "[MASK]"], normalization_rule_name="identity", minloglevel=2,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "fnet"}))
    ours = Tokenizer.from_preset(tmp_path)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    assert (ours.encode(""), ours.encode("日")[-2]) == ([4, 5], 0)
    for line in [*TEXTS[:4], "日本語 and light", "a [x] b"]:
        assert ours.encode(line) == [4, *theirs.encode(line), 5]
    ours.backend.save(str(tmp_path / "tokenizer.json"))
    again = Tokenizer.from_preset(tmp_path)  # the files have </s> too, which ends no text
    assert (again.end_token_id, encode_pair(again, "a", "b")) == (5, encode_pair(ours, "a", "b"))


def test_refused_by_name(tmp_path, edit):
    shutil.copy(GOLDEN / "fnet_tokenizer" / "spiece.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": "yes"}')
    with pytest.raises(ValueError, match=r"tokenizer_config.json: do_lower_case is 'yes'; it takes true or false"):
        Tokenizer.from_preset(tmp_path)
    edit(tmp_path / "tokenizer_config.json", do_lower_case=False, keep_accents=1)
    with pytest.raises(ValueError, match=r"tokenizer_config.json: keep_accents is 1"):
        Tokenizer.from_preset(tmp_path)
