"""Operators that NVIDIA's cuDNN has. torch brings it along and calls it; a module here says which cases it does right."""
