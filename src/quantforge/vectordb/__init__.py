"""Vector search on packed codes.

index     QuantizedIndex: add, search, remove, save; bulk, calibrate: its longer methods
intake    vectors on their way into it
config    what a user chooses
checks    input, refused before anything changes
core      what an index is once its data are known
rows      what is held of each vector; removed: what is so no longer; mapped: room behind a file
catalog   ids and metadata of rows: ids and texts, table, and where, filters over it
originals vectors kept beside codes, in memory or in a file
lists     which rows belong together; kmeans: where lists are
learning  what is learned from data; moments: statistics of data that pass by once
codec     vectors to codes, scores on codes
scan      the best rows; integer_scan: all of them in one call; bounds: what the CPU leaves out
querying  what a search does: candidates by errors, rerank, two_stage without vectors
drift     whether what is added looks like what was learned
files     one safetensors file; sound: whether it holds together
faiss_io  indexes of FAISS; stream: vectors larger than memory
store     IndexStore: a folder whose changes are on the disk when they return
changes   rows on their way to a log; log, manifest, lock: the files below a store
sharded   ShardedIndex: shards on several ranks; shards: merging, and which rank holds which
"""

from quantforge.vectordb.config import IndexConfig
from quantforge.vectordb.index import QuantizedIndex
from quantforge.vectordb.store import IndexStore

__all__ = ["IndexConfig", "IndexStore", "QuantizedIndex"]
