"""Equal plans are one object, so that comparing two of them costs nothing.

A plan is the static part of every state and a key in the table of every step, and both compare it at each call.  The
table in this module holds plans weakly: a plan that is no longer used is freed.
"""

from __future__ import annotations

import atexit
import dataclasses
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from statewise._src.common.paths import Path
from statewise._src.plan.derived import Derived
from statewise._src.plan.kind import Kind
from statewise._src.plan.leaf_specs import LeafSpec

__all__ = ["intern", "same_graph"]


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class _Identity:
    """What makes two plans equal.  Graph definitions are compared, never hashed: metadata may not be hashable."""

    kinds: Mapping[str, Kind]
    names: tuple[str, ...]
    rows: tuple[LeafSpec, ...]
    derived: tuple[Derived, ...]
    stored: Any
    graphdef: Any

    def __hash__(self) -> int:
        # The paths are compared, if all of this is equal; hashing thousands of them would take longer.
        return hash((self.kinds, self.derived, len(self.rows), self.rows[-1].path))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Identity)
            and self.kinds == other.kinds
            and self.names == other.names
            and self.derived == other.derived
            and (self.rows is other.rows or _same_rows(self.rows, other.rows))
            and self.stored == other.stored
            and same_graph(self.graphdef, other.graphdef)
        )


def _same_rows(rows: Sequence[LeafSpec], others: Sequence[LeafSpec]) -> bool:
    return rows == others and all(_same_keys(row.path, twin.path) for row, twin in zip(rows, others, strict=True))


def _same_keys(path: Path, twin: Path) -> bool:
    """Returns whether two equal paths have the same keys: Python's `0`, `0.0` and `False` are equal."""
    return all(
        type(key) is type(other) and (type(key) in (str, int) or repr(key) == repr(other))
        for key, other in zip(path, twin, strict=True)
    )


def same_graph(graphdef: Any, other: Any) -> bool:
    """Returns whether two graph definitions are equal; False if their metadata cannot be compared."""
    if graphdef is other:
        return True
    try:
        equal = bool(graphdef == other)
    except (ValueError, TypeError):  # metadata with arrays, which have no truth value
        return False
    # 1 == 1.0 == True, but a model that multiplies by one of them is another model.
    return equal and all(
        type(getattr(attribute, "value", None)) is type(getattr(twin, "value", None))
        for (_, attribute), (_, twin) in zip(graphdef.attributes, other.attributes, strict=True)
    )


_tables: weakref.WeakValueDictionary[_Identity, Any] = weakref.WeakValueDictionary()
_tables_lock = threading.Lock()


# While the interpreter shuts down, comparing keys would need modules that no longer exist.
atexit.register(_tables.clear)


def intern(tables: Any) -> Any:
    """Returns the one object that is equal to these tables: an existing one, or these tables from now on."""
    stored = (tables.packing, tables.per_device, tables.ensemble)
    identity = _Identity(tables.kinds, tables.names, tables.rows, tables.derived, stored, tables.graphdef)
    with _tables_lock:
        return _tables.setdefault(identity, tables)
