"""Does every published configuration load as transformers reads it, or fail for a reason that concerns the outputs?"""

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from pyfused.checkpoints import open_checkpoint
from pyfused.checkpoints.layer_plans import hf_plan
from pyfused.families import FAMILIES, load
from pyfused.models.backbone import Backbone

PUBLISHED = Path(__file__).resolve().parent.parent / "data" / "published"
NAMES = sorted(path.stem for path in PUBLISHED.glob("*.json"))
UMT5 = "model_type is 'umt5'.*UMT5 has a table of position biases in every layer"
REFUSED = {
    "t5_encoder_flux_bnb_nf4": "quantization_config is .*load the checkpoint that they were quantised from",
    "comfy_t5_pile_xl": UMT5, "comfy_umt5_xxl": UMT5, "umt5_base": UMT5, "umt5_small": UMT5, "umt5_xxl": UMT5,
}  # fmt: skip
NOTED = {  # the keys that a warning names
    "albert_chinese": {"layers_to_keep"}, "albert_xxlarge_v2": {"layers_to_keep"},
    "albert_large_v2_farm": {"language", "name"},
    "gpt2_medium": {"n_special", "predict_special_tokens"},
    "dialogpt_345m_2019": {"n_special", "predict_special_tokens"},
    "fnet_base": {"actual_seq_length", "use_fft", "use_latest"},
    "fnet_large": {"actual_seq_length", "use_fft", "use_latest"},
    "t5_base_odd_tf": {
        "attention_probs_dropout_prob", "decoder_attention_heads", "decoder_ffn_dim", "decoder_layerdrop",
        "decoder_layers", "input_feeding", "num_tokens_to_add", "padding", "return_tensors", "truncation",
    },
}  # fmt: skip
OWN_CLASS = {"gpt2_custom_architecture": "ConditionalGPT2"}
WITHOUT_TYPE = {"dialogpt_117m_2019": "gpt2", "dialogpt_345m_2019": "gpt2", "distilgpt2_2020": "gpt2",
                "albert_large_google_form": "albert"}  # fmt: skip
ENCODERS = {name for name in NAMES if name.startswith("t5_encoder") or name.endswith("encoder")} - {
    "t5_encoder_flux_without_ff_proj"  # no class is named there
}
LOADED = [name for name in NAMES if name not in REFUSED]


def raw_of(name):
    return json.loads((PUBLISHED / f"{name}.json").read_text())


def theirs_of(raw, name):
    """transformers' configuration from the same dict."""
    kind = raw.get("model_type") or WITHOUT_TYPE[name]
    return transformers.AutoConfig.for_model(kind, **{key: value for key, value in raw.items() if key != "model_type"})


@pytest.fixture
def folder(tmp_path):
    """A function that writes a configuration into a folder of its own."""

    def write(raw):
        (tmp_path / "config.json").write_text(json.dumps(raw))
        return tmp_path

    return write


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused(folder, name):
    with pytest.raises(ValueError, match=REFUSED[name]):
        Backbone.from_preset(folder(raw_of(name)), load_weights=False, device="meta")


@pytest.mark.parametrize("name", LOADED)
def test_loads_and_names_the_keys_that_nothing_reads_once(folder, name):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = Backbone.from_preset(folder(raw_of(name)), load_weights=False, device="meta")
    expected = int(name in NOTED) + int(name in OWN_CLASS)
    assert len(caught) == expected, [str(warning.message) for warning in caught]
    for warning in caught:
        said = str(warning.message)
        assert warning.filename == __file__  # the line that called pyfused
        if name in OWN_CLASS:
            assert OWN_CLASS[name] in said
        else:
            assert set(re.findall(r"(\w+)=", said.split("unread: ")[1])) == NOTED[name]
    assert (getattr(model, "decoder", model) is None) == (name in ENCODERS)
    if name in ENCODERS:
        assert not any(key.startswith("decoder") or "reverse" in key for key in model.state_dict())


