"""Text from prompts: Generator, and how it samples, searches with beams and runs one step after another."""

from .generator import Generator

__all__ = ["Generator"]
