"""Are the tokeniser's files saved with the model, in the format's own form, so that all three libraries give the same ids?"""

import json
import shutil
import warnings

import keras_hub
import pytest
import transformers

from pyfused import AlbertBackbone, Backbone, FNetBackbone, GPT2Backbone, T5Backbone, Tokenizer
from pyfused.checkpoints import convert

TEXTS = ["In the beginning", "And God said, Let there be light: and there was light.", " 12 x  y"]
SIZES = {"num_layers": 1, "hidden_dim": 12, "intermediate_dim": 8}


def ids_of(directory):
    tokenizer = Tokenizer.from_preset(directory)
    return [tokenizer.encode(text) for text in TEXTS]


@pytest.fixture
def silent():
    """Every warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_bpe_both_ways(tmp_path, silent):
    expected = ids_of("gpt2_tiny_en")
    convert("gpt2_tiny_en", tmp_path / "keras", "keras")
    convert(tmp_path / "keras", tmp_path / "hf", "hf")
    convert(tmp_path / "hf", tmp_path / "again", "keras")
    for place in ("keras", "hf", "again"):
        assert ids_of(tmp_path / place) == expected, place
    for file in ("tokenizer.json", "assets/tokenizer/vocabulary.json", "assets/tokenizer/merges.txt"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "keras" / file).read_bytes()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert [theirs.encode(text) for text in TEXTS] == expected
    assert theirs.eos_token == "<|endoftext|>"
    keras = keras_hub.models.GPT2Tokenizer.from_preset(str(tmp_path / "keras"))
    assert [list(map(int, keras(text))) for text in TEXTS] == expected
    task = keras_hub.models.GPT2CausalLM.from_preset(str(tmp_path / "keras"))
    assert task.preprocessor.tokenizer.vocabulary_size() == task.backbone.vocabulary_size


MODELS = {
    "t5": lambda rows: T5Backbone(rows, num_heads=2, **SIZES),
    "fnet": lambda rows: FNetBackbone(rows, **SIZES),
    "albert": lambda rows: AlbertBackbone(rows, num_heads=2, embedding_dim=4, **SIZES),
}
KERAS = {"t5": "T5Tokenizer", "fnet": "FNetTokenizer", "albert": "AlbertTokenizer"}


@pytest.mark.parametrize("name", MODELS)
def test_a_sentencepiece_model_both_ways(tmp_path, golden, name):
    source = golden / ("t5_tokenizer" if name == "t5" else "fnet_tokenizer") / "spiece.model"
    given = tmp_path / "given"
    given.mkdir()
    shutil.copy(source, given)
    options = {
        "tokenizer_class": KERAS[name],
        **({"extra_ids": 0} if name == "t5" else {"do_lower_case": False, "keep_accents": True}),
    }
    (given / "tokenizer_config.json").write_text(json.dumps(options))
    model = MODELS[name](4000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_to_preset(tmp_path / "keras", "keras", tokenizer=given)
        Backbone.from_preset(tmp_path / "keras").save_to_preset(tmp_path / "hf")
    assert (tmp_path / "keras" / "assets" / "tokenizer" / "vocabulary.spm").read_bytes() == source.read_bytes()
    assert (tmp_path / "hf" / "spiece.model").read_bytes() == source.read_bytes()
    written = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert written == options
    assert ids_of(tmp_path / "hf") == ids_of(given)
    keras = getattr(keras_hub.models, KERAS[name]).from_preset(str(tmp_path / "keras"))
    bare = Tokenizer.from_preset(tmp_path / "keras").backend
    for text in TEXTS[:2]:
        assert list(map(int, keras(text))) == bare.encode(text, add_special_tokens=False).ids


def test_what_hugging_face_does_beside_the_model_is_named(tmp_path, golden):
    given = tmp_path / "given"
    given.mkdir()
    shutil.copy(golden / "t5_tokenizer" / "spiece.model", given)
    for name, message in [
        ("t5", "lacks the tokens <extra_id_0>"),
        ("albert", "lower-cases the text and drops accents"),
    ]:
        with pytest.warns(UserWarning, match=message):
            MODELS[name](4000).save_to_preset(tmp_path / name, "keras", tokenizer=given)


@pytest.mark.parametrize("preset", ["t5_tiny_en", "fnet_tiny_en"])
def test_a_unigram_model_in_json_cannot_become_a_keras_one(tmp_path, preset):
    model = MODELS[preset.partition("_")[0]](2048)
    warning = (
        r"the tokeniser is not saved: .* reads a SentencePiece model, and a Unigram model in JSON cannot become one"
    )
    with (
        pytest.warns(UserWarning, match=warning),
        pytest.raises(ValueError, match="has no tokeniser that can be saved"),
    ):
        model.save_to_preset(tmp_path / "keras", "keras", tokenizer=preset)
    assert not any(tmp_path.iterdir())
    model.save_to_preset(tmp_path / "hf", tokenizer=preset)
    assert ids_of(tmp_path / "hf") == ids_of(preset)
    model = Backbone.from_preset(tmp_path / "hf", **({"pooler": True} if preset == "fnet" else {}))
    with pytest.warns(UserWarning, match=warning):  # the preset's own is left out, and the model saved
        model.save_to_preset(tmp_path / "keras", "keras")
    assert not (tmp_path / "keras" / "tokenizer.json").exists()


def test_which_tokeniser_is_saved(tmp_path, silent):
    model = GPT2Backbone.from_preset("gpt2_tiny_en")
    model.save_to_preset(tmp_path / "own")
    assert ids_of(tmp_path / "own") == ids_of("gpt2_tiny_en")
    config = json.loads((tmp_path / "own" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, 0)  # of the tokeniser, in the preset's configuration
    model.save_to_preset(tmp_path / "none", tokenizer=False)
    assert not (tmp_path / "none" / "tokenizer.json").exists()
    GPT2Backbone(9, 1, 2, 4, 4).save_to_preset(tmp_path / "new")
    assert not (tmp_path / "new" / "tokenizer.json").exists()

    GPT2Backbone(9, 1, 2, 4, 4).save_to_preset(tmp_path / "new", tokenizer=Tokenizer.from_preset("gpt2_tiny_en"))
    assert ids_of(tmp_path / "new") == ids_of("gpt2_tiny_en")


def test_a_tokeniser_of_another_family_is_not_converted(tmp_path, golden):
    """KerasHub could not load the files; transformers would take them for another kind."""
    gpt2, t5 = GPT2Backbone(9, 1, 2, 4, 4), MODELS["t5"](9)
    given = tmp_path / "pieces"
    given.mkdir()
    shutil.copy(golden / "t5_tokenizer" / "spiece.model", given)
    convert("gpt2_tiny_en", tmp_path / "bpe", "keras")
    t5.save_to_preset(tmp_path / "keras", "keras")
    (tmp_path / "keras" / "assets" / "tokenizer").mkdir(parents=True)
    shutil.copy(given / "spiece.model", tmp_path / "keras" / "assets" / "tokenizer" / "vocabulary.spm")
    for model, format, source, message in [
        (gpt2, "keras", given, "it is a SentencePiece model, and GPT2Tokenizer takes byte-level BPE"),
        (t5, "keras", "gpt2_tiny_en", "it is byte-level BPE, and T5Tokenizer takes a SentencePiece model"),
        (gpt2, "keras", "t5_tiny_en", "KerasHub's GPT2Tokenizer takes byte-level BPE, and this is a Unigram model"),
        (gpt2, "hf", tmp_path / "keras", "it is a SentencePiece model, and GPT2Tokenizer takes byte-level BPE"),
        (t5, "hf", tmp_path / "bpe", "it is byte-level BPE, and T5Tokenizer takes a SentencePiece model"),
    ]:
        with (
            pytest.warns(UserWarning, match=message),
            pytest.raises(ValueError, match="no tokeniser that can be saved"),
        ):
            model.save_to_preset(tmp_path / "saved", format, tokenizer=source)


def test_bpe_that_is_not_gpt2s_is_left_out(tmp_path, edit):
    convert("gpt2_tiny_en", tmp_path / "given", "hf")
    described = json.loads((tmp_path / "given" / "tokenizer.json").read_text())
    model = {
        **described["model"],
        "vocab": {k: v for k, v in described["model"]["vocab"].items() if k != "<|endoftext|>"},
    }
    for changes, message in [
        ({"normalizer": {"type": "Lowercase"}}, "splits or rewrites text in another way"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "splits or rewrites text in another way"),
        ({"model": model, "added_tokens": []}, r"needs the token <\|endoftext\|>"),
    ]:
        (tmp_path / "given" / "tokenizer.json").write_text(json.dumps(described | changes))
        with pytest.warns(UserWarning, match=message):
            convert(tmp_path / "given", tmp_path / "keras", "keras")
    edit(tmp_path / "given" / "tokenizer.json", model={"type": "BPE", "vocab": {}})
    with pytest.raises(ValueError, match=r"tokenizer.json: cannot be read as a tokenizer: KeyError: 'merges'"):
        convert(tmp_path / "given", tmp_path / "keras", "keras")