OURS = {
    "gpt2": {
        "vocab_size": "vocabulary_size", "n_layer": "num_layers", "n_head": "num_heads", "n_embd": "hidden_dim",
        "n_positions": "max_sequence_length", "layer_norm_epsilon": "layer_norm_epsilon",
        "scale_attn_weights": "scale_attention", "reorder_and_upcast_attn": "upcast_attention",
        "scale_attn_by_inverse_layer_idx": "scale_attention_by_inverse_layer_index",
        "add_cross_attention": "cross_attention", "tie_word_embeddings": "tie_embedding_weights",
        "resid_pdrop": "dropout",
    },
    "albert": {
        "vocab_size": "vocabulary_size", "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads",
        "embedding_size": "embedding_dim", "hidden_size": "hidden_dim", "intermediate_size": "intermediate_dim",
        "num_hidden_groups": "num_groups", "inner_group_num": "num_inner_repetitions", "layer_norm_eps": "layer_norm_epsilon",
        "max_position_embeddings": "max_sequence_length", "type_vocab_size": "num_segments",
        "hidden_dropout_prob": "dropout",
    },
    "fnet": {
        "vocab_size": "vocabulary_size", "num_hidden_layers": "num_layers", "hidden_size": "hidden_dim",
        "intermediate_size": "intermediate_dim", "max_position_embeddings": "max_sequence_length",
        "type_vocab_size": "num_segments", "hidden_dropout_prob": "dropout", "layer_norm_eps": "layer_norm_epsilon",
    },
    "t5": {
        "vocab_size": "vocabulary_size", "num_layers": "num_layers", "num_heads": "num_heads", "d_model": "hidden_dim",
        "d_ff": "intermediate_dim", "d_kv": "key_value_dim", "layer_norm_epsilon": "layer_norm_epsilon",
        "num_decoder_layers": "num_decoder_layers", "is_gated_act": "use_gated_activation", "dropout_rate": "dropout",
        "relative_attention_num_buckets": "num_buckets", "relative_attention_max_distance": "max_distance",
    },
}  # fmt: skip
ACTIVATIONS = {"gpt2": "activation_function", "albert": "hidden_act", "fnet": "hidden_act", "t5": "dense_act_fn"}


def test_no_key_with_an_effect_is_left_unread():
    rows = [line.split("\t") for line in (PUBLISHED / "keys.tsv").read_text().splitlines()[1:]]
    without_effect = {row[0].removesuffix(".json"): set(row[1].split()) for row in rows}
    for name, keys in NOTED.items():
        assert keys <= without_effect[name]


