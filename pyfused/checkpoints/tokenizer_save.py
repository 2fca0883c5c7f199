"""Which files of a tokeniser go with a saved checkpoint, and how do those of one format become those of the other?

Byte-level BPE is a vocabulary and a list of merges in both formats. A SentencePiece model is the same file under another name.
What cannot be converted is left out with a warning that says what and why.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pyfused.checkpoints.files import json_bytes, note, read_json
from pyfused.checkpoints.part_names import TOKENIZER
from pyfused.checkpoints.tokenizer_files import model_kind
from pyfused.families import Family

_ASSETS = "assets/tokenizer"
_END_OF_TEXT = "<|endoftext|>"  # the one special token of KerasHub's GPT2Tokenizer
_AS_IN_KERAS: dict[str, Any] = {"do_lower_case": False, "keep_accents": True}
_PIECES: dict[str, dict[str, Any]] = {"albert": _AS_IN_KERAS, "fnet": _AS_IN_KERAS, "t5": {"extra_ids": 0}}
_PIECES_IN_KERAS = {"proto": None, "sequence_length": None, "add_bos": False, "add_eos": False}


def tokenizer_files(source: Path, format: str, family: Family) -> dict[str, bytes]:
    """The files to write, by their paths in the new directory: those of ``source``, converted if it has the other format. Empty
    if there are none, or if they cannot be converted, which causes a warning.

    format: "hf" or "keras", of the new directory. Raises ValueError naming the file if one is damaged.
    """
    held = [name for name in TOKENIZER if (source / name).is_file()]
    described = read_json(source / "tokenizer.json") if "tokenizer.json" in held else {}
    is_keras = any(name.startswith(_ASSETS) for name in held) and "model" not in described
    if is_keras == (format == "keras") or not held:
        wanted = [name for name in held if is_keras == name.startswith(_ASSETS) or name == "tokenizer.json"]
        return {name: (source / name).read_bytes() for name in wanted}
    if is_keras:
        return _hf_from_keras(source, described.get("config") or {}, family)
    return _keras_from_hf(source, described, family)


def _hf_from_keras(source: Path, config: dict[str, Any], family: Family) -> dict[str, bytes]:
    options: dict[str, Any] = {"tokenizer_class": f"{family.keras_name}Tokenizer"}
    assets = source / _ASSETS
    pieces = (assets / "vocabulary.spm").is_file()
    if not _is_of_kind(source, pieces, family):
        return {}
    if pieces:
        options |= _PIECES.get(family.name, {})
        return {"spiece.model": (assets / "vocabulary.spm").read_bytes(), "tokenizer_config.json": json_bytes(options)}
    options |= {f"{kind}_token": _END_OF_TEXT for kind in ("bos", "eos", "unk")}
    options["add_prefix_space"] = bool(config.get("add_prefix_space", False))
    others = [token for token in config.get("unsplittable_tokens") or [] if token != _END_OF_TEXT]
    if others:
        note(f"{source}: Hugging Face's files of this kind name one special token; {others} are ordinary text there")
    return {
        "vocab.json": (assets / "vocabulary.json").read_bytes(),
        "merges.txt": (assets / "merges.txt").read_bytes(),
        "tokenizer_config.json": json_bytes(options),
    }


def _keras_from_hf(source: Path, described: dict[str, Any], family: Family) -> dict[str, bytes]:
    options = read_json(path) if (path := source / "tokenizer_config.json").is_file() else {}
    pieces = (source / "spiece.model").is_file()
    bpe = model_kind(described) == "BPE" if described else (source / "vocab.json").is_file()
    if (pieces or bpe) and not _is_of_kind(source, pieces, family):
        return {}
    if pieces:
        _note_pieces(source, options, family)
        return {
            f"{_ASSETS}/vocabulary.spm": (source / "spiece.model").read_bytes(),
            "tokenizer.json": _keras_config(family, _PIECES_IN_KERAS),
        }
    if described:
        found = _bpe(source / "tokenizer.json", described, family)
        if found is None:
            return {}
        vocabulary, merges, special, prefix = found
        written = json.dumps(vocabulary, ensure_ascii=False).encode("utf-8")
        lines = "#version: 0.2\n" + "".join(f"{merge}\n" for merge in merges)
        merged = lines.encode("utf-8")
    elif (source / "vocab.json").is_file() and (source / "merges.txt").is_file():
        written, merged = (source / "vocab.json").read_bytes(), (source / "merges.txt").read_bytes()
        vocabulary, special, prefix = read_json(source / "vocab.json"), [], bool(options.get("add_prefix_space", False))
    else:
        _leave_out(source, "KerasHub has no tokeniser that works without a vocabulary file")
        return {}
    if _END_OF_TEXT not in vocabulary:
        _leave_out(source, f"KerasHub's GPT2Tokenizer needs the token {_END_OF_TEXT}, which the vocabulary lacks")
        return {}
    unsplittable = list(dict.fromkeys([_END_OF_TEXT, *special]))
    config = {"sequence_length": None, "add_prefix_space": prefix, "unsplittable_tokens": unsplittable}
    return {
        f"{_ASSETS}/vocabulary.json": written,
        f"{_ASSETS}/merges.txt": merged,
        "tokenizer.json": _keras_config(family, config),
    }


def _bpe(
    path: Path, described: dict[str, Any], family: Family
) -> tuple[dict[str, int], list[str], list[str], bool] | None:
    """Vocabulary, merges, special tokens and add_prefix_space of a tokenizer.json. None, and a warning, if it is not byte-level
    BPE as GPT-2's."""
    model, kind = described.get("model"), model_kind(described)
    if kind != "BPE":
        if family.name in _PIECES:
            why = (
                f"reads a SentencePiece model, and a {kind} model in JSON cannot become one: put spiece.model beside it"
            )
        else:
            why = f"takes byte-level BPE, and this is a {kind} model"
        _leave_out(path, f"KerasHub's {family.keras_name}Tokenizer {why}")
        return None
    before = described.get("pre_tokenizer") or {}
    if before.get("type") != "ByteLevel" or not before.get("use_regex", True) or described.get("normalizer"):
        _leave_out(path, "it splits or rewrites text in another way than KerasHub's GPT2Tokenizer")
        return None
    assert isinstance(model, dict)
    try:
        added = {token["content"]: token["id"] for token in described.get("added_tokens") or []}
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        return {**model["vocab"], **added}, merges, list(added), bool(before.get("add_prefix_space", False))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read as a tokenizer: {type(error).__name__}: {error}") from error


