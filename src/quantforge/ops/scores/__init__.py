"""Scores of queries against packed vectors, `q @ X^T`."""
