"""The losses as Triton kernels."""
