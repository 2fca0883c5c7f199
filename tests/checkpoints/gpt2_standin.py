"""Which parameters does GPT2Backbone have? The same ones, without the computation, so that loading is tested alone."""

from typing import Any

import torch
from torch import nn

from pyfused.models.backbone import Backbone
from pyfused.models.dtypes import resolve_dtype


def _attention(width: int, heads: int, dtype: torch.dtype, parts: dict[str, int]) -> nn.Module:
    block = nn.Module()
    for name, count in parts.items():
        setattr(block, name, nn.Linear(width, count * heads, dtype=dtype))
    block.output = nn.Linear(heads, width, dtype=dtype)
    return block


class Standin(Backbone):
    def __init__(self, vocabulary_size, num_layers, num_heads, hidden_dim, intermediate_dim, dropout=0.1,
                 max_sequence_length=1024, dtype=None, **options: Any) -> None:  # fmt: skip
        super().__init__()
        self.config = {key: value for key, value in locals().items() if key not in ("self", "options", "__class__")}
        self.config |= options
        dtype = torch.float32 if dtype is None else resolve_dtype(dtype)
        heads = hidden_dim // num_heads * num_heads
        self.token_embedding = nn.Embedding(vocabulary_size, hidden_dim, dtype=dtype)
        if not options.get("tie_embedding_weights", True):
            self.token_embedding.reverse_weight = nn.Parameter(torch.zeros(vocabulary_size, hidden_dim, dtype=dtype))
        self.position_embedding = nn.Embedding(max_sequence_length, hidden_dim, dtype=dtype)
        self.layers = nn.ModuleList()
        for _ in range(num_layers):
            layer = nn.Module()
            layer.attention_norm = nn.LayerNorm(hidden_dim, dtype=dtype)
            layer.attention = _attention(hidden_dim, heads, dtype, {"query_key_value": 3})
            if options.get("cross_attention"):
                layer.cross_attention_norm = nn.LayerNorm(hidden_dim, dtype=dtype)
                layer.cross_attention = _attention(hidden_dim, heads, dtype, {"query": 1, "key_value": 2})
            layer.feed_forward_norm = nn.LayerNorm(hidden_dim, dtype=dtype)
            layer.feed_forward = nn.Module()
            layer.feed_forward.inner = nn.Linear(hidden_dim, intermediate_dim, dtype=dtype)
            layer.feed_forward.outer = nn.Linear(intermediate_dim, hidden_dim, dtype=dtype)
            self.layers.append(layer)
        self.final_norm = nn.LayerNorm(hidden_dim, dtype=dtype)

    def get_config(self) -> dict[str, Any]:
        dtype = self.config["dtype"]
        return self.config | {"dtype": str(dtype).removeprefix("torch.") if dtype is not None else None}

    def text_states(self, token_ids, padding_mask):
        raise AssertionError("the stand-in computes nothing")
