"""Which models are there? One row for each family, with everything that other files look up by the family's name.

To add a model, write its files and add a row. Modules and classes are named by strings ("module:name") and imported when they
are first needed, so that every file may import this one.
"""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass, field
from typing import Any

from . import published
from .published import Preset
from .rules import with_article


@dataclass(frozen=True)
class Family:
    """A model and its names elsewhere.

    name: the model's name in checkpoints.
    backbone: the class in pyfused.
    checkpoint: the module with its configurations and tensor names in both formats (see pyfused/checkpoints/gpt2.py).
    decoding: the generation.steps.Decoding class that generates text; None for an encoder.
    adapters: the table that fuse_ uses for transformers' classes; None if there is none.
    keras_name: the prefix of KerasHub's classes: <keras_name>Backbone, <keras_name>Tokenizer.
    kaggle_name: the model's name on Kaggle.
    presets: the published presets; see published.py.
    hf_types: the `model_type`s with this model's classes and tensors.
    hf_classes: from the prefix of transformers' class names to the model_type of such a class.
    hf_options: options that only this model's configurations have together. They identify a configuration without a model_type.
    refused: model_types that look like this family but differ, and how they differ.
    keeps_case: whether its tokeniser keeps case and accents by default.
    texts: a call's inputs for each text: the names of the token ids and of their padding mask (None if it has no mask).
    segments: whether a call takes segment_ids, which tell the first text of a pair from the second.
    """

    name: str
    backbone: str
    checkpoint: str
    decoding: str | None
    adapters: str | None
    keras_name: str
    kaggle_name: str
    presets: tuple[Preset, ...]
    hf_types: tuple[str, ...]
    hf_classes: dict[str, str]
    hf_options: frozenset[str]
    refused: dict[str, str] = field(default_factory=dict)
    keeps_case: bool = False
    texts: tuple[tuple[str, str | None], ...] = (("token_ids", "padding_mask"),)
    segments: bool = False

    @property
    def class_name(self) -> str:
        """The backbone's class name, without its module."""
        return self.backbone.partition(":")[2]


_ROWS = (
    Family(
        name="gpt2",
        backbone="pyfused.models.gpt2:GPT2Backbone",
        checkpoint="pyfused.checkpoints.gpt2",
        decoding="pyfused.generation.gpt2:GPT2Decoding",
        adapters="pyfused.integrations.transformers.gpt2:ADAPTERS",
        keras_name="GPT2",
        kaggle_name="gpt2",
        presets=published.GPT2,
        hf_types=("gpt2",),
        hf_classes={"GPT2": "gpt2"},
        hf_options=frozenset({"n_embd", "n_head", "n_layer"}),
    ),
    Family(
        name="albert",
        backbone="pyfused.models.albert:AlbertBackbone",
        checkpoint="pyfused.checkpoints.albert",
        decoding=None,
        adapters="pyfused.integrations.transformers.albert:ADAPTERS",
        keras_name="Albert",
        kaggle_name="albert",
        presets=published.ALBERT,
        hf_types=("albert",),
        hf_classes={"Albert": "albert"},
        hf_options=frozenset({"embedding_size", "num_hidden_groups"}),
        segments=True,
    ),
    Family(
        name="t5",
        backbone="pyfused.models.t5:T5Backbone",
        checkpoint="pyfused.checkpoints.t5",
        decoding="pyfused.generation.t5:T5Decoding",
        adapters="pyfused.integrations.transformers.t5:ADAPTERS",
        keras_name="T5",
        kaggle_name="t5",
        presets=published.T5,
        hf_types=("t5", "mt5"),
        hf_classes={"T5": "t5", "MT5": "mt5", "UMT5": "umt5"},
        hf_options=frozenset({"d_model", "d_kv", "d_ff"}),
        refused={"umt5": "UMT5 has a table of position biases in every layer, where T5's first layer has one for all"},
        texts=(("encoder_token_ids", "encoder_padding_mask"), ("decoder_token_ids", "decoder_padding_mask")),
    ),
    Family(
        name="fnet",
        backbone="pyfused.models.fnet:FNetBackbone",
        checkpoint="pyfused.checkpoints.fnet",
        decoding=None,
        adapters="pyfused.integrations.transformers.fnet:ADAPTERS",
        keras_name="FNet",
        kaggle_name="f_net",
        presets=published.FNET,
        hf_types=("fnet",),
        hf_classes={"FNet": "fnet"},
        hf_options=frozenset({"tpu_short_seq_length"}),
        keeps_case=True,
        texts=(("token_ids", None),),
        segments=True,
    ),
)
FAMILIES: dict[str, Family] = {family.name: family for family in _ROWS}


def load(place: str) -> Any:
    """Imports "module:name" and returns the object, or the module if there is no name."""
    return pkgutil.resolve_name(place)


def families_of(cls: type) -> list[Family]:
    """The families whose backbone is this class or one of its bases."""
    places = {f"{base.__module__}:{base.__qualname__}" for base in cls.__mro__}
    return [family for family in FAMILIES.values() if family.backbone in places]


def family_of(cls: type) -> Family:
    """The family of a backbone's class.

    Raises:
        TypeError: the class is not a backbone.
    """
    found = families_of(cls)
    if len(found) != 1:
        raise TypeError(f"model is {with_article(cls.__name__)}; it takes a backbone of one of {', '.join(FAMILIES)}")
    return found[0]


def of_hf_type(model_type: object) -> Family | None:
    """The family for the model_type of a Hugging Face configuration, or None."""
    return next((family for family in FAMILIES.values() if model_type in family.hf_types), None)
