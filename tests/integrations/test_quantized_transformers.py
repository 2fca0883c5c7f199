"""Do transformers' models run on int8 weights, fused or not, with one copy for the table and the head?"""

import copy
import pickle

import pytest
import torch
from hf_cases import BERT, GPT2, T5, livened, tokens
from quantized_cases import bytes_of, kinds
from torch import nn

import pyfused
from pyfused import quantize_, unquantize_
from pyfused.nn import QuantizedEmbedding, QuantizedLinear
from pyfused.testing import assert_close


def hf_gpt2(**more):
    import transformers as hf

    return livened(hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2, **more)))


def hf_t5(**more):
    import transformers as hf

    return livened(hf.T5ForConditionalGeneration(hf.T5Config(**T5, **more)))


def hf_bert():
    import transformers as hf

    return livened(hf.BertForMaskedLM(hf.BertConfig(**BERT)))


TRANSFORMERS = {
    "gpt2": (hf_gpt2, {}),
    "t5": (hf_t5, {}),
    "t5, gated": (hf_t5, {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "bert": (hf_bert, {}),
}


def hf_inputs(model):
    ids = tokens(2, 12)
    more = {"decoder_input_ids": tokens(2, 7)} if model.config.is_encoder_decoder else {}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}


@pytest.mark.parametrize("fused", [False, True, "after"], ids=["plain", "fused before", "fused after"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name, fused):
    make, options = TRANSFORMERS[name]
    model = make(**options)
    inputs = hf_inputs(model)
    if fused is True:
        pyfused.fuse_(model)
    report = quantize_(model)
    if fused == "after":
        pyfused.fuse_(model)
    plain = unquantize_(pyfused.unfuse_(copy.deepcopy(model)))
    assert not any(isinstance(m, (QuantizedLinear, QuantizedEmbedding)) for m in plain.modules())
    with torch.no_grad():
        found, expected = model(**inputs).logits, plain(**inputs).logits
        truth = copy.deepcopy(plain).double()(**inputs).logits
    assert_close(found, expected, truth)
    left = {entry.note for entry in report.left}
    assert left <= {"only tables of tokens are quantised"}
    assert all(
        isinstance(m, (QuantizedLinear, QuantizedEmbedding))
        for m in map(dict(model.named_modules()).get, kinds(report))
    )
    assert report.bytes_after == bytes_of(model) < 0.5 * report.bytes_before


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_transformers_generate(name, fused):
    model = TRANSFORMERS[name][0]()
    if fused:
        pyfused.fuse_(model)
    quantize_(model)
    plain = unquantize_(pyfused.unfuse_(copy.deepcopy(model)))
    ids = tokens(2, 6)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))


@pytest.mark.parametrize("name", ["gpt2", "t5", "bert"])
def test_tied_weights_are_one_copy(name, tmp_path):
    model = TRANSFORMERS[name][0]()
    report = quantize_(model)
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    assert type(head) is QuantizedLinear
    assert type(table) is QuantizedEmbedding
    assert head.weight is table.weight
    assert head.scale is table.scale
    assert "shared with" in str(report)
    copies = {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "half": copy.deepcopy(model).half(),
    }
    copies["moved"] = copy.deepcopy(model).to("meta")
    for made in copies.values():
        assert made.get_output_embeddings().weight is made.get_input_embeddings().weight
        assert made.get_output_embeddings().scale is made.get_input_embeddings().scale
    restored = unquantize_(model)
    assert restored.get_output_embeddings().weight is restored.get_input_embeddings().weight
    assert isinstance(restored.get_output_embeddings().weight, nn.Parameter)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_save_pretrained_is_refused(scheme, tmp_path):
    """Its reader would take the integers for the weights. Other ways to save go on, and floats are saved again."""
    import transformers as hf

    model = hf_gpt2()
    quantize_(model.transformer, scheme)
    for part in (model, model.transformer):
        with pytest.raises(ValueError, match=r"save_pretrained: .* has int[48] weights"):
            part.save_pretrained(tmp_path)
    assert any(t.dtype == torch.int8 for t in model.state_dict().values())
    unquantize_(model)
    model.save_pretrained(tmp_path)
    x = tokens(2, 5)
    assert torch.equal(hf.GPT2LMHeadModel.from_pretrained(tmp_path).eval()(x).logits, model(x).logits)


def test_adapters_beside_integers_are_saved():
    """transformers asks for the whole state dict then too, and writes the adapters alone."""
    saver = {"__name__": "transformers.modeling_utils"}
    exec("def save_pretrained(self): return self.state_dict()", saver)
    model = hf_gpt2()
    quantize_(model.transformer)
    with pytest.raises(ValueError, match="save_pretrained"):
        saver["save_pretrained"](model)
    model._hf_peft_config_loaded = True
    assert any(t.dtype == torch.int8 for t in saver["save_pretrained"](model).values())


def test_float16_t5_of_transformers_keeps_wo_in_float32():
    """Its `wo` is float32 beside float16, because the products do not fit into float16."""
    model = hf_t5()
    model.half()
    for module in model.modules():
        if type(module).__name__ == "T5DenseActDense":
            module.wo.float()
    inputs = hf_inputs(model)
    quantize_(model)
    wo = model.encoder.block[0].layer[1].DenseReluDense.wo
    assert wo.dtype == torch.float32
    assert wo(torch.ones(1, 48, dtype=torch.float16)).dtype == torch.float32
    plain = unquantize_(copy.deepcopy(model))
    assert plain.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32
    fused, wide = copy.deepcopy(model), copy.deepcopy(plain).double()
    pyfused.fuse_(fused)
    with torch.no_grad():
        for m in (model, fused):
            assert_close(*(one(**inputs).logits for one in (m, plain, wide)))


def test_fused_blocks_call_their_quantised_children():
    """The old weights must not be read anywhere: other integers give other outputs."""
    for name in ("gpt2", "t5", "t5, gated", "bert"):
        make, options = TRANSFORMERS[name]
        model = make(**options)
        pyfused.fuse_(model)
        quantize_(model)
        inputs = hf_inputs(model)
        layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
        with torch.no_grad():
            before = model(**inputs).logits
            for layer in layers:
                was = layer.scale.clone()
                layer.scale.mul_(1.5)
                assert not torch.equal(model(**inputs).logits, before), layer
                layer.scale.copy_(was)
            assert torch.equal(model(**inputs).logits, before)
