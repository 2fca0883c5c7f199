"""`pyfused tune`: which kernels win on this machine, measured and kept as evidence."""

from .run import tune

__all__ = ["tune"]
