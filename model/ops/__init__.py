"""Numerical kernels: the state-space scan and the tiling dynamic programme."""
