"""The recipe for columns of vectors: what goes into arrow comes out again."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pytest

RECIPE = Path(__file__).parents[2] / "recipes" / "arrow_column.py"
X = np.random.RandomState(0).standard_normal((50, 64)).astype(np.float32)


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("arrow_column", RECIPE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("bits", ["4", "3"])
def test_it_runs(recipe: ModuleType, bits: str, capsys: pytest.CaptureFixture) -> None:
    recipe.main(["--small", "--bits", bits])
    assert "| 3000 | 96 | 384 |" in capsys.readouterr().out


def test_slices_and_datasets(recipe: ModuleType) -> None:
    class Dataset:
        """What is used of `datasets.Dataset`: a view that slices to arrow tables."""

        def with_format(self, kind: str) -> Dataset:
            assert kind == "arrow"
            return self

        def __getitem__(self, rows: slice) -> pa.Table:
            return recipe.table_of({"x": X[rows]})

    table = recipe.encode_column(recipe.table_of(Dataset()), "x", bits=8)
    decoded = recipe.decode_column(table, "x").dequantize().numpy()
    assert np.square(decoded - X).mean() < 1e-3
    part = recipe.decode_column(table.slice(7, 5), "x").dequantize().numpy()
    np.testing.assert_array_equal(part, decoded[7:12])
    np.testing.assert_array_equal(recipe.vectors_of(recipe.table_of({"x": X})["x"][3:9]), X[3:9])


def test_what_is_no_column_of_vectors_is_refused(recipe: ModuleType) -> None:
    with pytest.raises(ValueError, match="holds no codes"):
        recipe.decode_column(recipe.table_of({"x": X}), "x")
    with pytest.raises(ValueError, match="1 rows have no vector"):
        recipe.vectors_of(pa.array([[1.0, 2.0], None], pa.list_(pa.float32(), 2)))
    with pytest.raises(TypeError, match="expected a table"):
        recipe.table_of(3)
