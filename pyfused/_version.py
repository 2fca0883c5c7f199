"""Which pyfused is this? Beside pyproject.toml's version; alone, so that pyfused.ops may read it."""

__version__ = "0.1.0"
