"""The operators in Triton: kernels, then launchers."""
