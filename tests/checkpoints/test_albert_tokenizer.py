"""Are ALBERT's ids right where its model has user-defined pieces, as the published ones do? (The rest is tested in
test_encoder_tokenizers.py.)"""

import json
import shutil
from pathlib import Path

import pytest

from pyfused import Tokenizer
from pyfused.checkpoints.sentencepiece import _parse

transformers = pytest.importorskip("transformers")
sentencepiece = pytest.importorskip("sentencepiece")

TEXT = Path(__file__).resolve().parents[1] / "data" / "genesis.txt"
TEXTS = [
    "In the Beginning (God) created the heaven, and the earth.", "x-y. z", 'say ``yes\'\' and "no"', "(a)(b) - £1,000",
    "", " . ", "Naïve CAFÉ – é", "The [MASK] of god. [SEP]",
]  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A directory with a model trained with the pieces of the published ones."""
    folder = tmp_path_factory.mktemp("albert")
    (folder / "text").write_text(TEXT.read_text().lower())
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "spiece"), vocab_size=400, model_type="unigram",
        pad_id=0, unk_id=1, bos_id=-1, eos_id=-1, control_symbols=["[CLS]", "[SEP]", "[MASK]"],
        user_defined_symbols=["(", ")", '"', "-", ".", "–", "£", "€"], minloglevel=2,
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps({"model_type": "albert"}))
    return folder


def test_transformers(files):
    """As from_pretrained makes it of spiece.model where protobuf is installed: it splits at these pieces first."""
    pieces, _, normalizer = _parse((files / "spiece.model").read_bytes())
    whole = [transformers.AddedToken(p.text, normalized=False, special=p.kind == 3) for p in pieces if p.kind in (3, 4)]
    assert len(whole) == 12
    theirs = transformers.AlbertTokenizer(
        vocab=[(piece.text, piece.score) for piece in pieces], additional_special_tokens=whole,
        _spm_precompiled_charsmap=normalizer[2],
    )  # fmt: skip
    ours = Tokenizer.from_preset(files)
    assert (ours.vocabulary_size, ours.end_token_id) == (400, 3)
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs(text)["input_ids"], text
        assert ours.decode(ids) == theirs.decode(ids), text


def test_keras_hub_and_sentencepiece(files, tmp_path):
    """The file alone decides there: no lower case, and user-defined pieces inside words."""
    keras_hub = pytest.importorskip("keras_hub")
    (tmp_path / "assets" / "tokenizer").mkdir(parents=True)
    shutil.copy(files / "spiece.model", tmp_path / "assets" / "tokenizer" / "vocabulary.spm")
    described = {"class_name": "AlbertTokenizer", "config": {"dtype": "int32"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    ours = Tokenizer.from_preset(tmp_path)
    theirs = keras_hub.models.AlbertTokenizer(str(files / "spiece.model"))
    plain = sentencepiece.SentencePieceProcessor(model_file=str(files / "spiece.model"))
    assert ours.vocabulary_size == theirs.vocabulary_size() == 400
    for text in TEXTS[:-1]:
        ids = [int(index) for index in theirs(text)]
        assert ids == plain.encode(text)
        assert ours.encode(text) == [2, *ids, 3], text
    assert ours.encode("LIGHT") != ours.encode("light")
    (tmp_path / "tokenizer.json").write_text(json.dumps(described | {"class_name": "BertTokenizer"}))
    with pytest.raises(
        ValueError, match="the class is 'BertTokenizer'; pyfused reads GPT2Tokenizer, AlbertTokenizer, T5"
    ):
        Tokenizer.from_preset(tmp_path)
