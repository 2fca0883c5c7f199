"""Kernels in Gluon, Triton's language for one chip: attention for Hopper. Unproven: no GPU has run them."""
