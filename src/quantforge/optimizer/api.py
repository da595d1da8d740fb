"""The front: one call for vectors and for models."""

from __future__ import annotations

from typing import Any

from quantforge.errors import InputError
from quantforge.optimizer.advice import Recommendation


def optimize(subject: Any, tokens: Any = None, **options: Any) -> Any:
    """Find settings by measuring: of codes and indexes for vectors, or of a cache for a model.

        result = optimize(vectors, objective="bytes", min_accuracy=0.95)
        result = optimize(model, tokens)
        print(result)
        result.config.save("settings.json")

    Args:
        subject: vectors (n, dim), numpy or torch; or a transformers causal language model.
        tokens: (passages, n) integers, for a model.
        **options: of `optimize_vectors` or of `optimize_cache`.

    Returns:
        VectorOptimization or CacheOptimization: both have `table()`, `to_dict()`, `plot(path)`,
        `config.save(path)` and `recommendation`.

    Raises:
        InputError: for tokens with vectors, a model without tokens, or what is neither.
        ConfigError: for settings out of range, or if nothing is within the limits.
    """
    if hasattr(subject, "shape"):
        if tokens is not None:
            raise InputError("tokens belong to a model; vectors come without")
        from quantforge.optimizer.vectors import optimize_vectors

        return optimize_vectors(subject, **options)
    if not (callable(subject) and hasattr(subject, "config")):
        raise InputError(
            f"optimize takes vectors (n, dim) or a transformers model; got {type(subject).__name__}"
        )
    if tokens is None:
        raise InputError("a model needs tokens (passages, n) of text it was not trained on")
    from quantforge.optimizer.caches import optimize_cache  # loads transformers

    return optimize_cache(subject, tokens, **options)


def recommend(subject: Any, tokens: Any = None, **options: Any) -> Recommendation:
    """Say in words what to use for vectors or for a model's cache; see `optimize`."""
    found: Recommendation = optimize(subject, tokens, **options).recommendation
    return found
