"""Does decode's kernel draw the tokens that the reference draws from the same logits with the same numbers?"""

import dataclasses

import decode_cases
import operator_calls
import pytest
import shim
import torch
from test_decode_blocks import results

from pyfused import extensions
from pyfused.decode_plan import Matrix
from pyfused.kernels.shared.draw import drawn_token

if not extensions.emulating_cuda():
    pytest.skip("this machine has a GPU: the kernels run there", allow_module_level=True)

VOCABULARY = 3000
TINY = {"hidden": 16, "heads": 1, "kv_heads": 1, "head_size": 8, "inner": 16}
# temperature, top k, top p; scores all 0 lie in one bucket, more than its list holds
CUTS = {
    "all": (1.0, 0, 1.0),
    "cold": (0.1, 0, 1.0),
    "flat": (2.0**126, 0, 1.0),
    "one": (0.7, 1, 1.0),
    "top k": (2.0, 40, 1.0),
    "flat top k": (2.0**126, 2100, 1.0),
    "all but one": (5.0, VOCABULARY - 1, 1.0),
    "beyond": (1.0, VOCABULARY, 1.0),
    "top p": (1.0, 0, 0.9),
    "least p": (1.0, 0, 1e-320),
    "flat top p": (2.0**126, 0, 0.6),
    "both": (3.0, 300, 0.8),
}


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setattr(decode_cases, "VOCABULARY", VOCABULARY)


def case(rows, cuts, dtype):
    new = operator_calls.Numbers("cpu", dtype)
    new.generator.manual_seed(3)
    plan, step = decode_cases.made(new, rows, 1, **TINY)
    uniform = torch.rand(rows, dtype=torch.float64, generator=new.generator)
    uniform[0], uniform[-1] = 1e-7, 1 - 2.0**-53  # at 0 the reference finds tokens of no weight here
    temperature, top_k, top_p = cuts
    step = step._replace(uniform=uniform, temperature=temperature, top_k=top_k, top_p=top_p)
    return dataclasses.replace(plan, logits_scale=6.0), step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CUTS)
def test_the_reference_s_tokens(name, dtype):
    """In bfloat16 many logits are equal, and their order decides."""
    plan, step = case(8, CUTS[name], dtype)
    logits, chosen, *_ = results(plan, step)
    assert chosen.tolist() == drawn_token(logits, step.uniform, *CUTS[name]).tolist()
    if name not in ("cold", "one", "least p"):
        assert chosen.tolist() != logits.argmax(-1).tolist()


@pytest.mark.parametrize("name", ["all", "flat top k", "both"])
def test_any_number_of_blocks_draws_the_same(name):
    plan, step = case(5, CUTS[name], torch.float16)
    expected = results(plan, step)[1].tolist()
    for blocks, order, threads in [(1, 1, 64), (7, 2, 128)]:
        with shim.order(shim.load(), order):
            assert results(plan, step, blocks=blocks, threads=threads)[1].tolist() == expected


def test_a_row_of_nan_chooses_none():
    plan, step = case(3, CUTS["both"], torch.float32)
    table = plan.token_embedding.weight.clone()
    table[step.tokens[1]] = torch.nan
    _, chosen, *_ = results(dataclasses.replace(plan, token_embedding=Matrix(table)), step)
    assert chosen[1] == -1
    assert (chosen[[0, 2]] >= 0).all()
