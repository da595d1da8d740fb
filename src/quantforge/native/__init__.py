"""The CPU kernels: C++ with a plain C interface, loaded with ctypes.

    source/      the C++: one set of templates, compiled for portable, AVX2 and AVX-512
    build        compiles it: for the wheel, or on first use
    library      finds or builds it, checks it, loads it, chooses the level
    code         a QuantSpec as the C structure

Operators use it through `ops/<op>/native.py`; without a compiler they run in eager torch.
"""
