"""Pieces of Triton kernels, shared by operators. Only `triton.py` modules import from here.

layouts        one kernel source for two compilers: Triton, and Gluon with a layout of our own
rotation       the butterfly, in registers, by shuffles or by reshaping; the dense stage
codebook       codes by one lookup and one comparison
encode         a tile of vectors to codes and scales, in the order of `numerics.encode`
packing        codes to bytes, plane by plane
quantize_rows  the kernel of `quantize` and `cache_append`, and its launcher
"""
