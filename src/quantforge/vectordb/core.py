"""What an index is once its data are known: a codec and rows, on tensors that have been checked.

Rows travel as named tensors (`rows.Parts`): `prepare` makes them, `append` and `replace` take them
in, and a log that keeps them can have them taken in again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from quantforge.vectordb import scan
from quantforge.vectordb.codec import Codec, Queries
from quantforge.vectordb.config import IndexConfig
from quantforge.vectordb.rerank import rerank_by
from quantforge.vectordb.rows import Parts, Rows


class Core:
    """A codec and the rows that it has coded.

    Args:
        config: of the index.
        codec: what is known of the data.
        parts: rows to begin with; None for none.
    """

    def __init__(self, config: IndexConfig, codec: Codec, parts: Parts | None = None) -> None:
        self.config, self.codec = config, codec
        if parts is None:
            nothing = torch.empty(0, len(codec.mean))
            parts = self.prepare(nothing, torch.empty(0, dtype=torch.int64))
        self.rows = Rows(parts)

    def prepare(self, x: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return rows (n, dim) as they are stored.

        Raises:
            InputError: for a vector whose scale or offset is beyond fp16.
        """
        parts = {**self.codec.encode(x).parts, "ids": ids}
        if self.config.originals == "float16":
            parts["originals"] = x.to(torch.float16)
        return parts

    def append(self, parts: Parts) -> None:
        """Add rows that `prepare` made."""
        self.rows.append(parts)

    def replace(self, index: torch.Tensor, parts: Parts) -> None:
        """Put rows that `prepare` made in the place of others; they keep their ids."""
        self.rows.put(index, parts)

    def remove(self, index: torch.Tensor) -> None:
        """Remove rows; those after them move up."""
        keep = torch.ones(len(self.rows), dtype=torch.bool)
        keep[index] = False
        self.rows.keep(keep.nonzero()[:, 0])

    def decode(self, index: torch.Tensor) -> torch.Tensor:
        """Decode rows, (m, dim) float32."""
        return self.codec.decode(self.rows.coded(index))

    def best(
        self, queries: Queries, k: int, allowed: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the k best scores (q, k) and their rows, of those allowed (rising)."""
        return scan.best(self.codec, self.rows, queries, k, allowed)

    def tiles(
        self, queries: Queries, allowed: torch.Tensor | None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield rows (m,) and their scores (q, m), in the order of rows."""
        return scan.tiles(self.codec, self.rows, queries, allowed)

    def rerank(
        self,
        query: torch.Tensor,
        rows: torch.Tensor,
        k: int,
        fetch: Callable[[torch.Tensor], torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the k best (q, k) of candidates (q, m), by vectors kept or fetched by rows."""
        vectors_of = self._originals if fetch is None else fetch
        return rerank_by(vectors_of, query, rows, k, squared=self.config.metric == "l2")

    def standard_errors(self, query: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Return the expected errors (q, m) of the scores of rows."""
        return self.codec.standard_errors(query, self.rows.coded(index))

    def _originals(self, index: torch.Tensor) -> torch.Tensor:
        return self.rows["originals"][index].float()
