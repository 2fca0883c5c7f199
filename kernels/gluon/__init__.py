"""Kernels in Gluon, Triton's language for one chip: attention for Hopper. Right on an H200; its speed is not yet measured."""
