"""Launchers of csrc/cuda: allocate the outputs and pass them and the stream to pyfused._cuda."""
