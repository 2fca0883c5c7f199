"""Text from prompts: Generator, its sampling, its beam search and its steps."""

from .generator import Generator
from .plans import plan_of

__all__ = ["Generator", "plan_of"]
