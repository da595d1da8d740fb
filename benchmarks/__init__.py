"""Measurements behind every number in the README and the docs.

    python -m benchmarks.kv_fidelity    how much a quantized cache changes a model
    python -m benchmarks.eager_ops      speed of the torch operators against dense torch
    python -m benchmarks.cache_settings the settings of the cache, one changed at a time
    python -m benchmarks.primitives     what torch's own functions cost, for docs/LOG.md
    python -m benchmarks.tables         the tables of README and docs, from the results
    python -m benchmarks.run            kv_fidelity, eager_ops, tables

Results are JSON files in `benchmarks/results/`, each with hardware, versions and date.
"""
