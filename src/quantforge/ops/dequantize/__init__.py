"""Dequantize packed vectors."""
