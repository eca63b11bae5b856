"""Launches of the kernels written in C++, on CPU (`cpu`) and GPU (`cuda`)."""
