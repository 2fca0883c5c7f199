"""What do the T5 tests compare with? The golden cases, and transformers models with the same weights."""

import torch
from golden_cases import ROOT, case, manifest
from safetensors.torch import load_file

from pyfused import T5Backbone, backend

__all__ = ["ROOT", "case", "manifest"]

RENAMED = {
    "input_ids": "encoder_token_ids", "attention_mask": "encoder_padding_mask",
    "decoder_input_ids": "decoder_token_ids", "decoder_attention_mask": "decoder_padding_mask",
}  # fmt: skip
RENAMED_OUTPUTS = {
    "encoder_sequence_output": "encoder_last_hidden_state",
    "decoder_sequence_output": "last_hidden_state",
}


def t5_state(state):
    """transformers' T5 state dict under pyfused's names (independent of pyfused's map)."""
    out = {"token_embedding.weight": state["shared.weight"]}
    head = state.get("lm_head.weight")
    if head is not None and not torch.equal(head, state["shared.weight"]):
        out["token_embedding.reverse_weight"] = head
    for stack, last in (("encoder", 1), ("decoder", 2)):
        depth = len({key.split(".")[2] for key in state if key.startswith(f"{stack}.block.")})
        out[f"{stack}.final_norm.weight"] = state[f"{stack}.final_layer_norm.weight"]
        for i in range(depth):
            theirs, ours = f"{stack}.block.{i}.layer.", f"{stack}.layers.{i}."

            def rows(layer, names, theirs=theirs):
                return torch.cat([state[f"{theirs}{layer}.{name}.weight"] for name in names])

            out[ours + "attention_norm.weight"] = state[theirs + "0.layer_norm.weight"]
            out[ours + "attention.query_key_value.weight"] = rows("0.SelfAttention", "qkv")
            out[ours + "attention.output.weight"] = rows("0.SelfAttention", "o")
            if i == 0:
                table = state[theirs + "0.SelfAttention.relative_attention_bias.weight"]
                out[ours + "attention.relative_bias"] = table
            if stack == "decoder":
                out[ours + "cross_attention_norm.weight"] = state[theirs + "1.layer_norm.weight"]
                out[ours + "cross_attention.query.weight"] = rows("1.EncDecAttention", "q")
                out[ours + "cross_attention.key_value.weight"] = rows("1.EncDecAttention", "kv")
                out[ours + "cross_attention.output.weight"] = rows("1.EncDecAttention", "o")
            out[ours + "feed_forward_norm.weight"] = state[f"{theirs}{last}.layer_norm.weight"]
            for mine, name in (("inner", "wi"), ("gate", "wi_0"), ("up", "wi_1"), ("outer", "wo")):
                if f"{theirs}{last}.DenseReluDense.{name}.weight" in state:
                    weight = rows(f"{last}.DenseReluDense", [name])
                    out[f"{ours}feed_forward.{mine}.weight"] = weight
    return {name: tensor.clone() for name, tensor in out.items()}


def t5_arguments(config):
    """T5Backbone's constructor arguments for transformers' configuration, as a dict of version 5."""
    return {
        "vocabulary_size": config["vocab_size"],
        "num_layers": config["num_layers"],
        "num_decoder_layers": config["num_decoder_layers"],
        "num_heads": config["num_heads"],
        "hidden_dim": config["d_model"],
        "intermediate_dim": config["d_ff"],
        "key_value_dim": config["d_kv"],
        "dropout": config["dropout_rate"],
        "activation": config["dense_act_fn"],
        "use_gated_activation": config["is_gated_act"],
        "layer_norm_epsilon": config["layer_norm_epsilon"],
        "num_buckets": config["relative_attention_num_buckets"],
        "max_distance": config["relative_attention_max_distance"],
        "scale_logits": config["scale_decoder_outputs"],
        "decoder_start_token_id": config.get("decoder_start_token_id") or 0,
    }


def t5(config, state, dtype=torch.float32):
    """The backbone with transformers' configuration (a dict) and weights, in evaluation mode."""
    state = t5_state(state)
    tied = "token_embedding.reverse_weight" not in state
    model = T5Backbone(**t5_arguments(config), tie_embedding_weights=tied, dtype=dtype)
    model.load_state_dict(state)
    return model.eval()


def t5_of_case(entry, dtype=torch.float32):
    weights = manifest()["weights"][entry["weights"]]
    return t5(weights["hf_config"], load_file(ROOT / weights["file"]), dtype)


def call_of(inputs):
    """The inputs by pyfused's names; missing padding masks are None."""
    call = {"encoder_padding_mask": None, "decoder_padding_mask": None}
    return call | {RENAMED[k]: v for k, v in inputs.items() if k in RENAMED}


def outputs_of(model, call):
    """pyfused's outputs by transformers' names."""
    out = model(call)
    found = {theirs: out[ours] for ours, theirs in RENAMED_OUTPUTS.items()}
    return found | {"logits": model.logits(out["decoder_sequence_output"])}


def reference_outputs(model, call):
    """outputs_of with the reference operators, in plain PyTorch."""
    with backend("reference"):
        return outputs_of(model, call)


def live(inputs, name):
    """(B, S) bool: the rows of an output that see a key in every attention they depend on. In the other rows pyfused gives
    zeros; the libraries give means and disagree among themselves."""
    ids = inputs["input_ids" if name.startswith("encoder") else "decoder_input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    rows = (mask.sum(1, keepdim=True) > 0).expand(ids.shape)
    if not name.startswith("encoder"):
        rows = rows & (inputs.get("decoder_attention_mask", torch.ones_like(ids)).cumsum(1) > 0)
    return rows


def hf_t5(dtype=torch.float32, seed=0, spread=0.2, head=True, attention="sdpa", **config):
    """transformers' T5 (toy sizes unless `config` says otherwise) in evaluation mode. All weights, norms and tables too, are
    random with standard deviation `spread`."""
    from transformers import T5Config, T5ForConditionalGeneration, T5Model

    toy = {"vocab_size": 61, "num_layers": 2, "num_heads": 4, "d_model": 24, "d_ff": 56, "d_kv": 7}
    toy |= {"decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu"}
    made = T5Config(**{**toy, **config})
    model = (T5ForConditionalGeneration if head else T5Model)._from_config(made, attn_implementation=attention)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "layer_norm" in name else 0.0
            parameter.copy_(centre + spread * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype).eval()


def like_hf(hf, dtype=None):
    """The pyfused model with the weights of a transformers T5."""
    dtype = dtype or hf.shared.weight.dtype
    return t5(hf.config.to_dict(), {k: v.to(dtype) for k, v in hf.state_dict().items()}, dtype)
