"""The best scores of queries against packed vectors, and whose they are."""
