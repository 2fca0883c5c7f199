"""Which presets has KerasHub 0.32 published, and of which sizes? A table for each family; families.py puts it in the row."""

from __future__ import annotations

from typing import Any, NamedTuple


class Preset(NamedTuple):
    """A published preset.

    name, version: its last two names on Kaggle.
    description: what sets it apart from its family's others.
    parameters: the count in its metadata. A backbone made from ``config`` has as many.
    hf_repo: the Hugging Face repository with the same weights, if there is one.
    config: the constructor arguments of KerasHub's class, as its config.json has them.
    """

    name: str
    version: int
    description: str
    parameters: int
    hf_repo: str | None
    config: dict[str, Any]


def _gpt2(layers: int, heads: int, width: int) -> dict[str, Any]:
    return {
        "vocabulary_size": 50257, "num_layers": layers, "num_heads": heads, "hidden_dim": width,
        "intermediate_dim": 4 * width, "dropout": 0.1, "max_sequence_length": 1024,
    }  # fmt: skip


def _albert(layers: int, heads: int, width: int) -> dict[str, Any]:
    return {
        "vocabulary_size": 30000, "num_layers": layers, "num_heads": heads, "embedding_dim": 128, "hidden_dim": width,
        "intermediate_dim": 4 * width, "num_groups": 1, "num_inner_repetitions": 1, "dropout": 0.0,
        "max_sequence_length": 512, "num_segments": 2,
    }  # fmt: skip


def _t5(layers: int, heads: int, width: int, inner: int) -> dict[str, Any]:
    return {
        "vocabulary_size": 32128, "num_layers": layers, "num_heads": heads, "hidden_dim": width,
        "intermediate_dim": inner, "key_value_dim": 64, "dropout": 0.1, "activation": "relu",
        "use_gated_activation": False, "layer_norm_epsilon": 1e-6, "tie_embedding_weights": True,
    }  # fmt: skip


def _t5_1_1(layers: int, heads: int, width: int, inner: int, tied: bool = False) -> dict[str, Any]:
    options = {"activation": "gelu", "use_gated_activation": True, "tie_embedding_weights": tied}
    return _t5(layers, heads, width, inner) | options


def _flan(layers: int, heads: int, width: int, inner: int) -> dict[str, Any]:
    return _t5_1_1(layers, heads, width, inner) | {"activation": "keras_hub>gelu_approximate"}


def _fnet(layers: int, width: int) -> dict[str, Any]:
    return {
        "vocabulary_size": 32000, "num_layers": layers, "hidden_dim": width, "intermediate_dim": 4 * width,
        "dropout": 0.1, "max_sequence_length": 512, "num_segments": 4,
    }  # fmt: skip


GPT2 = (
    Preset("gpt2_base_en", 3, "12 layers, English", 124_439_808, "openai-community/gpt2", _gpt2(12, 12, 768)),
    Preset("gpt2_base_en_cnn_dailymail", 3, "12 layers, English, fine-tuned to summarise news", 124_439_808, None,
           _gpt2(12, 12, 768)),
    Preset("gpt2_medium_en", 3, "24 layers, English", 354_823_168, "openai-community/gpt2-medium", _gpt2(24, 16, 1024)),
    Preset("gpt2_large_en", 3, "36 layers, English", 774_030_080, "openai-community/gpt2-large", _gpt2(36, 20, 1280)),
    Preset("gpt2_extra_large_en", 3, "48 layers, English", 1_557_611_200, "openai-community/gpt2-xl", _gpt2(48, 25, 1600)),
)  # fmt: skip

ALBERT = (
    Preset("albert_base_en_uncased", 5, "12 layers, English without case", 11_683_584, "albert/albert-base-v2",
           _albert(12, 12, 768)),
    Preset("albert_large_en_uncased", 3, "24 layers, English without case", 17_683_968, "albert/albert-large-v2",
           _albert(24, 16, 1024)),
    Preset("albert_extra_large_en_uncased", 3, "24 layers, wider", 58_724_864, "albert/albert-xlarge-v2",
           _albert(24, 16, 2048)),
    Preset("albert_extra_extra_large_en_uncased", 3, "12 layers, widest", 222_595_584, "albert/albert-xxlarge-v2",
           _albert(12, 64, 4096)),
)  # fmt: skip

# T5 1.1's configurations at Keras ask for GELU with erf, those at Hugging Face for GELU with tanh. Each is loaded as it says;
# the outputs differ by less than 1%. KerasHub's counts for the small and the large one are those of tied embeddings, so they
# are tied here, although the others of T5 1.1 are not; when weights are loaded, the preset's own config.json decides.
T5 = (
    Preset("t5_small_multi", 3, "6 layers", 60_506_624, "google-t5/t5-small", _t5(6, 8, 512, 2048)),
    Preset("t5_base_multi", 3, "12 layers", 222_903_552, "google-t5/t5-base", _t5(12, 12, 768, 3072)),
    Preset("t5_large_multi", 3, "24 layers", 737_668_096, "google-t5/t5-large", _t5(24, 16, 1024, 4096)),
    Preset("t5_1.1_small", 2, "T5 1.1, 8 layers", 60_511_616, "google/t5-v1_1-small", _t5_1_1(8, 6, 512, 1024, tied=True)),
    Preset("t5_1.1_base", 2, "T5 1.1, 12 layers", 247_577_856, "google/t5-v1_1-base", _t5_1_1(12, 12, 768, 2048)),
    Preset("t5_1.1_large", 2, "T5 1.1, 24 layers", 750_251_008, "google/t5-v1_1-large",
           _t5_1_1(24, 16, 1024, 2816, tied=True)),
    Preset("t5_1.1_xl", 2, "T5 1.1, 24 layers, wider", 2_849_757_184, "google/t5-v1_1-xl", _t5_1_1(24, 32, 2048, 5120)),
    Preset("t5_1.1_xxl", 2, "T5 1.1, 24 layers, widest", 11_135_332_352, "google/t5-v1_1-xxl",
           _t5_1_1(24, 64, 4096, 10240)),
    Preset("flan_small_multi", 3, "Flan-T5, 8 layers", 76_961_152, "google/flan-t5-small", _flan(8, 6, 512, 1024)),
    Preset("flan_base_multi", 3, "Flan-T5, 12 layers", 247_577_856, "google/flan-t5-base", _flan(12, 12, 768, 2048)),
    Preset("flan_large_multi", 3, "Flan-T5, 24 layers", 783_150_080, "google/flan-t5-large", _flan(24, 16, 1024, 2816)),
)  # fmt: skip

FNET = (
    Preset("f_net_base_en", 3, "12 layers, English", 82_861_056, "google/fnet-base", _fnet(12, 768)),
    Preset("f_net_large_en", 3, "24 layers, English", 236_945_408, "google/fnet-large", _fnet(24, 1024)),
)  # fmt: skip
