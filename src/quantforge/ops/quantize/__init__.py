"""Quantize vectors: shift, equalize, rotate, scale, encode, pack."""
