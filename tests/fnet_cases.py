"""What do the FNet tests compare with? The golden cases, and transformers models with the same weights."""

import torch
from golden_cases import ROOT, case, manifest
from safetensors.torch import load_file

from pyfused import FNetBackbone, backend

__all__ = ["ROOT", "case", "manifest"]

RENAMED = {
    "input_ids": "token_ids", "token_type_ids": "segment_ids", "position_ids": "position_ids",
    "inputs_embeds": "inputs_embeds",
}  # fmt: skip
RENAMED_OUTPUTS = {"sequence_output": "last_hidden_state", "pooled_output": "pooler_output"}
NAMES = {
    "embeddings.word_embeddings": "token_embedding",
    "embeddings.position_embeddings": "position_embedding",
    "embeddings.token_type_embeddings": "segment_embedding",
    "embeddings.LayerNorm": "embedding_norm",
    "embeddings.projection": "projection",
    "pooler.dense": "pooler",
    "fourier.output.LayerNorm": "mixing_norm",
    "intermediate.dense": "feed_forward.inner",
    "output.dense": "feed_forward.outer",
    "output.LayerNorm": "feed_forward_norm",
}


def fnet_state(state):
    """transformers' FNet state dict under pyfused's names (independent of pyfused's map)."""
    out = {}
    for key, tensor in state.items():
        short = key.removeprefix("fnet.")
        if short.startswith("cls.") or "dft_mat" in short:
            continue
        module, _, kind = short.rpartition(".")
        layer = ""
        if module.startswith("encoder.layer."):
            _, _, index, module = module.split(".", 3)
            layer = f"layers.{index}."
        out[f"{layer}{NAMES[module]}.{kind}"] = tensor.clone()
    return out


def fnet_arguments(config):
    """FNetBackbone's constructor arguments for transformers' configuration, as a dict."""
    return {
        "vocabulary_size": config["vocab_size"],
        "num_layers": config["num_hidden_layers"],
        "hidden_dim": config["hidden_size"],
        "intermediate_dim": config["intermediate_size"],
        "dropout": config["hidden_dropout_prob"],
        "max_sequence_length": config["max_position_embeddings"],
        "num_segments": config["type_vocab_size"],
        "activation": config["hidden_act"],
        "layer_norm_epsilon": config["layer_norm_eps"],
    }


def fnet(config, state, dtype=torch.float32):
    """The backbone with transformers' configuration (a dict) and weights, in evaluation mode."""
    model = FNetBackbone(**fnet_arguments(config), dtype=dtype)
    model.load_state_dict(fnet_state(state))
    return model.eval()


def fnet_of_case(entry, dtype=torch.float32):
    weights = manifest()["weights"][entry["weights"]]
    return fnet(weights["hf_config"], load_file(ROOT / weights["file"]), dtype)


def call_of(inputs):
    """The inputs by pyfused's names; missing segment ids are None."""
    return {"segment_ids": None} | {RENAMED[name]: value for name, value in inputs.items()}


def outputs_of(model, call):
    """pyfused's outputs by transformers' names."""
    return {RENAMED_OUTPUTS[name]: value for name, value in model(call).items()}


def reference_outputs(model, call):
    """outputs_of with the reference operators, in plain PyTorch."""
    with backend("reference"):
        return outputs_of(model, call)


def hf_fnet(dtype=torch.float32, seed=0, spread=0.2, **config):
    """transformers' FNetModel (toy sizes unless `config` says otherwise) in evaluation mode. All weights, norms and biases
    too, are random with standard deviation `spread`."""
    from transformers import FNetConfig, FNetModel

    toy = {"vocab_size": 61, "num_hidden_layers": 2, "hidden_size": 24, "intermediate_size": 56}
    toy |= {"max_position_embeddings": 40}
    model = FNetModel(FNetConfig(**{**toy, **config}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if name.endswith("LayerNorm.weight") else 0.0
            parameter.copy_(centre + spread * torch.randn(parameter.shape, generator=generator))
    return (model if dtype == torch.float32 else model.to(dtype)).eval()  # .to() would make complex buffers real


def like_hf(hf, dtype=None):
    """The pyfused model with the weights of a transformers FNet."""
    dtype = dtype or hf.embeddings.word_embeddings.weight.dtype
    return fnet(hf.config.to_dict(), {k: v.to(dtype) for k, v in hf.state_dict().items()}, dtype)
