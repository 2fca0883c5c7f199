"""What do the tests of the four backbones compare with? transformers models with the same weights, and the golden cases.

A pyfused model gets transformers' weights through a checkpoint, as a user's does. Outputs that equal those of transformers, for
random weights, show that every weight is in its place.
"""

import json
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from golden_cases import ROOT, manifest
from safetensors.torch import load_file, save_file

from pyfused import Backbone, backend
from pyfused.checkpoints import open_checkpoint
from pyfused.families import FAMILIES, load
from pyfused.testing import assert_close

MASKS = {"attention_mask": "padding_mask", "encoder_attention_mask": "encoder_padding_mask"}
RENAMED = {
    "gpt2": {"input_ids": "token_ids"} | MASKS,
    "albert": {"input_ids": "token_ids", "token_type_ids": "segment_ids"} | MASKS,
    "fnet": {"input_ids": "token_ids", "token_type_ids": "segment_ids"},
    "t5": {"input_ids": "encoder_token_ids", "attention_mask": "encoder_padding_mask",
           "decoder_input_ids": "decoder_token_ids", "decoder_attention_mask": "decoder_padding_mask"},
}  # fmt: skip
RENAMED_OUTPUTS = {
    "sequence_output": "last_hidden_state", "pooled_output": "pooler_output",
    "encoder_sequence_output": "encoder_last_hidden_state", "decoder_sequence_output": "last_hidden_state",
}  # fmt: skip
REQUIRED = {  # inputs that a call must name, if only as None
    "gpt2": ("padding_mask",), "albert": ("segment_ids", "padding_mask"), "fnet": ("segment_ids",),
    "t5": ("encoder_padding_mask", "decoder_padding_mask"),
}  # fmt: skip
TOYS = {
    "gpt2": {"vocab_size": 61, "n_layer": 2, "n_head": 4, "n_embd": 24, "n_inner": 56, "n_positions": 40},
    "albert": {"vocab_size": 61, "num_hidden_layers": 4, "num_attention_heads": 4, "embedding_size": 10,
               "hidden_size": 24, "intermediate_size": 56, "num_hidden_groups": 2, "inner_group_num": 2,
               "max_position_embeddings": 33},
    "t5": {"vocab_size": 61, "num_layers": 2, "num_heads": 4, "d_model": 24, "d_ff": 56, "d_kv": 7,
           "decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu"},
    "fnet": {"vocab_size": 61, "num_hidden_layers": 2, "hidden_size": 24, "intermediate_size": 56,
             "max_position_embeddings": 40},
}  # fmt: skip
NAMES = {"gpt2": "GPT2", "albert": "Albert", "t5": "T5", "fnet": "FNet"}  # as transformers' classes begin


@contextmanager
def checkpoint(config, state):
    """A folder with transformers' configuration (a dict) and tensors."""
    with TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        save_file({name: t.detach().clone() for name, t in state.items()}, Path(folder, "model.safetensors"))
        yield folder


def backbone(config, state, dtype=torch.float32):
    """The pyfused model with transformers' configuration and weights, in evaluation mode."""
    with checkpoint(config, state) as folder:
        return Backbone.from_preset(folder, dtype=dtype)


def renamed(config, state):
    """transformers' tensors, weights or their gradients, under pyfused's names."""
    with checkpoint(config, state) as folder:
        return dict(open_checkpoint(folder).tensors(next(iter(state.values())).dtype))


def like_hf(hf, dtype=None):
    """The pyfused model with the weights of a transformers model."""
    return backbone(hf.config.to_dict(), hf.state_dict(), dtype or hf.dtype)


def backbone_of_options(family, **options):
    """A new pyfused model of toy sizes with these constructor arguments."""
    sizes = {"vocabulary_size": 61, "num_layers": 2, "num_heads": 4, "hidden_dim": 24, "intermediate_dim": 56}
    if family == "albert":
        sizes["embedding_dim"] = 10
    if family == "fnet":
        del sizes["num_heads"]
    return load(FAMILIES[family].backbone)(**{**sizes, **options})


def weights_of(entry):
    """transformers' configuration and weights of a golden case."""
    weights = manifest()["weights"][entry["weights"]]
    return dict(weights["hf_config"]), load_file(ROOT / weights["file"])


def backbone_of(entry, dtype=torch.float32):
    """The pyfused model of a golden case."""
    return backbone(*weights_of(entry), dtype)


