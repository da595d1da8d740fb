"""Vector search on packed codes.

index     QuantizedIndex: add, search, remove, save
config    what a user chooses
checks    input, refused before anything changes
rows      what is held of each vector
codec     vectors to codes, scores on codes
moments   statistics of data that pass by once
files     one safetensors file
store     IndexStore: a folder whose changes are on the disk when they return
changes   rows on their way to a log; log, manifest, lock: the files below a store
"""

from quantforge.vectordb.config import IndexConfig
from quantforge.vectordb.index import QuantizedIndex
from quantforge.vectordb.store import IndexStore

__all__ = ["IndexConfig", "IndexStore", "QuantizedIndex"]
