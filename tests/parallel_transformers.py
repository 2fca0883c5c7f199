"""Which transformers models do the tests of tensor parallelism fuse, and with which plan of torch's own styles?"""

import torch
import transformers
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

NAMES = ("t5", "gpt2", "albert")
IDS = torch.arange(18).view(2, 9) * 3 % 61


def model_of(name):
    torch.manual_seed(3)
    if name == "t5":
        return transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=61, d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
                dropout_rate=0.0, decoder_start_token_id=0,
            )
        )  # fmt: skip
    if name == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=61, n_layer=2, n_head=4, n_embd=24, n_positions=48, tie_word_embeddings=False, bos_token_id=0,
            eos_token_id=0,
        )  # fmt: skip
        return transformers.GPT2LMHeadModel(config)
    return transformers.AlbertModel(
        transformers.AlbertConfig(
            vocab_size=61, embedding_size=12, hidden_size=24, num_hidden_layers=3, num_attention_heads=4,
            intermediate_size=40, max_position_embeddings=48,
        )
    )  # fmt: skip


def plan_of(name):
    """{a module's name: torch's style}. torch has none for GPT-2's Conv1D."""
    columns, rows = ColwiseParallel(), RowwiseParallel()
    if name == "gpt2":
        return {
            "lm_head": ColwiseParallel(output_layouts=Replicate()),
            "transformer.wpe": RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate()),
        }
    if name == "albert":
        layer = "encoder.albert_layer_groups.0.albert_layers.0"
        inputs = ("attention.query", "attention.key", "attention.value", "ffn")
        return {f"{layer}.{m}": columns for m in inputs} | {
            f"{layer}.{m}": rows for m in ("attention.dense", "ffn_output")
        }
    plan = {}
    for stack, attentions in (("encoder", ("SelfAttention",)), ("decoder", ("SelfAttention", "EncDecAttention"))):
        for i, attention in enumerate(attentions):
            plan |= {f"{stack}.block.*.layer.{i}.{attention}.{m}": columns for m in "qkv"}
            plan[f"{stack}.block.*.layer.{i}.{attention}.o"] = rows
        plan[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias"] = columns
        dense = f"{stack}.block.*.layer.{len(attentions)}.DenseReluDense"
        plan |= {f"{dense}.wi_0": columns, f"{dense}.wi_1": columns, f"{dense}.wo": rows}
    return plan


def divide_heads(model, name, ranks):
    """The modules' own counts of heads, which parallelize_module does not know."""
    for module in model.modules() if name != "gpt2" else ():
        for count in ("n_heads", "inner_dim", "num_attention_heads", "all_head_size"):
            if isinstance(module.__dict__.get(count), int):
                module.__dict__[count] //= ranks


def call(model, name):
    if name == "t5":
        return model(input_ids=IDS, decoder_input_ids=IDS[:, :5]).logits
    return model(IDS).logits if name == "gpt2" else model(IDS).last_hidden_state
