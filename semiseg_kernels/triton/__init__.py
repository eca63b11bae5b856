"""Launches of the Triton kernels: a module per operation, with the functions that the raw operations call."""
