"""Do files of fine-tuned, wrapped and old models give their backbone, with one word about what is left unread?"""

import json
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from pyfused.checkpoints import open_checkpoint
from pyfused.models.backbone import Backbone

IDS = torch.randint(4, 60, (2, 9), generator=torch.Generator().manual_seed(3))
SIZES = {"vocab_size": 61, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GPT2 = {**SIZES, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 16}
ENCODER = {**SIZES, "hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 40, "max_position_embeddings": 16}
ALBERT = {**ENCODER, "embedding_size": 8, "num_attention_heads": 4}
T5 = {"vocab_size": 61, "num_layers": 2, "num_decoder_layers": 1, "d_model": 24, "d_kv": 5, "num_heads": 4, "d_ff": 40}
T5 |= {"decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu"}
CONFIGS = {"GPT2": ("GPT2Config", GPT2), "Albert": ("AlbertConfig", ALBERT), "FNet": ("FNetConfig", ENCODER),
           "T5": ("T5Config", T5), "MT5": ("MT5Config", T5)}  # fmt: skip
CLASSES = {
    "GPT2": ("Model", "LMHeadModel", "DoubleHeadsModel", "ForSequenceClassification", "ForTokenClassification",
             "ForQuestionAnswering"),
    "Albert": ("Model", "ForPreTraining", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification",
               "ForQuestionAnswering", "ForMultipleChoice"),
    "FNet": ("Model", "ForPreTraining", "ForMaskedLM", "ForNextSentencePrediction", "ForSequenceClassification",
             "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice"),
    "T5": ("Model", "ForConditionalGeneration", "EncoderModel", "ForSequenceClassification", "ForTokenClassification",
           "ForQuestionAnswering"),
    "MT5": ("ForConditionalGeneration", "EncoderModel", "ForSequenceClassification", "ForTokenClassification"),
}  # fmt: skip
BACKBONE = ("transformer.", "albert.", "fnet.", "shared.", "encoder.", "decoder.", "embeddings.", "pooler.", "wte.", "wpe.",
            "h.", "ln_f.", "lm_head.weight")  # fmt: skip


def make(family, kind):
    name, config = CONFIGS[family]
    model = getattr(transformers, family + kind)(getattr(transformers, name)(**config)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            norm = "norm" in key.lower() or ".ln_" in key
            parameter.copy_(float(norm) + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def states(model):
    """The hidden states of transformers' backbone, in float64; the encoder's of T5."""
    model = model.double()
    if "T5" in type(model).__name__:
        return (getattr(model, "transformer", model)).encoder(IDS).last_hidden_state
    return getattr(model, model.base_model_prefix, model)(IDS).last_hidden_state


@torch.no_grad()
def load(directory, warned=0):
    """The model, and what the warnings say after "unread: "."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = Backbone.from_preset(directory, dtype="float64")
    said = [str(warning.message) for warning in caught]
    assert len(said) == warned, said
    return model, [set(text.split("unread: ")[-1].split(", ")) for text in said]


@torch.no_grad()
def check(directory, theirs, noted=()):
    model, said = load(directory, warned=bool(noted))
    assert said == ([set(noted)] if noted else [])
    actual, expected = model.text_states(IDS, None), states(theirs)
    assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()  # T5's norms are in float32 there
    return model


@pytest.mark.parametrize("family, kind", [(family, kind) for family, kinds in CLASSES.items() for kind in kinds])
def test_every_class_of_transformers(tmp_path, family, kind):
    theirs = make(family, kind)
    theirs.save_pretrained(tmp_path)
    heads = [name for name in load_file(tmp_path / "model.safetensors") if not name.startswith(BACKBONE)]
    assert bool(heads) == (kind == "DoubleHeadsModel" or (kind.startswith("For") and kind != "ForConditionalGeneration"))
    model = check(tmp_path, theirs, heads)
    encoder = family in ("T5", "MT5") and kind in ("EncoderModel", "ForTokenClassification")
    assert (getattr(model, "decoder", model) is None) == encoder


def test_value_heads(tmp_path):
    """As TRL saves them, beside the language model's tensors."""
    theirs = make("GPT2", "LMHeadModel")
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    heads = {"v_head.summary.weight": torch.ones(1, 24), "v_head.summary.bias": torch.ones(1)}
    save_file(load_file(path) | heads, path)
    check(tmp_path, theirs, heads)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.", "model.module."])
@pytest.mark.parametrize("family, kind", [("GPT2", "LMHeadModel"), ("Albert", "ForMaskedLM"), ("FNet", "Model"),
                                          ("T5", "ForConditionalGeneration"), ("T5", "EncoderModel")])  # fmt: skip
def test_prefixes(tmp_path, family, kind, prefix):
    theirs = make(family, kind)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({prefix + name: tensor for name, tensor in load_file(path).items()}, path)
    heads = [prefix + name for name in theirs.state_dict() if name.startswith("predictions.")]
    check(tmp_path, theirs, [name for name in heads if "decoder" not in name])


def renamed(tmp_path, family, kind, rename):
    theirs = make(family, kind)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({rename(name): tensor for name, tensor in load_file(path).items()}, path)
    return theirs


@pytest.mark.parametrize(
    "family, kind, rename",
    [
        ("GPT2", "Model", lambda name: f"transformer.{name}"),
        ("GPT2", "Model", lambda name: f"encoder.{name}"),
        ("Albert", "Model", lambda name: f"albert.{name}"),
        ("Albert", "Model", lambda name: f"encoder.{name}"),
        ("FNet", "Model", lambda name: f"fnet.{name}"),
        ("T5", "EncoderModel", lambda name: f"encoder.{name}"),
        ("T5", "EncoderModel", lambda name: f"model.encoder.{name}"),
        # A wrapper around a part in the middle, and one prefix for some of the tensors
        ("GPT2", "LMHeadModel", lambda name: name.replace("h.1.", "h.1._checkpoint_wrapped_module.")),
        ("GPT2", "LMHeadModel", lambda name: name.replace("transformer.", "transformer._orig_mod.")),
        ("Albert", "Model", lambda name: f"albert.{name}" if "pooler" in name else name),
        # TensorFlow's names of norms
        ("Albert", "Model", lambda n: n.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta")),
        ("FNet", "Model", lambda n: n.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta")),
    ],
)  # fmt: skip
def test_other_names(tmp_path, family, kind, rename):
    check(tmp_path, renamed(tmp_path, family, kind, rename))


def test_a_stack_saved_by_itself(tmp_path):
    """model.encoder.state_dict(): neither shared.weight nor the prefix encoder."""
    theirs = make("T5", "Model")
    theirs.save_pretrained(tmp_path)
    state = {name: tensor.clone() for name, tensor in theirs.encoder.state_dict().items()}
    assert "embed_tokens.weight" in state
    save_file(state, tmp_path / "model.safetensors")
    assert check(tmp_path, theirs).decoder is None


@pytest.mark.parametrize(
    "family, kind", [("GPT2", "LMHeadModel"), ("Albert", "Model"), ("FNet", "ForMaskedLM"), ("T5", "Model")]
)
def test_an_unknown_prefix_is_named(tmp_path, family, kind):
    renamed(tmp_path, family, kind, lambda name: f"policy_net.{name}")
    with pytest.raises(ValueError, match=r"model.safetensors: \d+ tensors of the model begin with 'policy_net\.[a-z.]*'"):
        open_checkpoint(tmp_path)


def test_of_two_models_the_known_one_is_read(tmp_path):
    theirs = make("GPT2", "LMHeadModel")
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    save_file(weights | {f"reference.{name}": tensor + 1 for name, tensor in weights.items()}, path)
    model, (said,) = load(tmp_path, warned=1)
    assert any(name.startswith("reference.transformer.h.0.") for name in said)
    assert torch.equal(model.token_embedding.weight, theirs.transformer.wte.weight.double())


@pytest.mark.parametrize(
    "family, kind, gone",
    [
        ("GPT2", "ForSequenceClassification", ["transformer.h.1.mlp.c_fc.bias", "transformer.wpe.weight"]),
        ("Albert", "ForTokenClassification", ["albert.embeddings.LayerNorm.bias", "albert.embeddings.word_embeddings.weight"]),
        ("FNet", "ForSequenceClassification", ["fnet.encoder.layer.0.output.LayerNorm.weight"]),
        ("T5", "ForConditionalGeneration", ["decoder.final_layer_norm.weight", "shared.weight"]),
        ("T5", "EncoderModel", ["encoder.block.1.layer.1.DenseReluDense.wi_0.weight"]),
    ],
)  # fmt: skip
def test_missing_tensors_of_the_backbone_are_named(tmp_path, family, kind, gone):
    make(family, kind).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    save_file({name: tensor for name, tensor in weights.items() if name not in gone}, path)
    with pytest.raises(ValueError, match="is missing") as caught:
        open_checkpoint(tmp_path)
    for name in gone:
        assert name.removeprefix("transformer.").removeprefix("albert.").removeprefix("fnet.") in str(caught.value)


def test_buffers_of_older_versions(tmp_path):
    for family, kind, buffers in (
        ("GPT2", "LMHeadModel", {f"transformer.h.{i}.attn.{name}": torch.ones(1, 1, 16, 16)
                                 for i in range(2) for name in ("bias", "masked_bias")}),
        ("Albert", "ForMultipleChoice", {"albert.embeddings.position_ids": torch.arange(16)[None],
                                         "albert.embeddings.token_type_ids": torch.zeros(1, 16)}),
        ("FNet", "Model", {"embeddings.position_ids": torch.arange(16)[None]}),
        ("T5", "Model", {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": torch.ones(32, 4)}),
    ):  # fmt: skip
        theirs = make(family, kind)
        directory = tmp_path / family
        theirs.save_pretrained(directory)
        path = directory / "model.safetensors"
        weights = load_file(path)
        save_file(weights | buffers, path)
        check(directory, theirs, [name for name in weights if name.startswith("classifier")])


@pytest.mark.parametrize(
    "family, kind, gone, left",
    [
        ("T5", "ForConditionalGeneration", "shared.weight", ["decoder.embed_tokens.weight"]),
        ("T5", "ForConditionalGeneration", "shared.weight", ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]),
        ("T5", "EncoderModel", "shared.weight", ["encoder.embed_tokens.weight"]),
        ("T5", "ForConditionalGeneration", "shared.weight", ["lm_head.weight"]),
        ("GPT2", "LMHeadModel", "transformer.wte.weight", ["lm_head.weight"]),
        ("FNet", "ForMaskedLM", "fnet.embeddings.word_embeddings.weight", ["cls.predictions.decoder.weight"]),
        ("Albert", "ForMaskedLM", "albert.embeddings.word_embeddings.weight", ["predictions.decoder.weight"]),
    ],
)
@pytest.mark.filterwarnings("ignore:.*left unread")
def test_tied_copies_stand_for_the_embedding(tmp_path, family, kind, gone, left):
    """safetensors' save_model, for one, keeps one of the tensors that share memory, whichever comes first."""
    theirs = make(family, kind)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    table = weights.pop(gone)
    for name in ("lm_head.weight", *left):
        weights.pop(name, None)
    save_file(weights | {name: table.clone() for name in left}, path)
    model = Backbone.from_preset(tmp_path, dtype="float64")
    assert model.get_config().get("tie_embedding_weights", True)
    expected = states(theirs)
    with torch.no_grad():
        assert (model.text_states(IDS, None) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_two_embeddings_of_t5_are_refused(tmp_path):
    theirs = make("T5", "Model")
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    table = weights.pop("shared.weight")
    save_file(weights | {"encoder.embed_tokens.weight": table, "decoder.embed_tokens.weight": table + 1}, path)
    with pytest.raises(ValueError, match=r"'encoder.embed_tokens.weight' and 'decoder.embed_tokens.weight' differ"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name, said",
    [
        ("base_model.model.transformer.h.0.attn.c_attn.lora_A.default.weight", "belongs to an adapter: merge it"),
        ("transformer.h.0.attn.c_attn.weight.SCB", "belongs to quantised weights"),
        ("transformer.h.0.attn.c_attn.qweight", "belongs to quantised weights"),
        ("transformer.h.2.ln_1.weight", "'transformer.h.2.ln_1.weight' is not part of the model"),
        ("transformer.h.0.crossattention.q_attn.weight", "is not part of the model"),
        ("lm_head.bias", "'lm_head.bias' is not part of the model"),
    ],
)
def test_tensors_that_make_it_another_model_are_refused(tmp_path, name, said):
    make("GPT2", "LMHeadModel").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | {name: torch.ones(24)}, path)
    with pytest.raises(ValueError, match=said):
        open_checkpoint(tmp_path)


def test_tensors_of_a_table_in_every_layer_say_umt5(tmp_path):
    make("T5", "EncoderModel").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    table = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
    save_file(load_file(path) | {table: torch.ones(32, 4)}, path)
    with pytest.raises(ValueError, match=rf"{table}' is not part of the model.*UMT5 has a table"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_quantised_dtypes_are_refused(tmp_path, dtype):
    make("T5", "EncoderModel").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    save_file(weights | {name: weights[name].to(dtype)}, path)
    with pytest.raises(ValueError, match=f"{name}' has dtype {dtype}, so it is quantised"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("sharded", [False, True])
def test_variants_of_pipelines(tmp_path, sharded):
    """model.fp16.safetensors, as text encoders of diffusers' pipelines have it."""
    theirs = make("T5", "EncoderModel")
    theirs.save_pretrained(tmp_path, variant="fp16", max_shard_size="8KB" if sharded else "1GB")
    assert not (tmp_path / "model.safetensors").exists()
    assert (tmp_path / "model.safetensors.index.fp16.json").exists() == sharded
    check(tmp_path, theirs)
    save_file(load_file(next(tmp_path.glob("*.safetensors"))), tmp_path / "model.bf16.safetensors")
    if not sharded:
        with pytest.raises(ValueError, match=r"several variants of the weights, model.bf16.safetensors, model.fp16"):
            open_checkpoint(tmp_path)


def test_a_class_of_its_own_is_said_and_another_models_refused(tmp_path):
    make("GPT2", "LMHeadModel").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["RewardGPT2"]}))
    with pytest.warns(UserWarning, match="architectures is 'RewardGPT2', a class that transformers does not have"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "own.Model"}}))
    with pytest.raises(ValueError, match=r"auto_map is .*needs its own code"):
        open_checkpoint(tmp_path)
