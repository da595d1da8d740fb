"""Pieces of Triton kernels, shared by operators. Only `triton.py` modules import from here.

Codec (`quantize`, `dequantize`, `cache_append`)
    layouts        one kernel source for two compilers: Triton, and Gluon with a layout of our own
    rotation       the butterfly, in registers, by shuffles or by reshaping; the dense stage
    halves         the same on words of two fp16 numbers, where rounding is free
    codebook       codes by one lookup and one comparison
    encode         sums, powers and scale factors in the order of `numerics.encode`
    packing        codes to bytes and back, plane by plane
    placement      which rows a program works on
    *_rows, *_words    the kernels; `*_odd_rows` for dims of 12, 20 or 28 times a power of two
    *_launch       their launchers, with axes, arguments and tuning
Static caches (`window_append`)
    window         write rows; pack the page that leaves the window, and move the rest up
Products (`scores`, `search`, `combine`)
    decode, query, rows, products, score, select
    mixed          runs of rows with different bits in groups of channels (`mixed_search`)
Attention on rows
    byte_lookup    centroids of a tile of bytes that may be transposed and converted afterwards
    attend         query rows through a share of the tokens; the merge of shares
    chunk          a chunk of the history for a dense kernel, and the merge of chunks
"""
