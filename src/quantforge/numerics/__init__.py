"""Numbers, bit layouts and rounding rules: numpy only, the single source of truth.

hadamard    Hadamard matrices of order 2^k * {1, 12, 20, 28}
rotation    seeded randomized Hadamard and Haar rotations
lloyd_max   the solver that made data/lloyd_max.npz
codebook    centroids and boundaries by dim, bits and name
packing     codes to bit planes and back
encode      the bit-exact float32 definition of quantization, and its inverse
statistics  shift and equalizer
vectors     codes for search that know the data: the float64 oracle
"""
