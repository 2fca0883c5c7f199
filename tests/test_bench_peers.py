"""Do the peers compute the same as transformers' model, and does a report name missing ones?"""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
import transformers

from pyfused.bench import Setup, peers, peers_models
from pyfused.bench.run import bench, cases

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(autouse=True)
def inference():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def relative_error(found, exact):
    return float((found - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def agree(made, exact, calls=1):
    """A peer's first result and its result number `calls` equal transformers' model; int8 peers only roughly."""
    for name, make in made.items():
        call = make()
        results = [call() for _ in range(calls)]
        for found in (results[0], results[-1]):
            assert found.shape == exact.shape
            assert relative_error(found, exact) < (0.35 if name == peers_models.INT8 else 1e-5), name


def test_a_missing_package_is_named_with_how_to_install_it(monkeypatch):
    monkeypatch.setitem(peers.PEERS, "openvino", ("no_such_package",))
    assert peers.missing("openvino", "cpu") == "not installed: no_such_package (pip install 'pyfused[bench]')"
    monkeypatch.setitem(peers.PEERS, "llama.cpp", ("no_such_package",))
    monkeypatch.setitem(peers.COMPILED, "no_such_package", "no-such-package")
    assert peers.missing("llama.cpp", "cpu") == "not installed: no_such_package (pip install no-such-package)"
    assert peers.missing("ctranslate2", "cuda")
    assert peers.missing("cuda", "cpu")
    found = bench(["linear"], Setup("cpu", (torch.float32,), small=True), peers=["openvino"], seconds=0)
    assert "no_such_package" in found["missing"]["openvino"]


def test_an_unknown_peer_is_refused():
    with pytest.raises(ValueError, match="no_peer"):
        bench(["linear"], peers=["no_peer"])


@pytest.mark.parametrize("packages", [packages for name, packages in peers.PEERS.items() if name in peers._ON_CPU])
def test_the_peers_of_the_test_group_are_installed(packages):
    assert all(importlib.util.find_spec(package) for package in packages if package != "llama_cpp")


def gpt2(texts=1):
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 101, "bos_token_id": 0, "eos_token_id": 0}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    ids = torch.randint(101, (texts, 9))
    return model, ids, model(ids).logits[:, -1]


@pytest.mark.parametrize("texts", [1, 3])
def test_ctranslate2_gpt2_prompt(texts):
    model, ids, exact = gpt2(texts)
    agree(peers_models.gpt2_prompt(model, ids), exact, 2)


@pytest.mark.parametrize("texts", [1, 3])
def test_ctranslate2_gpt2_token_is_the_same_again_after_32(texts):
    model, ids, exact = gpt2(texts)
    agree(peers_models.gpt2_token(model, ids), exact, 33)


def test_ctranslate2s_results_have_the_models_dtype():
    model = SimpleNamespace(dtype=torch.bfloat16)  # which few processors take
    made = peers_models._kinds(model, lambda kind: lambda: torch.zeros(1))
    assert {name: make()().dtype for name, make in made.items()} == {"ctranslate2": torch.bfloat16}


def t5():
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 80, "num_layers": 2, "num_heads": 4, "vocab_size": 101}
    config = transformers.T5Config(**sizes, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    return transformers.T5ForConditionalGeneration(config).eval(), torch.randint(101, (1, 9))


def test_ctranslate2_t5_encoder():
    model, ids = t5()
    agree(peers_models.t5_encoder(model, ids), model.get_encoder()(ids).last_hidden_state)


def test_ctranslate2_t5_token_is_the_same_again_after_a_text():
    model, ids = t5()
    written = torch.zeros(1, 4, dtype=torch.int64)
    exact = model(input_ids=ids, decoder_input_ids=written).logits[:, -1]
    agree(peers_models.t5_token(model, ids, cached=3), exact, 8)


@pytest.mark.parametrize("texts", [1, 3])
def test_a_waiting_generation_ends_with_its_call(texts):
    model, ids, _ = gpt2(texts)
    call = peers_models.gpt2_token(model, ids)["ctranslate2"]()
    for _ in range(3):
        call()
    del call  # its thread waits for another token: this must not hang


def test_exported_models():
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 40, "num_hidden_layers": 2}
    config = transformers.BertConfig(**sizes, vocab_size=101, **NO_DROPOUT)
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    ids = torch.randint(101, (2, 9))

    def call(model, ids):
        return model(ids).last_hidden_state

    made = peers_models.exported(model, call, (ids,), lambda states: states[:, 0])
    assert set(made) == {"openvino", "onnxruntime"}
    agree(made, call(model, ids)[:, 0], 2)
    assert set(peers_models.exported(model.bfloat16(), call, (ids,))) == {"openvino"}


@pytest.mark.parametrize("name, wanted", [("gpt2", ["ctranslate2"]), ("t5", ["ctranslate2"])])
def test_the_rows_of_a_benchmark_have_them(name, wanted, monkeypatch):
    """Without the rows of integer weights: in models so small the peer's rounding is a large part of the result."""
    setup = Setup("cpu", (torch.float32,), small=True)
    rows = [case for case in cases(name, setup) if not case.name.startswith(("train", "int8", "int4"))]
    monkeypatch.setattr("pyfused.bench.run.cases", lambda *_: rows)
    for row in bench([name], setup, peers=wanted, seconds=0)["rows"]:
        assert row["left_out"] == {}
        assert set(wanted) < set(row["seconds"])
