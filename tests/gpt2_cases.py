"""What do the GPT-2 tests compare with? The golden cases, and transformers models with the same weights."""

import torch
from golden_cases import ROOT, case, manifest
from safetensors.torch import load_file

from pyfused import GPT2Backbone

__all__ = ["ROOT", "case", "gpt2", "gpt2_arguments", "gpt2_of_case", "gpt2_state", "hf_gpt2", "like_hf", "manifest"]

LINEAR = ("query_key_value", "key_value", "output", "outer", "c_fc", "q_attn")


def gpt2_state(state):
    """transformers' GPT2Model state dict under pyfused's names; Conv1D is (in, out), Linear (out, in)."""
    names = {
        "wte": "token_embedding", "wpe": "position_embedding", "h": "layers", "ln_1": "attention_norm",
        "attn": "attention", "ln_cross_attn": "cross_attention_norm", "crossattention": "cross_attention",
        "ln_2": "feed_forward_norm", "mlp": "feed_forward", "ln_f": "final_norm", "c_fc": "inner", "q_attn": "query",
    }  # fmt: skip
    out = {}
    for key, tensor in state.items():
        parts = key.removeprefix("transformer.").split(".")
        if parts[0] == "lm_head":
            continue
        if "c_attn" in parts:
            parts[parts.index("c_attn")] = "key_value" if "crossattention" in parts else "query_key_value"
        if "c_proj" in parts:
            parts[parts.index("c_proj")] = "outer" if "mlp" in parts else "output"
        linear = parts[-1] == "weight" and parts[-2] in LINEAR
        out[".".join(names.get(p, p) for p in parts)] = tensor.t().contiguous() if linear else tensor.clone()
    return out


def gpt2_arguments(config):
    """GPT2Backbone's constructor arguments for transformers' configuration, as a dict."""
    return {
        "vocabulary_size": config["vocab_size"],
        "num_layers": config["n_layer"],
        "num_heads": config["n_head"],
        "hidden_dim": config["n_embd"],
        "intermediate_dim": config["n_inner"] or 4 * config["n_embd"],
        "dropout": config["resid_pdrop"],
        "max_sequence_length": config["n_positions"],
        "activation": config["activation_function"],
        "layer_norm_epsilon": config["layer_norm_epsilon"],
        "scale_attention": config["scale_attn_weights"],
        "scale_attention_by_inverse_layer_index": config["scale_attn_by_inverse_layer_idx"],
        "upcast_attention": config["reorder_and_upcast_attn"],
        "cross_attention": config["add_cross_attention"],
    }


def gpt2(config, state, dtype=torch.float32):
    """The backbone with transformers' configuration (a dict) and weights, in evaluation mode."""
    model = GPT2Backbone(**gpt2_arguments(config), dtype=dtype)
    model.load_state_dict(gpt2_state(state))
    return model.eval()


def gpt2_of_case(entry, dtype=torch.float32):
    weights = manifest()["weights"][entry["weights"]]
    return gpt2(weights["hf_config"], load_file(ROOT / weights["file"]), dtype)


def hf_gpt2(state=None, dtype=torch.float32, seed=0, spread=0.05, attention="sdpa", **config):
    """transformers' GPT2Model (toy sizes unless `config` says otherwise) in evaluation mode. All weights, biases and norms
    too, are random with standard deviation `spread`."""
    from transformers import GPT2Config, GPT2Model

    toy = {"vocab_size": 61, "n_layer": 2, "n_head": 4, "n_embd": 24, "n_inner": 56, "n_positions": 40}
    model = GPT2Model._from_config(GPT2Config(**{**toy, **config}), attn_implementation=attention)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = (
                1.0 if name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight", "ln_cross_attn.weight")) else 0.0
            )
            parameter.copy_(centre + spread * torch.randn(parameter.shape, generator=generator))
    if state is not None:
        model.load_state_dict(state)
    return model.to(dtype).eval()


def like_hf(hf, dtype=None):
    """The pyfused model with the weights of a transformers GPT2Model."""
    dtype = dtype or next(hf.parameters()).dtype
    return gpt2(hf.config.to_dict(), {k: v.to(dtype) for k, v in hf.state_dict().items()}, dtype)