def _is_of_kind(source: Path, pieces: bool, family: Family) -> bool:
    """Whether the family's tokeniser is of this kind: a SentencePiece model, or byte-level BPE. If not, there is a warning."""
    if pieces == (family.name in _PIECES):
        return True
    kinds = ("byte-level BPE", "a SentencePiece model")
    _leave_out(source, f"it is {kinds[pieces]}, and {family.keras_name}Tokenizer takes {kinds[not pieces]}")
    return False


def _note_pieces(source: Path, options: dict[str, Any], family: Family) -> None:
    """Warns about what Hugging Face's tokeniser does beside its SentencePiece model and KerasHub's does not."""
    if family.name == "t5":
        if options.get("extra_ids", 100):
            note(
                f"{source}: KerasHub's T5Tokenizer lacks the tokens <extra_id_0>, ..., which follow those of the "
                f"SentencePiece model"
            )
        return
    lower, accents = options.get("do_lower_case", not family.keeps_case), options.get("keep_accents", family.keeps_case)
    if lower or not accents:
        what = " and ".join(["lower-cases the text"] * bool(lower) + ["drops accents"] * (not accents))
        note(
            f"{source}: Hugging Face's tokeniser {what}, KerasHub's {family.keras_name}Tokenizer does not: do so before it"
        )


def _leave_out(source: Path, why: str) -> None:
    note(f"{source}: the tokeniser is not saved: {why}")


def _keras_config(family: Family, options: dict[str, Any]) -> bytes:
    name = f"{family.kaggle_name}_tokenizer"
    policy = {"module": "keras", "class_name": "DTypePolicy", "config": {"name": "int32"}, "registered_name": None}
    return json_bytes({
        "module": f"keras_hub.src.models.{family.kaggle_name}.{name}",
        "class_name": f"{family.keras_name}Tokenizer",
        "config": {"name": name, "trainable": True, "dtype": policy, "config_file": "tokenizer.json", **options},
        "registered_name": f"keras_hub>{family.keras_name}Tokenizer",
    })  # fmt: skip
