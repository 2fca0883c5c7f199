"""Are ids and texts those of transformers on 500 difficult strings, alone, in pairs, cut, padded and streamed?"""

import re
import shutil
import warnings
from pathlib import Path

import pytest
import transformers
from test_encoder_tokenizers import CASED
from text_cases import texts

from pyfused import Tokenizer
from pyfused.checkpoints.presets import bundled_presets
from pyfused.checkpoints.sentencepiece import _parse
from pyfused.checkpoints.tokenizer_save import tokenizer_files
from pyfused.families import FAMILIES as FAMILY_ROWS

GOLDEN = Path(__file__).resolve().parent.parent / "golden"

SEED = 0
TEXTS = texts(SEED)
FAMILIES = "gpt2", "t5", "albert", "fnet"
MASKED = {"gpt2": "padding_mask", "t5": "encoder_padding_mask", "albert": "padding_mask"}


def from_golden(family, golden, folder):
    """A folder as repositories have it, and transformers' own class for it."""
    source = golden / f"{'fnet' if family == 'albert' else family}_tokenizer"
    shutil.copytree(source, folder, dirs_exist_ok=True)
    (folder / "config.json").write_text(f'{{"model_type": "{family}"}}')
    if family == "fnet":
        # transformers 5.23 reads FNet's file without [CLS] and [SEP], and drops case; its constructor, given all, does neither
        pieces, _, normalizer = _parse((source / "spiece.model").read_bytes())
        vocab = [(piece.text, piece.score) for piece in pieces]
        return transformers.FNetTokenizer(vocab=vocab, _spm_precompiled_charsmap=normalizer.get(2) or None, **CASED)
    cls = {"gpt2": transformers.GPT2Tokenizer, "t5": transformers.T5Tokenizer, "albert": transformers.AlbertTokenizer}
    return cls[family].from_pretrained(folder)


def from_keras(golden, folder):
    """KerasHub's folder for the vocabulary of `from_golden`'s T5."""
    (folder / "assets" / "tokenizer").mkdir(parents=True)
    shutil.copy(golden / "t5_tokenizer" / "spiece.model", folder / "assets" / "tokenizer" / "vocabulary.spm")
    (folder / "tokenizer.json").write_text('{"class_name": "T5Tokenizer", "config": {"dtype": "int32"}}')
    return transformers.T5Tokenizer.from_pretrained(golden / "t5_tokenizer", extra_ids=0)


@pytest.fixture(scope="module", params=[*(f"golden {f}" for f in FAMILIES), *(f"bundled {f}" for f in FAMILIES)])
def pair(request, tmp_path_factory):
    """(pyfused's tokeniser, transformers')"""
    where, family = request.param.split()
    print(f"texts(seed={SEED})")
    if where == "golden":
        folder = tmp_path_factory.mktemp(family)
        theirs = from_golden(family, GOLDEN, folder)
        return Tokenizer.from_preset(folder), theirs
    folder = bundled_presets()[f"{family}_tiny_en"]
    names = {"gpt2": {}, "t5": {"pad_token": "<pad>", "eos_token": "</s>"}}.get(family, {"pad_token": "<pad>"})
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **names)
    if family == "t5":  # T5Tokenizer's own, whatever the file says
        theirs.backend_tokenizer.post_processor = transformers.T5Tokenizer().backend_tokenizer.post_processor
    return Tokenizer.from_preset(folder), theirs


def expected_batch(theirs, ours, *given, **options):
    """transformers' tensors under the names of pyfused's backbones."""
    options = {"return_attention_mask": True, "return_token_type_ids": True, "return_tensors": "pt"} | options
    if theirs.pad_token is None:
        theirs.pad_token = ours.pad_token
    found = theirs(*given, **options)
    ids = "encoder_token_ids" if ours.family == "t5" else "token_ids"
    result = {ids: found["input_ids"]}
    if ours.family in ("albert", "fnet"):
        result["segment_ids"] = found["token_type_ids"]
    if ours.family in MASKED:
        result[MASKED[ours.family]] = found["attention_mask"].bool()
    return result


def check_batch(found, expected, *, about):
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape)
        wrong = (tensor != expected[name]).any(1).nonzero().flatten().tolist()
        assert not wrong, (name, wrong[0], about[wrong[0]])


