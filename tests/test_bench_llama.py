"""Does llama.cpp get GPT-2's weights and texts as they are? Where its package is missing, a stub takes its place: pip would
compile it for many minutes."""

import ctypes
import importlib.util
import sys
from types import SimpleNamespace

import gguf
import pytest
import torch
import transformers

from pyfused.bench import peers_llama

# GGUF's names of GPT-2's tensors, and transformers'.
LAYER = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
NAMES = {"token_embd": "wte", "position_embd": "wpe", "output_norm": "ln_f"} | {
    f"blk.{layer}.{name}": f"h.{layer}.{theirs}" for layer in range(2) for name, theirs in LAYER.items()
}


@pytest.fixture(autouse=True)
def inference():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture
def model():
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=2, n_positions=40, vocab_size=101)
    model = transformers.GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():  # biases are zeros, norms ones
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model


# Q8_0 also rounds a block's scale, to float16.
STEPS = {"F32": 0.0, "F16": 2.0**-11, "BF16": 2.0**-8, "Q8_0": 0.5 / 127 + 2.0**-11}


@pytest.mark.parametrize("kind, steps", STEPS.items())
def test_a_gguf_file_has_the_weights(model, kind, steps, tmp_path):
    """steps: the largest rounding error beside the largest of 32 values."""
    peers_llama.write_gguf(model, tmp_path / "gpt2.gguf", kind)
    read = gguf.GGUFReader(tmp_path / "gpt2.gguf")
    values = {tensor.name: tensor for tensor in read.tensors}
    assert {name.removesuffix(".weight").removesuffix(".bias") for name in values} == NAMES.keys()
    assert len(values) == len(list(model.parameters()))
    for name, tensor in values.items():
        ours, _, part = name.rpartition(".")
        expected = model.get_parameter(f"transformer.{NAMES[ours]}.{part}")
        if expected.dim() == 2 and ours.startswith("blk"):
            expected = expected.mT
        found = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        assert found.shape == expected.shape, name
        rounded = expected.dim() == 2 and ours != "position_embd"
        assert tensor.tensor_type.name == (kind if rounded else "F32"), name
        error, scale = ((t.reshape(-1, 32).abs().amax(1)) for t in (found - expected, expected))
        assert (error <= steps * rounded * scale).all(), name
    config = {name: field.contents() for name, field in read.fields.items()}
    assert config["general.architecture"] == "gpt2"
    assert config["gpt2.attention.head_count"] == 2
    assert config["gpt2.context_length"] == 40


class Stub:
    """The functions of llama.cpp that peers_llama calls. transformers' model computes."""

    llama_backend_init = llama_model_free = llama_free = llama_batch_free = staticmethod(lambda *_: None)
    llama_model_default_params = llama_context_default_params = staticmethod(SimpleNamespace)
    llama_get_memory = staticmethod(lambda context: context)

    def __init__(self, model):
        self.model = model

    def llama_model_load_from_file(self, path, params):
        return gguf.GGUFReader(path.decode())

    def llama_init_from_model(self, model, options):
        self.options, self.texts = options, [[] for _ in range(options.n_seq_max)]
        return "context"

    def llama_batch_init(self, count, embedding, texts):
        fields = {name: [0] * count for name in ("token", "pos", "n_seq_id", "logits")}
        return SimpleNamespace(n_tokens=0, seq_id=[[0] for _ in range(count)], **fields)

    def llama_memory_seq_rm(self, memory, text, first, last):
        assert (text, last) == (-1, -1)  # all texts, to their ends
        for tokens in self.texts:
            del tokens[first:]

    def llama_decode(self, context, batch):
        self.rows = {}
        if batch.n_tokens > self.options.n_batch:
            return -1
        for i in range(batch.n_tokens):
            tokens = self.texts[batch.seq_id[i][0]]
            if (batch.n_seq_id[i], batch.pos[i]) != (1, len(tokens)):
                return -1
            tokens.append(batch.token[i])
            if batch.logits[i]:
                self.rows[i] = self.model(torch.tensor([tokens])).logits[0, -1]
        return 0

    def llama_get_logits_ith(self, context, i):
        row = (ctypes.c_float * self.model.config.vocab_size)(*self.rows[i].tolist())
        return ctypes.cast(row, ctypes.POINTER(ctypes.c_float))


ENGINES = ["stub", *(["llama.cpp"] if importlib.util.find_spec("llama_cpp") else [])]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("texts", [1, 3])
@pytest.mark.parametrize("call", [peers_llama.gpt2_prompt, peers_llama.gpt2_token], ids=["prompt", "token"])
def test_logits_of_texts(model, call, texts, engine, monkeypatch):
    """Of another length than a row of the benchmarks, and twice: the cache goes back."""
    if engine == "stub":
        monkeypatch.setitem(sys.modules, "llama_cpp", Stub(model))
    ids = torch.randint(101, (texts, 9))
    exact = model(ids).logits[:, -1]
    made = call(model, ids)
    assert list(made) == [peers_llama.LLAMA, peers_llama.Q8_0]
    for name, make in made.items():
        peer = make()
        for found in (peer(), peer()):
            assert found.shape == exact.shape
            error = float((found - exact).square().mean().sqrt() / exact.square().mean().sqrt())
            assert error < (1e-6 if engine == "stub" else 0.1 if name == peers_llama.Q8_0 else 0.01), name


def test_results_have_the_models_dtype(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", Stub(model))
    made = peers_llama.gpt2_prompt(model.bfloat16(), torch.randint(101, (1, 9)))
    assert list(made) == [peers_llama.LLAMA]
    assert made[peers_llama.LLAMA]()().dtype == torch.bfloat16


@pytest.mark.parametrize("fails", ["llama_model_load_from_file", "llama_init_from_model", "llama_decode"])
def test_a_call_that_fails_is_an_error(model, fails, monkeypatch):
    stub = Stub(model)
    monkeypatch.setattr(stub, fails, lambda *_: 1 if fails == "llama_decode" else None)
    monkeypatch.setitem(sys.modules, "llama_cpp", stub)
    with pytest.raises(RuntimeError, match=r"llama"):
        peers_llama.gpt2_prompt(model, torch.randint(101, (1, 9)))["llama.cpp"]()()
