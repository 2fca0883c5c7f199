"""Modules that replace torch.nn's, with the same state dicts, on pyfused's operators; and the KV cache."""

from .attention import CAUSAL, EVERYTHING, CrossAttention, SelfAttention, Visibility
from .kv_cache import KVCache
from .layers import FeedForward, LayerNorm, Linear, ReversibleEmbedding

__all__ = [
    "CAUSAL",
    "EVERYTHING",
    "CrossAttention",
    "FeedForward",
    "KVCache",
    "LayerNorm",
    "Linear",
    "ReversibleEmbedding",
    "SelfAttention",
    "Visibility",
]