@pytest.mark.parametrize("name", LOADED)
@pytest.mark.filterwarnings("ignore:.*unread", "ignore:.*a class that transformers does not have")
def test_values_are_those_that_transformers_reads(folder, name):
    theirs = theirs_of(raw_of(name), name)
    checkpoint = open_checkpoint(folder(raw_of(name)), weights=False)
    assert checkpoint.model == {"mt5": "t5"}.get(theirs.model_type, theirs.model_type)
    names = dict(OURS[checkpoint.model])
    if name in ENCODERS:
        del names["num_decoder_layers"]
    assert {ours: checkpoint.config[ours] for ours in names.values()} == {
        ours: getattr(theirs, key) for key, ours in names.items()
    }
    if checkpoint.model == "gpt2":
        assert checkpoint.config["intermediate_dim"] == (theirs.n_inner or 4 * theirs.n_embd)
    if checkpoint.model == "t5":
        assert checkpoint.config["scale_logits"] == getattr(theirs, "scale_decoder_outputs", False)
        assert checkpoint.config["decoder_start_token_id"] == (getattr(theirs, "decoder_start_token_id", 0) or 0)
    x = torch.linspace(-4, 4, 101, dtype=torch.float64)
    expected = transformers.activations.ACT2FN[getattr(theirs, ACTIVATIONS[checkpoint.model])](x)
    kinds = {"gelu_new": "tanh", "gelu": "none"}
    ours = checkpoint.config["activation"]
    actual = torch.nn.functional.gelu(x, approximate=kinds[ours]) if ours in kinds else getattr(torch, ours)(x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


SMALL = {
    "gpt2": {"n_layer": 2, "n_embd": 24, "n_head": 4, "n_positions": 16, "n_ctx": 16, "vocab_size": 61},
    "albert": {
        "num_hidden_layers": 2, "hidden_size": 24, "embedding_size": 8, "num_attention_heads": 4, "vocab_size": 61,
        "intermediate_size": 40, "max_position_embeddings": 16,
    },
    "fnet": {
        "num_hidden_layers": 2, "hidden_size": 24, "intermediate_size": 40, "max_position_embeddings": 16,
        "vocab_size": 61, "tpu_short_seq_length": 9,
    },
    "t5": {"num_layers": 2, "d_model": 24, "d_kv": 5, "num_heads": 4, "d_ff": 40, "vocab_size": 61},
}  # fmt: skip
HEADS = {"gpt2": "GPT2LMHeadModel", "albert": "AlbertModel", "fnet": "FNetModel", "t5": "T5ForConditionalGeneration",
         "mt5": "MT5ForConditionalGeneration"}  # fmt: skip
IDS = torch.randint(4, 60, (2, 9), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
@pytest.mark.parametrize("model", ["gpt2", "albert", "fnet", "t5", "mt5"])
@pytest.mark.filterwarnings("ignore:.*unread", "ignore:.*a class that transformers does not have")
@pytest.mark.filterwarnings("ignore:.*differs from .* although the configuration ties")
def test_small_versions_compute_what_transformers_computes(folder, model):
    """All but the sizes is as published: each kind of configuration once."""
    seen = []
    for name in LOADED:
        raw = raw_of(name)
        if (raw.get("model_type") or WITHOUT_TYPE[name]) != model:
            continue
        small = SMALL[{"mt5": "t5"}.get(model, model)]
        raw |= small | {key: 1 for key in raw if key.endswith("token_id")}
        if "num_decoder_layers" in raw:
            raw["num_decoder_layers"] = 1
        directory = folder(raw)
        config = open_checkpoint(directory, weights=False).config
        if config in seen:
            continue
        seen.append(config)
        encoder = name in ENCODERS
        head = HEADS[model].replace("ForConditionalGeneration", "EncoderModel") if encoder else HEADS[model]
        theirs = getattr(transformers, head)(theirs_of(raw, name)).double().eval()
        generator = torch.Generator().manual_seed(0)
        for key, parameter in theirs.named_parameters():
            norm = "norm" in key.lower() or ".ln_" in key
            parameter.copy_(float(norm) + 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        save_file({key: value.clone() for key, value in theirs.state_dict().items()}, directory / "model.safetensors")
        ours = Backbone.from_preset(directory, dtype="float64")
        if model == "gpt2":
            pair = ours.logits(ours(token_ids=IDS, padding_mask=None)), theirs(IDS).logits
        elif encoder:
            pair = ours.encode(encoder_token_ids=IDS, encoder_padding_mask=None), theirs(IDS).last_hidden_state
        elif model in ("t5", "mt5"):
            out = ours(encoder_token_ids=IDS, encoder_padding_mask=None, decoder_token_ids=IDS, decoder_padding_mask=None)
            pair = ours.logits(out["decoder_sequence_output"]), theirs(input_ids=IDS, decoder_input_ids=IDS).logits
        else:
            segments = IDS % 2
            inputs = {"token_ids": IDS, "segment_ids": segments}
            out = ours(inputs | ({"padding_mask": None} if model == "albert" else {}))
            expected = theirs(IDS, token_type_ids=segments)
            pair = torch.cat([out["sequence_output"].flatten(), out["pooled_output"].flatten()]), torch.cat(
                [expected.last_hidden_state.flatten(), expected.pooler_output.flatten()]
            )
        # transformers takes T5's mean squares in float32 whatever the dtype; a wrong option is off by far more than that
        assert (pair[0] - pair[1]).abs().max() < 1e-5 * pair[1].abs().max(), name
    assert seen


# Of each list: the configuration of the same checkpoint, what to note, and sizes where the configuration is another one's
TENSORS = {
    "gpt2": ("gpt2", set(), {}), "gpt2_classifier": ("gpt2", {"score.weight"}, {}),
    "albert_base_v2_classifier": ("albert_base_v2_classifier_4_35", {"classifier.weight", "classifier.bias"}, {}),
    "t5_base": ("t5_base", set(), {}), "t5_large": ("t5_large", set(), {}),
    "t5_3b": ("t5_large", set(), {"d_ff": 16384, "num_heads": 32, "d_kv": 128}),
    "t5_3b_classifier": (
        "t5_large",
        {f"classification_head.{layer}.{kind}" for layer in ("dense", "out_proj") for kind in ("weight", "bias")},
        {"d_ff": 16384, "num_heads": 32, "d_kv": 128},
    ),
    "t5_encoder_flux": ("t5_encoder_flux", set(), {}), "t5_encoder_hunyuan": ("t5_encoder_hunyuan", set(), {}),
    "t5_encoder_sd3_fp16": ("t5_encoder_sd3_fp16", set(), {}),
}  # fmt: skip


def header_only(path, names, shapes):
    """A safetensors file of the right size without a byte written: a hole, as far as the disk is concerned."""
    header, end = {}, 0
    for name in names:
        size = 2 * torch.Size(shapes[name]).numel()
        header[name] = {"dtype": "BF16", "shape": list(shapes[name]), "data_offsets": [end, end + size]}
        end += size
    encoded = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + end)


@pytest.mark.parametrize("name", sorted(TENSORS))
def test_the_names_of_published_tensors_are_those_of_the_model(folder, name):
    configuration, heads, sizes = TENSORS[name]
    directory = folder(raw_of(configuration) | sizes)
    described = open_checkpoint(directory, weights=False)
    plan = hf_plan(load(FAMILIES[described.model].checkpoint), described.config)
    ours = {piece.name: piece.shape for target in plan.values() for piece in target.pieces}
    rows = [line.split("\t") for line in (PUBLISHED / f"{name}.tensors.txt").read_text().splitlines()[1:]]
    shapes = {}
    for key, *rest in rows:
        short = key.removeprefix("transformer.").removeprefix("albert.")
        stated = tuple(int(n) for n in re.findall(r"\d+", rest[0])) if rest and rest[0].startswith("(") else None
        shapes[key] = stated or ours.get(short, (1,))
    header_only(directory / "model.safetensors", list(shapes), shapes)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checkpoint = open_checkpoint(directory)
    assert {word for warning in caught for word in str(warning.message).split("unread: ")[1].split(", ")} == heads
    assert len(caught) == bool(heads)
    assert (checkpoint.config.get("num_decoder_layers") == 0) == (configuration in ENCODERS)
    sizes_of = [torch.Size(shape).numel() for shape in checkpoint.shapes.values()]
    assert sum(sizes_of) == sum(
        torch.Size(shape).numel() for key, shape in shapes.items() if key not in heads and not key.endswith(".attn.bias")
    )


def test_quantised_tensors_are_refused_without_a_word_in_the_configuration(folder):
    raw = {key: value for key, value in raw_of("t5_encoder_flux_bnb_nf4").items() if key != "quantization_config"}
    directory = folder(raw)
    listed = (PUBLISHED / "t5_encoder_flux_bnb_nf4.tensors.txt").read_text().splitlines()[1:]
    rows = [line.split("\t")[0] for line in listed]
    header_only(directory / "model.safetensors", rows, dict.fromkeys(rows, (1,)))
    with pytest.raises(ValueError, match=r"absmax' belongs to quantised weights.*load the checkpoint that they were"):
        open_checkpoint(directory)
