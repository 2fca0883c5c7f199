"""Does torch.compile compile a fused transformers model whole, once for all batches and lengths?"""

import pytest
import torch
import transformers as hf
from fused_pairs import padded
from hf_cases import VOCABULARY, build, livened
from torch._dynamo.testing import CompileCounterWithBackend

import pyfused

# All sizes differ: torch treats sizes that are equal in the first call as one size.
SIZES = ((7, 11), (3, 17), (5, 29))
FNET = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 48}
MODELS = {
    "gpt2": lambda: build("gpt2", n_layer=1),
    "albert": lambda: build("albert", num_hidden_layers=1),
    "t5": lambda: build("t5", num_layers=1, feed_forward_proj="gated-gelu", decoder_start_token_id=0),
    "bart's encoder": lambda: build("bart", encoder_layers=1, decoder_layers=1).encoder,
    "fnet": lambda: livened(hf.FNetModel(hf.FNetConfig(**FNET))),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_fused_model_is_one_graph_for_all_sizes(name):
    """backend="eager": only tracing can break here; test_compile.py compiles the same operators further."""
    torch._dynamo.reset()
    model = MODELS[name]()
    assert pyfused.fuse_(model).replaced
    counter = CompileCounterWithBackend("eager")
    with torch._dynamo.config.patch(specialize_float=True):
        call = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
        for batch, length in SIZES:
            ids, mask = padded(batch, length, VOCABULARY)
            given = {"input_ids": ids} if name == "fnet" else {"input_ids": ids, "attention_mask": mask}
            if name == "t5":
                given["decoder_input_ids"] = padded(batch, length + 2, VOCABULARY, seed=1)[0]
            if name in ("gpt2", "t5"):
                given["use_cache"] = False
            grads = []
            for function in (call, model):
                model.zero_grad()
                out = function(**given).last_hidden_state
                (out * torch.linspace(-1.0, 1.0, out.shape[-1])).sum().backward()
                grads.append([out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
            assert all(torch.equal(a, e) for a, e in zip(*grads, strict=True))
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("name", MODELS)
def test_a_fused_model_is_exported_for_all_sizes(name):
    model = MODELS[name]()
    pyfused.fuse_(model)
    sizes = {axis: torch.export.Dim(f"size{axis}", min=2, max=32) for axis in (0, 1)}

    def given(batch, length):
        ids, mask = padded(batch, length, VOCABULARY)
        given = {"input_ids": ids} if name == "fnet" else {"input_ids": ids, "attention_mask": mask}
        return {**given, "decoder_input_ids": ids.flip(1)} if name == "t5" else given

    fixed = {"use_cache": False} if name in ("gpt2", "t5") else {}
    first = given(3, 7)
    with torch.no_grad():
        program = torch.export.export(
            model, (), {**first, **fixed}, dynamic_shapes={**dict.fromkeys(first, sizes), **dict.fromkeys(fixed)}
        )
        assert "pyfused" in program.graph_module.code
        for batch, length in SIZES:
            inputs = {**given(batch, length), **fixed}
            torch.testing.assert_close(program.module()(**inputs)[0], model(**inputs)[0])


@pytest.mark.parametrize("kind", ["GPT2LMHeadModel", "T5ForConditionalGeneration"])
def test_compiled_generation_on_a_static_cache(kind):
    torch._dynamo.reset()
    small = MODELS["gpt2" if kind == "GPT2LMHeadModel" else "t5"]().config
    plain = livened(getattr(hf, kind)(small)).double()  # no rounding decides between two tokens
    ids, mask = padded(2, 6, VOCABULARY, "left")
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = plain.generate(ids, **options)
    pyfused.fuse_(plain)
    plain.forward = torch.compile(plain.forward, fullgraph=True, backend="eager")
    assert torch.equal(plain.generate(ids, **options, cache_implementation="static"), expected)
    torch._dynamo.reset()
