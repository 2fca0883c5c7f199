"""torch.compile (inductor, dynamic shapes) beside eager mode: the bundled tiny models, and two layers of each base model.

Compiling takes the Python between the operators away and fuses what is none of them (embeddings, the pooler); the operators run
the same kernels. Two layers tell what twelve would, and compile in a sixth of the time.
"""

import torch

import pyfused
from pyfused.bench import Case

BATCH, LENGTH = 2, 128
BASE = {"num_layers": 2, "num_heads": 12, "hidden_dim": 768, "intermediate_dim": 3072}


def models():
    """Name -> a model of it, in evaluation mode."""
    for family in ("gpt2", "albert", "t5", "fnet"):
        yield f"{family} tiny", lambda family=family: pyfused.Backbone.from_preset(f"{family}_tiny_en")
    yield "gpt2 base, 2 layers", lambda: pyfused.GPT2Backbone(50257, **BASE)
    yield "albert base, 2 layers", lambda: pyfused.AlbertBackbone(30000, embedding_dim=128, **BASE)
    yield "t5 base, 2 + 2 layers", lambda: pyfused.T5Backbone(32128, **{**BASE, "intermediate_dim": 2048})
    yield (
        "fnet base, 2 layers",
        lambda: pyfused.FNetBackbone(32000, **{k: v for k, v in BASE.items() if "heads" not in k}),
    )


def inputs(model, batch, length, device):
    """A batch whose rows are real to the last but one token."""
    ids = torch.randint(5, model.get_config()["vocabulary_size"], (batch, length), device=device)
    mask = torch.ones_like(ids)
    mask[:, -1] = 0
    found = {}
    for tokens, padding in model.texts:
        found[tokens] = ids
        if padding is not None:
            found[padding] = mask
    if not isinstance(model, pyfused.GPT2Backbone | pyfused.T5Backbone):
        found["segment_ids"] = torch.zeros_like(ids)
    return found


def last(found):
    """The hidden states behind the last layer."""
    if isinstance(found, torch.Tensor):
        return found
    return found["decoder_sequence_output" if "decoder_sequence_output" in found else "sequence_output"]


def cases(device):
    for name, make in models():
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = make().to(device).eval()
        length = min(LENGTH, model.get_config().get("max_sequence_length", LENGTH))
        compiled = torch.compile(model, fullgraph=True, dynamic=True)
        given = inputs(model, BATCH, length, device)
        with torch.no_grad():
            compiled(inputs(model, BATCH + 1, length - 3, device))  # compiled for another size than the measured one

            def with_compile():
                return last(compiled(given))

            def eagerly():
                return last(model(given))

            yield Case(
                f"{name}, {BATCH}x{length} float32",
                {"pyfused": with_compile, "eager": eagerly},
                baseline="eager",
                seconds=6.0,
            )
