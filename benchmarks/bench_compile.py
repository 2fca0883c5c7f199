"""torch.compile (inductor, dynamic shapes) beside eager mode: the bundled tiny models, two layers of each base model, and fused
transformers models of four narrow layers.

Compiling removes the Python code between the operators and fuses the rest (embeddings, the pooler). The operators run the same
kernels. Before each call torch.compile checks its guards: about 500 here, in 0.25 ms. Two layers show the same as twelve and
compile in a sixth of the time.
"""

import copy
from functools import partial

import torch

import pyfused
from pyfused.bench import Calls, Case, cost_of
from pyfused.testing import running

BATCH, LENGTH = 2, 128
SIZES = (BATCH, LENGTH), (BATCH + 1, LENGTH - 28)  # to measure, and to compile first
BASE = {"num_layers": 2, "num_heads": 12, "hidden_dim": 768, "intermediate_dim": 3072}


def cases(setup):
    if setup.small:  # compiling takes half a minute for any size; tests/test_compile.py covers it
        return
    for name, make in models():
        yield Case(f"{name}, {BATCH}x{LENGTH}", torch.float32, partial(backbone, setup, make))
    for name, make, options in transformers_models():
        title = f"transformers' {name}, fused, 4 layers of 128, {BATCH}x{LENGTH}"
        yield Case(title, torch.float32, partial(fused, setup, make, options))


def models():
    """Yields (name, a function that makes the model)."""
    for family in ("gpt2", "albert", "t5", "fnet"):
        yield f"{family} tiny", lambda family=family: pyfused.Backbone.from_preset(f"{family}_tiny_en")
    yield "gpt2 base, 2 layers", lambda: pyfused.GPT2Backbone(50257, **BASE)
    yield "albert base, 2 layers", lambda: pyfused.AlbertBackbone(30000, embedding_dim=128, **BASE)
    yield "t5 base, 2 + 2 layers", lambda: pyfused.T5Backbone(32128, **{**BASE, "intermediate_dim": 2048})
    yield (
        "fnet base, 2 layers",
        lambda: pyfused.FNetBackbone(32000, **{k: v for k, v in BASE.items() if "heads" not in k}),
    )


def transformers_models():
    """Yields (name, a function that makes a transformers model, arguments of its call beside the ids)."""

    def hf():
        import transformers

        return transformers

    narrow = {"num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 512}
    yield "gpt2", lambda: hf().GPT2Model(hf().GPT2Config(n_layer=4, n_embd=128, n_head=2)), {"use_cache": False}
    yield "albert", lambda: hf().AlbertModel(hf().AlbertConfig(**narrow, num_attention_heads=2)), {}
    yield (
        "t5 encoder",
        lambda: hf().T5EncoderModel(hf().T5Config(num_layers=4, d_model=128, d_ff=512, num_heads=2)),
        {},
    )
    yield "fnet", lambda: hf().FNetModel(hf().FNetConfig(**narrow)), {}


def inputs(model, batch, length, device):
    """A batch in which the last token of each row is padding."""
    ids = torch.randint(5, model.get_config()["vocabulary_size"], (batch, length), device=device)
    mask = torch.ones_like(ids)
    mask[:, -1] = 0
    arguments = {}
    for tokens, padding in model.texts:
        arguments[tokens] = ids
        if padding is not None:
            arguments[padding] = mask
    if not isinstance(model, pyfused.GPT2Backbone | pyfused.T5Backbone):
        arguments["segment_ids"] = torch.zeros_like(ids)
    return arguments


def last(output):
    """The hidden states after the last layer."""
    if isinstance(output, torch.Tensor):
        return output
    if hasattr(output, "last_hidden_state"):
        return output.last_hidden_state
    return output["decoder_sequence_output" if "decoder_sequence_output" in output else "sequence_output"]


def backbone(setup, make):
    torch._dynamo.reset()
    model = make().to(setup.device).eval()
    length = min(LENGTH, model.get_config().get("max_sequence_length", LENGTH))
    return pair(model, *(inputs(model, b, s, setup.device) for b, s in ((BATCH, length), (BATCH + 1, length - 3))))


def fused(setup, make, options):
    torch._dynamo.reset()
    model = make().to(setup.device).eval()
    pyfused.fuse_(model)
    return pair(model, *({"input_ids": torch.randint(5, 200, size, device=setup.device), **options} for size in SIZES))


def pair(model, given, warm):
    """The compiled model beside the model itself. The first call, which compiles, has another size (`warm`)."""
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad():
        compiled(**warm)

    def exact():
        with running("reference", strict=False):
            return last(copy.deepcopy(model).double()(**given))

    def eager():
        return last(model(**given))

    # torch.compile leaves a call alone that a dispatch mode watches, as cost_of() does.
    return Calls(lambda: last(compiled(**given)), eager, exact=exact, baseline="not compiled", cost=cost_of(eager))
