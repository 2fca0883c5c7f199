"""Which kernels are fastest on this machine? `pyfused tune` measures it and saves the result as evidence."""

from .run import tune

__all__ = ["tune"]
