"""Are the files beside a vocabulary read as transformers reads them: added tokens with flags, names, limits, old forms?"""

import json
import shutil
from pathlib import Path

import pytest
import transformers

from pyfused import Tokenizer

GOLDEN = Path(__file__).resolve().parent.parent / "golden"

TEXTS = [
    "a <new>  b", "a  <new>b", "<new><new>", "x<new>y", "X<NEW>Y", "a [PAD] b[MASK] c  [MASK]  d", "word<w>word <w> word.",
    " lead <new>", "<|endoftext|>", "Ⓝ<ℕ> <N>", "",
]  # fmt: skip
FLAGS = [
    {}, {"lstrip": True}, {"rstrip": True}, {"lstrip": True, "rstrip": True}, {"single_word": True}, {"normalized": True},
    {"special": False}, {"special": False, "normalized": True, "lstrip": True},
]  # fmt: skip


def flagged(content, **flags):
    usual = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    return {"content": content, **usual, **flags}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """{"pairs": vocab.json and merges.txt, "described": tokenizer.json, "model": spiece.model} of small vocabularies"""
    folder = tmp_path_factory.mktemp("sources")
    from pyfused.checkpoints.presets import bundled_presets

    described = folder / "described"
    shutil.copytree(bundled_presets()["gpt2_tiny_en"], described, ignore=shutil.ignore_patterns("*.safetensors"))
    pairs = folder / "pairs"
    pairs.mkdir()
    raw = json.loads((described / "tokenizer.json").read_text())
    (pairs / "vocab.json").write_text(json.dumps(raw["model"]["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in raw["model"]["merges"]]
    (pairs / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    shutil.copy(described / "config.json", pairs)
    model = folder / "model"
    shutil.copytree(GOLDEN / "fnet_tokenizer", model)
    (model / "config.json").write_text('{"model_type": "albert"}')
    return {"pairs": pairs, "described": described, "model": model}


@pytest.fixture(params=["pairs", "described", "model"])
def folder(request, sources, tmp_path):
    return shutil.copytree(sources[request.param], tmp_path / request.param)


def theirs_of(folder):
    made = transformers.AlbertTokenizer if folder.name == "model" else transformers.GPT2Tokenizer
    return made.from_pretrained(folder)


def compare(folder):
    ours, theirs = Tokenizer.from_preset(folder), theirs_of(folder)
    assert len(ours) == len(theirs)
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == theirs.decode(ids), text
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True), text
    for name in ("bos", "eos", "unk", "sep", "cls", "mask"):
        assert getattr(ours, f"{name}_token") == getattr(theirs, f"{name}_token"), name
        assert getattr(ours, f"{name}_token_id") == getattr(theirs, f"{name}_token_id"), name
    assert ours.pad_token == (theirs.pad_token or ours.eos_token)
    return ours


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_added_tokens_decoder(folder, flags):
    """As transformers has written it since 4.34."""
    size = len(theirs_of(folder))
    word = flagged("<w>", single_word="single_word" not in flags, special=False)
    added = {str(size): flagged("<new>", **flags), str(size + 1): word}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    ours = compare(folder)
    assert ours.token_to_id("<new>") == size
    assert (size in ours.special_ids) == flags.get("special", True)


def test_files_before_4_34(folder):
    size = len(theirs_of(folder))
    (folder / "added_tokens.json").write_text(json.dumps({"<new>": size, "[PAD]": size + 1}))
    mask = {"content": "[MASK]", "lstrip": True, "rstrip": False, "normalized": False, "single_word": False}
    named = {"pad_token": "[PAD]"} | ({"mask_token": mask} if folder.name == "model" else {})
    (folder / "special_tokens_map.json").write_text(json.dumps(named))
    (folder / "tokenizer_config.json").write_text(json.dumps({"max_len": 77}))
    ours = compare(folder)
    assert (ours.pad_token_id, ours.model_max_length) == (size + 1, 77)
    assert {size + 1} <= ours.special_ids
    assert size not in ours.special_ids


def test_names_and_further_tokens(folder):
    config = {"pad_token": "[PAD]", "additional_special_tokens": ["<new>", "<w>"], "model_max_length": 1e30}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert compare(folder).model_max_length is None


def test_flags_over_those_of_tokenizer_json(sources, tmp_path):
    folder = shutil.copytree(sources["described"], tmp_path / "described")
    config = {"added_tokens_decoder": {"0": flagged("<|endoftext|>", lstrip=True)}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ours = compare(folder)
    assert ours.encode("a  <|endoftext|>")[-1] == 0
    assert len(ours.encode("a  <|endoftext|>")) == len(ours.encode("a")) + 1


@pytest.mark.parametrize("value", [True, False, None])
def test_prefix_space(sources, tmp_path, value):
    """GPT-2's class decides by tokenizer_config.json, whatever tokenizer.json says."""
    folder = shutil.copytree(sources["described"], tmp_path / "described")
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["pre_tokenizer"]["add_prefix_space"] = value is not True
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    config = {} if value is None else {"add_prefix_space": value}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    compare(folder)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    fast = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    assert Tokenizer.from_preset(folder).encode("light") == fast("light")["input_ids"]


def test_sides_and_length_of_the_files(sources, tmp_path):
    folder = shutil.copytree(sources["pairs"], tmp_path / "pairs")
    config = {"padding_side": "left", "truncation_side": "left", "model_max_length": 5}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_preset(folder)
    found = tokenizer(["In the beginning God created the heaven and the earth", "light"], truncation=True)
    ids = tokenizer.encode("In the beginning God created the heaven and the earth")
    assert found["token_ids"][0].tolist() == ids[-5:]
    assert found["padding_mask"][1].tolist()[0] is False


def test_t5_model_with_cls_pieces(sources, tmp_path):
    """Japanese GPT-2s have T5's tokeniser, and [CLS] in its model. Their class, not the pieces, says what surrounds a text."""
    folder = shutil.copytree(sources["model"], tmp_path / "model")
    for name, value in (("config", {"model_type": "gpt2"}), ("tokenizer_config", {"tokenizer_class": "T5Tokenizer"})):
        (folder / f"{name}.json").write_text(json.dumps(value | ({"extra_ids": 0} if name != "config" else {})))
    with pytest.raises(ValueError, match=r"the model has no unknown piece or no '</s>'"):
        Tokenizer.from_preset(folder)  # this one lacks </s>, so no more can be said of it


def test_an_unknown_model(sources, tmp_path):
    folder = shutil.copytree(sources["model"], tmp_path / "model")
    (folder / "config.json").unlink()
    tokenizer = Tokenizer.from_preset(folder)
    assert tokenizer.family is None
    assert tokenizer.encode("light")[0] == tokenizer.cls_token_id
    with pytest.raises(ValueError, match=r"no file names the model, so its inputs are unknown; put its config.json"):
        tokenizer(["light"])
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "AlbertTokenizerFast"}')
    assert {*Tokenizer.from_preset(folder)(["light"])} == {"token_ids", "segment_ids", "padding_mask"}


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("tokenizer_config", {"added_tokens_decoder": []}, "added_tokens_decoder is .*it takes an object"),
        ("tokenizer_config", {"added_tokens_decoder": {"x": {}}}, "added_tokens_decoder has 'x'"),
        ("tokenizer_config", {"added_tokens_decoder": {"9": {"content": 3}}}, "added_tokens_decoder is .*takes a token"),
        ("tokenizer_config", {"added_tokens_decoder": {"9000": flagged("<new>")}}, "'<new>' has the id 9000; the vocab"),
        ("tokenizer_config", {"pad_token": 3}, "pad_token is 3; it takes a token or null"),
        ("tokenizer_config", {"pad_token": flagged("a", lstrip=1)}, "pad_token's lstrip is 1; it takes true or false"),
        ("tokenizer_config", {"additional_special_tokens": "<a>"}, "additional_special_tokens is '<a>'; it takes a list"),
        ("tokenizer_config", {"padding_side": "up"}, "padding_side is 'up'; it takes 'left' or 'right'"),
        ("tokenizer_config", {"model_max_length": "many"}, "model_max_length is 'many'"),
        ("added_tokens", {"<new>": "1"}, "added_tokens.json: token '<new>' has the id '1'"),
        ("added_tokens", {"<new>": 2050}, "'<new>' has the id 2050; the vocabulary gives it"),
        ("special_tokens_map", {"eos_token": "<end>"}, "'<end>'"),
    ],
)  # fmt: skip
def test_refused_by_name(folder, name, content, said):
    (folder / f"{name}.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=said):
        Tokenizer.from_preset(folder)