def test_ids_and_texts(pair):
    ours, theirs = pair
    expected = theirs(TEXTS)["input_ids"]
    bare = theirs(TEXTS, add_special_tokens=False)["input_ids"]
    assert len(TEXTS) == 500
    for text, ids, alone in zip(TEXTS, expected, bare):
        assert ours.encode(text) == ids, text
        assert ours.encode(text, add_special_tokens=False) == alone, text
        assert ours.decode(ids) == theirs.decode(ids), text
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True), text


def test_streams(pair):
    """The pieces are whole characters, and together what decode gives."""
    ours, _ = pair
    for skip in (False, True):
        stream = ours.stream(skip_special_tokens=skip)
        for text in TEXTS:
            ids = ours.encode(text)
            whole = ours.decode(ids, skip_special_tokens=skip)
            pieces = [stream.push(index) for index in ids]
            assert "".join(pieces) + stream.finish() == whole, text
            assert "".join(pieces).count("\ufffd") == whole.count("\ufffd")


@pytest.mark.parametrize("side", ["right", "left"])
def test_batches(pair, side):
    ours, theirs = pair
    batch = [text for text in TEXTS if len(text) < 150]
    assert len(batch) > 250
    for given in ([batch], [batch, batch[::-1]]):
        expected = expected_batch(theirs, ours, *given, padding=True, padding_side=side)
        check_batch(ours(*given, side=side), expected, about=batch)


@pytest.mark.parametrize("side, max_length", [("right", 7), ("left", 33)])
@pytest.mark.parametrize("strategy", ["longest_first", "only_first", "only_second"])
def test_truncation(pair, strategy, side, max_length):
    ours, theirs = pair
    theirs.truncation_side = side
    options = {"max_length": max_length, "padding": "max_length", "truncation": strategy}
    short = [text for text in TEXTS if len(text) < 60][:100]
    first, second = short[::2], short[1::2]
    fits = []
    for a, b in zip(first, second):  # where transformers can cut the one text far enough
        try:
            theirs([a], [b], **options)
            fits.append((a, b))
        except Exception:  # the library raises bare ones
            with pytest.raises(ValueError, match=rf"texts\[0\]: truncation is '{strategy}', and without the"):
                ours([a], [b], **options, truncation_side=side)
    assert len(fits) == 50 if strategy == "longest_first" else len(fits) >= 3
    given = [list(column) for column in zip(*fits)]
    check_batch(
        ours(*given, **options, truncation_side=side), expected_batch(theirs, ours, *given, **options), about=fits
    )
    if strategy != "only_second":
        options["add_special_tokens"] = False
        expected = expected_batch(theirs, ours, short, **options)
        check_batch(ours(short, **options, truncation_side=side), expected, about=short)


def test_keras_folder(golden, tmp_path):
    theirs = from_keras(golden, tmp_path)
    ours = Tokenizer.from_preset(tmp_path)
    plain = [text for text in TEXTS if "<extra_id_" not in text]
    assert len(plain) > 400
    for text, ids in zip(plain, theirs(plain)["input_ids"]):
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == theirs.decode(ids), text


@pytest.mark.parametrize("family", ["gpt2", "albert", "fnet"])
def test_folders_that_became_keras_ones(family, golden, tmp_path):
    """KerasHub's tokenisers neither change quotes nor, for ALBERT, case and accents: texts without them are compared."""
    source, folder = tmp_path / "hf", tmp_path / "keras"
    theirs = from_golden(family, golden, source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about case
        files = tokenizer_files(source, "keras", FAMILY_ROWS[family])
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    ours = Tokenizer.from_preset(folder)
    same = {
        "gpt2": lambda text: True,
        "albert": lambda text: text.isascii() and text == text.lower() and not re.search("``|''", text),
        "fnet": lambda text: not re.search("``|''", text),
    }
    compared = [text for text in TEXTS if same[family](text)]
    assert len(compared) >= {"gpt2": 500, "albert": 30, "fnet": 200}[family]
    for text, ids in zip(compared, theirs(compared)["input_ids"]):
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == theirs.decode(ids), text


def test_lone_surrogates(pair):
    """transformers raises a TypeError about its own types. Here the text is named."""
    ours, theirs = pair
    for text in ("\ud800", "a\udfff", "\udc41\ud83d", "🙂\ud83d"):
        with pytest.raises(TypeError):
            theirs(text)
        with pytest.raises(ValueError, match=r"text has no UTF-8 form: .*surrogates not allowed"):
            ours.encode(text)
        with pytest.raises(ValueError, match=r"texts\[1\] has no UTF-8 form"):
            ours(["a", text])
