"""Modules that replace torch.nn's, with the same state dicts, on pyfused's operators; and the KV cache."""

from .attention import CAUSAL, EVERYTHING, CrossAttention, SelfAttention, T5Attention, Visibility
from .kv_cache import KVCache
from .layers import FeedForward, FourierMixing, GatedFeedForward, LayerNorm, Linear, ReversibleEmbedding, RMSNorm
from .packing import Packing

__all__ = [
    "CAUSAL",
    "EVERYTHING",
    "CrossAttention",
    "FeedForward",
    "FourierMixing",
    "GatedFeedForward",
    "KVCache",
    "LayerNorm",
    "Linear",
    "Packing",
    "RMSNorm",
    "ReversibleEmbedding",
    "SelfAttention",
    "T5Attention",
    "Visibility",
]
