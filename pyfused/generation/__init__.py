"""Text from prompts: Generator, its sampling, its beam search and its steps."""

from .generator import Generator

__all__ = ["Generator"]
