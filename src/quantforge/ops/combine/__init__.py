"""Weighted sums of packed vectors, `w @ X`."""
