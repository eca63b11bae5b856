"""Launches of the C++ kernels: tensors in, tensors out, no autograd."""
