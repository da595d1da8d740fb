"""Attention of a batch of sequences over packed rows that lie in pages anywhere in a cache."""
