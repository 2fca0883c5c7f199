"""Which version of pyfused is this? pyproject.toml says the same. This file imports no other."""

__version__ = "0.2.0.dev0"
