"""`TurboQuantizer`: the quantizer of arXiv 2504.19874 as an object."""

from __future__ import annotations

import torch

from quantforge.arrays import Array, as_container, as_query, check_quantized
from quantforge.config import QuantForgeConfig
from quantforge.pipeline import QuantPipeline
from quantforge.spec import QuantSpec
from quantforge.tensor import QuantTensor


class TurboQuantizer:
    """Encodes vectors of one dim, decodes them, and takes inner products with them.

        quantizer = TurboQuantizer(768, QuantForgeConfig(bits=3))
        codes = quantizer.encode(vectors)                      # numpy or torch
        scores = quantizer.inner_product(queries, codes)       # the vectors stay packed

    Args:
        dim: vector length.
        config: the code: `estimator="mse"` (Algorithm 1; with the default scale rule its inner
            products are unbiased too) or "prod" (Algorithm 2, the QJL residual).

    Raises:
        ConfigError: if the dim does not admit the config's rotation.

    Source: arXiv 2504.19874, Algorithms 1 and 2.
    """

    def __init__(self, dim: int, config: QuantForgeConfig | None = None) -> None:
        self._pipeline = QuantPipeline(dim, config)

    def __repr__(self) -> str:
        return f"TurboQuantizer({self.dim}, {self.config})"

    @property
    def dim(self) -> int:
        """Vector length."""
        return self._pipeline.dim

    @property
    def config(self) -> QuantForgeConfig:
        """The settings."""
        return self._pipeline.config

    @property
    def spec(self) -> QuantSpec:
        """The code."""
        return self._pipeline.spec

    def encode(self, x: Array) -> QuantTensor:
        """Quantize vectors; see `QuantPipeline.compress`."""
        return self._pipeline.compress(x)

    def decode(self, q: QuantTensor) -> Array:
        """Decode vectors into what `encode` was given; see `QuantPipeline.decompress`."""
        return self._pipeline.decompress(q)

    def inner_product(self, query: Array, q: QuantTensor) -> Array:
        """Estimate the inner products of queries with packed vectors: `query @ X^T`.

        Args:
            query: (m, dim), (dim,), or (..., m, dim) whose leading axes broadcast against those
                of q; numpy or torch, not quantized.
            q: (n, dim), (dim,) or (..., n, dim).

        Returns:
            (..., m, n), without the axis m or n where query or q is a single vector; in the
            container, dtype and device of the query, accumulated in float32.

        Raises:
            InputError: for shapes or dtypes that do not fit.

        Source: arXiv 2504.19874, section 3.2.
        Cost: reads `bits / 8` bytes per number of q, once for all queries.
        """
        check_quantized(q, self.dim)
        tensor, container = as_query(query, self.dim, q.device)
        scores = torch.matmul(tensor, (q[None] if q.ndim == 1 else q).mT)
        return as_container(scores.squeeze(-1) if q.ndim == 1 else scores, container)
