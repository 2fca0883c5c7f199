"""Launchers of csrc/cpu: allocate the outputs and pass pointers to pyfused._cpu."""
