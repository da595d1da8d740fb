"""Measurements behind every number in the README and the docs.

    python -m benchmarks.run            operators against their baselines, after their tests
    python -m benchmarks.decode_step    a decode step of a Llama-3-8B-shaped model, end to end
    python -m benchmarks.kv_fidelity    how much a quantized cache changes a model
    python -m benchmarks.eager_ops      speed of the torch operators against dense torch
    python -m benchmarks.cache_settings the settings of the cache, one changed at a time
    python -m benchmarks.primitives     what torch's own functions cost, for docs/LOG.md
    python -m benchmarks.plots          docs/*.svg, from the results
    python -m benchmarks.tables         the tables of README and docs, from the results

`registry` and `cases/` say what is measured, `timing` and `ceiling` how. Results are JSON files in
`benchmarks/results/`, each with hardware, versions and date: JSON lines where rows are written as
they are measured.
"""
