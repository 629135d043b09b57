"""Numbers looked up in the results, by workload, table and row: for the targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["Found", "MissingError", "Value", "cost", "growth", "largest", "median_s", "row_of", "times"]

Found = dict[str, dict[str, Any]]
Value = Callable[[Found], float]


class MissingError(Exception):
    """A number that the results do not hold."""


def table_of(found: Found, key: str) -> dict[str, Any]:
    for result in found.values():
        for table in result["tables"]:
            if table["key"] == key:
                return table
    raise MissingError("not measured")


def row_of(found: Found, table: str, key: str) -> dict[str, Any]:
    for row in table_of(found, table)["rows"]:
        if row["key"] == key:
            if "skipped" in row:
                raise MissingError(row["skipped"])
            return row
    raise MissingError("not measured")


def median_s(table: str, key: str) -> Value:
    return lambda found: row_of(found, table, key)["median_s"]


def times(table: str, key: str, of: str, number: str = "ratio") -> Value:
    """How many times as much a row's number is as another's."""

    def value(found: Found) -> float:
        one, other = row_of(found, table, key), row_of(found, table, of)
        if number not in one or number not in other:
            raise MissingError("not measured")
        return one[number] / other[number]

    return value


def growth(table: str, name: str) -> Value:
    """A row in the largest model against the same in the smallest."""

    def value(found: Found) -> float:
        counts = table_of(found, table)["facts"]["counts"]
        return times(table, f"{name}-{max(counts)}", f"{name}-{min(counts)}")(found)

    return value


def cost(bound: str, key: str) -> Value:
    """A train step with an option over the one without."""
    return lambda found: row_of(found, f"options_{bound}", key)["ratio"]


def largest(table: str, number: str) -> Value:
    """The largest of a number over all rows of a table that are ours."""
    return lambda found: max(row[number] for row in table_of(found, table)["rows"] if row.get("group") != "nnx")
