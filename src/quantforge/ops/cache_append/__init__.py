"""Quantize into preallocated buffers, in place."""
