"""The operators in plain PyTorch: the definition of truth, any dtype, any device."""
