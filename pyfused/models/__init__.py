"""The models; each file reads like its paper."""

from .albert import AlbertBackbone
from .backbone import Backbone
from .fnet import FNetBackbone
from .gpt2 import GPT2Backbone, GPT2Output
from .t5 import T5Backbone

__all__ = ["AlbertBackbone", "Backbone", "FNetBackbone", "GPT2Backbone", "GPT2Output", "T5Backbone"]
