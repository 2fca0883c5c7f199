"""Does torch.compile compile a fused transformers model whole, once for all batches and lengths?"""

import pytest
import torch
from fused_pairs import padded
from torch._dynamo.testing import CompileCounterWithBackend

import pyfused

transformers = pytest.importorskip("transformers")

# All sizes differ: torch treats sizes that are equal in the first call as one size.
SIZES = ((7, 11), (3, 17), (5, 29))
MODELS = {
    "gpt2": lambda t: t.GPT2Model(
        t.GPT2Config(vocab_size=61, n_layer=1, n_head=4, n_embd=24, n_positions=48, bos_token_id=0, eos_token_id=0)
    ),
    "albert": lambda t: t.AlbertModel(
        t.AlbertConfig(
            vocab_size=61,
            embedding_size=12,
            hidden_size=24,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=40,
            max_position_embeddings=48,
        )
    ),
    "t5": lambda t: t.T5Model(
        t.T5Config(
            vocab_size=61,
            d_model=24,
            d_kv=6,
            d_ff=40,
            num_layers=1,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=0,
        )
    ),
    "bart's encoder": lambda t: (
        t.BartModel(
            t.BartConfig(
                vocab_size=61,
                d_model=24,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=40,
                decoder_ffn_dim=40,
            )
        ).encoder
    ),
    "fnet": lambda t: t.FNetModel(
        t.FNetConfig(
            vocab_size=61, hidden_size=24, num_hidden_layers=1, intermediate_size=40, max_position_embeddings=48
        )
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_fused_model_is_one_graph_for_all_sizes(name):
    """backend="eager": only tracing can break here; test_compile.py compiles the same operators further."""
    torch._dynamo.reset()
    model = MODELS[name](transformers).eval()
    assert pyfused.fuse_(model).replaced
    counter = CompileCounterWithBackend("eager")
    with torch._dynamo.config.patch(specialize_float=True):
        call = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
        for batch, length in SIZES:
            ids, mask = padded(batch, length, 61)
            given = {"input_ids": ids} if name == "fnet" else {"input_ids": ids, "attention_mask": mask}
            if name == "t5":
                given["decoder_input_ids"] = padded(batch, length + 2, 61, seed=1)[0]
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
    model = MODELS[name](transformers).eval()
    pyfused.fuse_(model)
    sizes = {axis: torch.export.Dim(f"size{axis}", min=2, max=32) for axis in (0, 1)}

    def given(batch, length):
        ids, mask = padded(batch, length, 61)
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
    small = MODELS["gpt2" if kind == "GPT2LMHeadModel" else "t5"](transformers).config
    plain = getattr(transformers, kind)(small).double().eval()  # no rounding decides between two tokens
    ids, mask = padded(2, 6, 61, "left")
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = plain.generate(ids, **options)
    pyfused.fuse_(plain)
    plain.forward = torch.compile(plain.forward, fullgraph=True, backend="eager")
    assert torch.equal(plain.generate(ids, **options, cache_implementation="static"), expected)
    torch._dynamo.reset()
