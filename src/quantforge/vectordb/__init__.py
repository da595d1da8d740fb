"""Vector search on packed codes.

index     QuantizedIndex: add, search, remove, save; bulk, calibrate: its longer methods
config    what a user chooses
checks    input, refused before anything changes
core      what an index is once its data are known
rows      what is held of each vector; catalog, ids, texts, table, where: ids and metadata
lists     which rows belong together; kmeans: where lists are
learning  what is learned from data; moments: statistics of data that pass by once
codec     vectors to codes, scores on codes
scan      the best rows; integer_scan, bounds, two_stage: faster ways to them
rerank    the best of candidates by the vectors themselves; originals, candidates
drift     whether data are still those that were learned from
files     one safetensors file; faiss_io: indexes of FAISS; stream: vectors larger than memory
catalog   ids and metadata of rows: ids and texts, table, and where, filters over it
querying  what a search does: candidates by errors, two_stage without vectors
originals vectors kept beside codes, in memory or in a file
drift     whether what is added looks like what was learned
store     IndexStore: a folder whose changes are on the disk when they return
changes   rows on their way to a log; log, manifest, lock: the files below a store
"""

from quantforge.vectordb.config import IndexConfig
from quantforge.vectordb.index import QuantizedIndex
from quantforge.vectordb.store import IndexStore

__all__ = ["IndexConfig", "IndexStore", "QuantizedIndex"]
