"""What do the ALBERT tests compare with? The golden cases, and transformers models with the same weights."""

import torch
from golden_cases import ROOT, case, manifest
from safetensors.torch import load_file

from pyfused import AlbertBackbone, backend

__all__ = ["ROOT", "case", "manifest"]

RENAMED = {
    "input_ids": "token_ids", "token_type_ids": "segment_ids", "attention_mask": "padding_mask",
    "inputs_embeds": "inputs_embeds", "position_ids": "position_ids",
}  # fmt: skip
RENAMED_OUTPUTS = {"last_hidden_state": "sequence_output", "pooler_output": "pooled_output"}
MODULES = {
    "token_embedding": "embeddings.word_embeddings", "position_embedding": "embeddings.position_embeddings",
    "segment_embedding": "embeddings.token_type_embeddings", "embedding_norm": "embeddings.LayerNorm",
    "projection": "encoder.embedding_hidden_mapping_in", "pooler": "pooler",
}  # fmt: skip
LAYER = {
    "attention.output": "attention.dense", "attention_norm": "attention.LayerNorm", "feed_forward.inner": "ffn",
    "feed_forward.outer": "ffn_output", "feed_forward_norm": "full_layer_layer_norm",
}  # fmt: skip


def albert_state(state):
    """transformers' ALBERT state dict, with or without its prefix, under pyfused's names (independent of pyfused's map)."""
    state = {k.removeprefix("albert."): v for k, v in state.items()}
    out = {}

    def copy(ours, theirs):
        for kind in ("weight", "bias"):
            if f"{theirs}.{kind}" in state:
                out[f"{ours}.{kind}"] = state[f"{theirs}.{kind}"]

    for ours, theirs in MODULES.items():
        copy(ours, theirs)
    places = {(int(k.split(".")[2]), int(k.split(".")[4])) for k in state if ".albert_layers." in k}
    for group, inner in sorted(places):
        ours = f"layers.{group}.{inner}."
        theirs = f"encoder.albert_layer_groups.{group}.albert_layers.{inner}."
        for name, other in LAYER.items():
            copy(ours + name, theirs + other)
        for kind in ("weight", "bias"):
            rows = [state[f"{theirs}attention.{part}.{kind}"] for part in ("query", "key", "value")]
            out[f"{ours}attention.query_key_value.{kind}"] = torch.cat(rows)
    return {name: tensor.clone() for name, tensor in out.items()}


def albert_arguments(config):
    """AlbertBackbone's constructor arguments for transformers' configuration, as a dict of version 5."""
    return {
        "vocabulary_size": config["vocab_size"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "embedding_dim": config["embedding_size"],
        "hidden_dim": config["hidden_size"],
        "intermediate_dim": config["intermediate_size"],
        "num_groups": config["num_hidden_groups"],
        "num_inner_repetitions": config["inner_group_num"],
        "dropout": config["hidden_dropout_prob"],
        "attention_dropout": config["attention_probs_dropout_prob"],
        "feed_forward_dropout": 0.0,
        "max_sequence_length": config["max_position_embeddings"],
        "num_segments": config["type_vocab_size"],
        "activation": config["hidden_act"],
        "layer_norm_epsilon": config["layer_norm_eps"],
    }


def albert(config, state, dtype=torch.float32):
    """The backbone with transformers' configuration (a dict) and weights, in evaluation mode."""
    state = albert_state(state)
    model = AlbertBackbone(**albert_arguments(config), pooler="pooler.weight" in state, dtype=dtype)
    model.load_state_dict(state)
    return model.eval()


def albert_of_case(entry, dtype=torch.float32):
    weights = manifest()["weights"][entry["weights"]]
    return albert(weights["hf_config"], load_file(ROOT / weights["file"]), dtype)


def call_of(inputs):
    """The inputs by pyfused's names; missing segments or masks are None."""
    call = {"segment_ids": None, "padding_mask": None}
    return call | {RENAMED[k]: v for k, v in inputs.items() if k in RENAMED}


def outputs_of(model, call):
    """pyfused's outputs by transformers' names."""
    out = model(call)
    return {theirs: out[ours] for theirs, ours in RENAMED_OUTPUTS.items() if ours in out}


def reference_outputs(model, call):
    """outputs_of with the reference operators, in plain PyTorch."""
    with backend("reference"):
        return outputs_of(model, call)


def hf_albert(dtype=torch.float32, seed=0, spread=0.2, kind="AlbertModel", attention="sdpa", **config):
    """A transformers model (toy sizes unless `config` says otherwise) in evaluation mode. All weights, biases and norms too,
    are random with standard deviation `spread`."""
    import transformers

    toy = {"vocab_size": 61, "num_hidden_layers": 4, "num_attention_heads": 4, "embedding_size": 10, "hidden_size": 24}
    toy |= {"intermediate_size": 56, "num_hidden_groups": 2, "inner_group_num": 2, "max_position_embeddings": 33}
    made = transformers.AlbertConfig(**{**toy, **config})
    model = getattr(transformers, kind)._from_config(made, attn_implementation=attention)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm.weight" in name.lower() else 0.0
            parameter.copy_(centre + spread * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype).eval()


def like_hf(hf, dtype=None):
    """The pyfused model with the weights of a transformers AlbertModel."""
    dtype = dtype or hf.dtype
    return albert(hf.config.to_dict(), {k: v.to(dtype) for k, v in hf.state_dict().items()}, dtype)
