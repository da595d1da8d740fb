"""Filters over metadata, as JSON carries them.

    where      {column: condition, ..., "and": [where, ...], "or": [where, ...], "not": where}
    condition  value, or {operator: operand, ...}

All entries of a mapping must hold. Operators: eq, ne, lt, lte, gt, gte, in (a list), exists (true
or false). A bare value is eq; null finds rows that miss the column. A row that misses a column
meets no condition on it but {"exists": false} and null, so `not` finds it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from quantforge.errors import InputError
from quantforge.vectordb.table import Column, Table

COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "lte": operator.le,
    "gt": operator.gt,
    "gte": operator.ge,
}
ORDER = ("lt", "lte", "gt", "gte")
OPERATORS = (*COMPARISONS, "in", "exists")
LIMIT = 2**63
MAX_FLOAT = 2**1023
MAX_DEPTH = 32
"""Of filters within filters: a request must not exhaust the stack."""


def matching(where: Any, table: Table) -> np.ndarray:
    """Return the rows (n,) bool of a table that a filter lets pass.

    Raises:
        InputError: for an unknown column or operator, or an operand that is not of the column's
            type; it says where in the filter.

    Cost: one pass over each column named, and one comparison for each distinct string.
    """
    return _all(where, table, "where", 0)


def _all(where: Any, table: Table, path: str, depth: int) -> np.ndarray:
    if not isinstance(where, Mapping):
        raise InputError(f"{path} must map columns to conditions; got {where!r}")
    if depth > MAX_DEPTH:
        raise InputError(f"{path[:40]}... has filters in filters more than {MAX_DEPTH} deep")
    found = np.ones(len(table), bool)
    for name, condition in where.items():
        here = f"{path}[{name!r}]"
        if name == "not":
            found &= ~_all(condition, table, here, depth + 1)
        elif name in ("and", "or"):
            if not isinstance(condition, list | tuple):
                raise InputError(f"{here} must be a list of filters; got {condition!r}")
            join = np.logical_and if name == "and" else np.logical_or
            parts = [_all(c, table, f"{here}[{i}]", depth + 1) for i, c in enumerate(condition)]
            found &= join.reduce(parts) if parts else name == "and"
        elif name in table.columns:
            found &= _condition(condition, table.columns[name], here)
        else:
            known = ", ".join(sorted(table.columns)) or "none"
            raise InputError(f"{here}: there is no such column; columns are {known}")
    return found


def _condition(condition: Any, column: Column, path: str) -> np.ndarray:
    if condition is None:
        return column.missing
    if not isinstance(condition, Mapping):
        return _compare("eq", condition, column, path)
    found = np.ones(len(column.rows), bool)
    for name, operand in condition.items():
        here = f"{path}[{name!r}]"
        if name in COMPARISONS:
            found &= _compare(name, operand, column, here)
        elif name == "in":
            found &= _among(operand, column, here)
        elif name == "exists":
            if not isinstance(operand, bool):
                raise InputError(f"{here} must be true or false; got {operand!r}")
            found &= column.missing != operand
        else:
            raise InputError(f"{here}: operators are {', '.join(OPERATORS)}; got {name!r}")
    return found


def _compare(name: str, operand: Any, column: Column, path: str) -> np.ndarray:
    _check_operand(operand, column, path)
    compare = COMPARISONS[name]
    if name in ORDER and column.type == "bool":
        raise InputError(f"{path}: a bool column has no order; use eq or ne")
    if column.type != "string":
        return compare(column.rows, _number(operand, column)) & ~column.missing
    if name in ORDER:
        passing = np.array([*(compare(word, operand) for word in column.words), False], bool)
        return passing[column.rows]  # -1, a missing value, takes the last
    return compare(column.rows, column.place_of(operand)) & ~column.missing


def _among(operands: Any, column: Column, path: str) -> np.ndarray:
    if not isinstance(operands, list | tuple):
        raise InputError(f"{path} must be a list of values; got {operands!r}")
    for i, operand in enumerate(operands):
        _check_operand(operand, column, f"{path}[{i}]")
    if column.type == "string":
        wanted = [column.place_of(operand) for operand in operands]
    else:
        wanted = [_number(operand, column) for operand in operands]
    if column.type == "int64":  # others equal no integer, and would make all of them floats
        wanted = [i for i in wanted if isinstance(i, int) and -LIMIT < i < LIMIT]
    return np.isin(column.rows, np.array(wanted, column.rows.dtype)) & ~column.missing


def _number(operand: Any, column: Column) -> Any:
    """Return an operand that numpy compares exactly with what the column holds."""
    if column.type == "float64":
        return float(max(-MAX_FLOAT, min(MAX_FLOAT, operand))) if type(operand) is int else operand
    whole = isinstance(operand, bool) or (isinstance(operand, float) and operand.is_integer())
    return int(operand) if whole else operand


def _check_operand(operand: Any, column: Column, path: str) -> None:
    expected: dict[str, tuple[type, ...]] = {
        "int64": (int, float),
        "float64": (int, float),
        "bool": (bool,),
        "string": (str,),
    }
    good = isinstance(operand, expected[column.type])
    if isinstance(operand, bool) and column.type != "bool":
        good = False
    if not good or operand != operand:
        raise InputError(
            f"{path}: the column holds {column.type}; got {operand!r}, {type(operand).__name__}"
        )
