"""Kernels in Gluon, Triton's language for one chip: attention for Hopper."""
