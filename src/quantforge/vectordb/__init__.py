"""Vector search on packed codes.

index     QuantizedIndex: add, search, remove, save
config    what a user chooses
checks    input, refused before anything changes
rows      what is held of each vector
codec     vectors to codes, scores on codes
moments   statistics of data that pass by once
files     one safetensors file
"""

from quantforge.vectordb.config import IndexConfig
from quantforge.vectordb.index import QuantizedIndex

__all__ = ["IndexConfig", "QuantizedIndex"]
