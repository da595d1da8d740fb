"""The cases of each operator; `benchmarks.registry` collects them."""
