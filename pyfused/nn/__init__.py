"""Modules on pyfused's operators: replacements for torch.nn's and transformers', with the same state dicts; the models' own
modules; and the KV cache."""

from .attention import CAUSAL, EVERYTHING, CrossAttention, RelativeSelfAttention, SelfAttention, Visibility
from .kv_cache import KVCache
from .layers import Embedding, FourierMixing, GatedMlp, LayerNorm, Linear, Mlp, ReversibleEmbedding, RMSNorm
from .multihead import MultiheadAttention
from .packing import Packing
from .quantized import QuantizedEmbedding, QuantizedLinear
from .t5 import FeedForward, GatedFeedForward, T5Attention
from .torch_layers import TransformerDecoderLayer, TransformerEncoderLayer

__all__ = [
    "CAUSAL",
    "EVERYTHING",
    "CrossAttention",
    "Embedding",
    "FeedForward",
    "FourierMixing",
    "GatedFeedForward",
    "GatedMlp",
    "KVCache",
    "LayerNorm",
    "Linear",
    "Mlp",
    "MultiheadAttention",
    "Packing",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "RMSNorm",
    "RelativeSelfAttention",
    "ReversibleEmbedding",
    "SelfAttention",
    "T5Attention",
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
    "Visibility",
]
