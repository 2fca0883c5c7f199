"""Which files of a directory are parts of a checkpoint, and which of an old one go away when a new one takes its place?"""

from __future__ import annotations

import re
from collections.abc import Iterable

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "spiece.model", "special_tokens_map.json",
             "added_tokens.json", "assets/tokenizer/vocabulary.json", "assets/tokenizer/merges.txt",
             "assets/tokenizer/vocabulary.spm")  # fmt: skip

# Names of both formats, and Keras's tasks and preprocessors, which repeat the configuration of the backbone
_MODEL = re.compile(
    r"config\.json|metadata\.json|model(\.int[48])?(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index(\.int[48])?\.json|"
    r"model(_\d+)?\.weights\.h5|model\.weights\.json|(task|preprocessor)\.json|task\.weights\.h5"
)

# Weights that pyfused reads and does not write. Beside new ones they would be a second set, which a reader could take
_OTHER_WEIGHTS = re.compile(
    r"model\.[^/]+\.safetensors|model\.safetensors\.index\.[^/]+\.json|"
    r"pytorch_model(\.[^/]+)?(-\d+-of-\d+)?\.bin|pytorch_model\.bin\.index(\.[^/]+)?\.json"
)


def is_part(name: str) -> bool:
    """Whether a file is part of a checkpoint that pyfused writes. ``name``: its path in the directory, with "/"."""
    return name in TOKENIZER or bool(_MODEL.fullmatch(name))


def stale(held: Iterable[str], new: Iterable[str]) -> set[str]:
    """The files among ``held`` that go away when the files ``new`` are written: the old configuration, weights in any
    layout that pyfused reads, and the old tokeniser if there is a new one."""
    new = set(new)
    gone = {
        name
        for name in held
        if _MODEL.fullmatch(name) or _OTHER_WEIGHTS.fullmatch(name) or (name in TOKENIZER and new & set(TOKENIZER))
    }
    return gone - new
