"""Kernels in Gluon, Triton's language for one chip: attention for Hopper. Right on an H200, and not faster than Triton's."""
