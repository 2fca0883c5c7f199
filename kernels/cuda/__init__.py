"""Launchers of csrc/cuda: allocate the outputs and pass pointers and the stream to pyfused._cuda."""