def hf_model(family, dtype=torch.float32, seed=0, spread=0.2, kind=None, attention="sdpa", **config):
    """A transformers model of toy sizes in evaluation mode, without a head but for T5's; `kind` names another class. All
    weights, norms and biases too, are random with standard deviation `spread`."""
    import transformers

    made = getattr(transformers, f"{NAMES[family]}Config")(**{**TOYS[family], **config})
    kind = kind or NAMES[family] + ("ForConditionalGeneration" if family == "t5" else "Model")
    options = {} if family == "fnet" else {"attn_implementation": attention}
    model = getattr(transformers, kind)._from_config(made, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if parameter.dim() == 1 and name.endswith("weight") else 0.0
            parameter.copy_(centre + spread * torch.randn(parameter.shape, generator=generator))
    return (model if dtype == torch.float32 else model.to(dtype)).eval()  # .to() would make FNet's complex buffers real


hf_gpt2 = partial(hf_model, "gpt2", spread=0.05)
hf_albert, hf_fnet, hf_t5 = (partial(hf_model, family) for family in ("albert", "fnet", "t5"))


def call_of(family, inputs):
    """transformers' inputs by pyfused's names."""
    names = RENAMED[family]
    return dict.fromkeys(REQUIRED[family]) | {names.get(n, n): t for n, t in inputs.items() if n != "cotangent"}


def outputs_of(model, call):
    """pyfused's outputs by transformers' names."""
    out = model(call)
    if isinstance(out, torch.Tensor):
        return {"last_hidden_state": out}
    found = {RENAMED_OUTPUTS[name]: value for name, value in out.items()}
    decoded = out.get("decoder_sequence_output")
    return found if decoded is None else found | {"logits": model.logits(decoded)}


def reference_outputs(model, call):
    """outputs_of with the reference operators, in plain PyTorch."""
    with backend("reference"):
        return outputs_of(model, call)


def hf_outputs(hf, inputs):
    """The same outputs of a transformers model."""
    if hf.config.model_type != "t5":
        out = hf.base_model(**inputs)
        return {name: out[name] for name in ("last_hidden_state", "pooler_output") if out.get(name) is not None}
    out = hf(**inputs, output_hidden_states=True)
    found = {
        "encoder_last_hidden_state": out.encoder_last_hidden_state,
        "last_hidden_state": out.decoder_hidden_states[-1],
    }
    return found | ({"logits": out.logits} if "logits" in out else {})


def live(inputs, name):
    """(B, S) bool: the rows of T5's output that see a key in every attention they depend on. In the other rows pyfused gives
    zeros; the libraries give means and disagree among themselves."""
    ids = inputs["input_ids" if name.startswith("encoder") else "decoder_input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    rows = (mask.sum(1, keepdim=True) > 0).expand(ids.shape)
    if not name.startswith("encoder"):
        rows = rows & (inputs.get("decoder_attention_mask", torch.ones_like(ids)).cumsum(1) > 0)
    return rows


def ids_of(shape, limit=61, seed=0):
    return torch.randint(limit, shape, generator=torch.Generator().manual_seed(seed))


def inputs_of(family, rows=3, length=17, padding="none", vocabulary=61):
    """Inputs by transformers' names."""
    inputs, masks = {"input_ids": ids_of((rows, length), vocabulary)}, {"attention_mask": length}
    if family in ("albert", "fnet"):
        inputs["token_type_ids"] = ids_of((rows, length), 2, 1)
    if family == "t5":
        inputs["decoder_input_ids"] = ids_of((rows, length - 8), vocabulary, 1)
        masks["decoder_attention_mask"] = length - 8
    for name, size in masks.items() if padding != "none" else ():
        mask = torch.ones(rows, size, dtype=torch.int64)
        mask[1, size // 2 + 1 :], mask[2, 4:] = 0, 0
        inputs[name] = mask.flip(1) if padding == "left" else mask
    return inputs


def assert_near(plain, truth):
    """plain is near the truth. A plain result that is wrong itself would let anything pass the tolerance rule."""
    error, size = (plain.detach().cpu() - truth).abs().max(), truth.abs().max()
    assert error <= (1e-3 if plain.dtype == torch.float32 else 0.3) * size, (error, size)


def check_outputs(hf, inputs, device, what=""):
    """The same weights three times: transformers, pyfused, and pyfused in float64. The golden cases show that the last is the
    truth; transformers' T5 loses precision in float64."""
    call, plain = call_of(hf.config.model_type, inputs), hf_outputs(hf, inputs)
    mine, truth = like_hf(hf).to(device), outputs_of(like_hf(hf, torch.float64), call)
    actual, reference = outputs_of(mine, call), reference_outputs(mine, call)
    assert actual.keys() == plain.keys()
    for name, value in actual.items():
        assert value.dtype == hf.dtype
        rows = live(inputs, name) if "decoder_input_ids" in inputs else ...
        assert_near(plain[name][rows], truth[name][rows])
        plains = [plain[name][rows], reference[name].cpu()[rows]]
        assert_close(value.cpu()[rows], plains, truth[name][rows], f"{what} {name}")
