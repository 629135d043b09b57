"""Equal plans are one object, so that comparing two of them costs nothing.

A plan is the static part of every state and a key of every step's table; both compare at each call.  The table
here holds plans weakly: one that nobody uses is gone.
"""

from __future__ import annotations

import atexit
import dataclasses
import threading
import weakref
from collections.abc import Mapping
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
    graphdef: Any
    stored: Any
    static_types: list[type]

    def __hash__(self) -> int:
        return hash((self.kinds, self.derived, tuple(row.path for row in self.rows)))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Identity)
            and self.kinds == other.kinds
            and self.names == other.names
            and self.derived == other.derived
            and self.rows == other.rows
            and all(_same_keys(mine.path, theirs.path) for mine, theirs in zip(self.rows, other.rows, strict=True))
            and self.stored == other.stored
            and self.static_types == other.static_types
            and _equal(self.graphdef, other.graphdef)
        )


def _same_keys(one: Path, other: Path) -> bool:
    """Whether two equal paths are of the same keys: to Python `0`, `0.0` and `False` are equal."""
    for mine, theirs in zip(one, other, strict=True):
        if type(mine) is not type(theirs) or (type(mine) not in (str, int) and repr(mine) != repr(theirs)):
            return False
    return True


def same_graph(one: Any, other: Any) -> bool:
    """Whether two graph definitions are equal; False where their metadata cannot be compared."""
    # 1 == 1.0 == True, but a model that multiplies by one of them is another model.
    return _types_of_statics(one) == _types_of_statics(other) and _equal(one, other)


def _equal(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except (ValueError, TypeError):
        # Metadata that holds arrays cannot be compared; two such plans are simply two.
        return one is other


def _types_of_statics(graphdef: Any) -> list[type]:
    return [type(getattr(attribute, "value", None)) for _, attribute in graphdef.attributes]


_tables: weakref.WeakValueDictionary[_Identity, Any] = weakref.WeakValueDictionary()
_tables_lock = threading.Lock()


# While the interpreter shuts down, comparing keys would need modules that are gone already.
atexit.register(_tables.clear)


def intern(tables: Any) -> Any:
    """Returns the one object that is equal to these tables: an older one, or this one from now on."""
    identity = _Identity(
        tables.kinds,
        tables.names,
        tables.rows,
        tables.derived,
        tables.graphdef,
        (tables.packing, tables.per_device, tables.ensemble),
        _types_of_statics(tables.graphdef),
    )
    with _tables_lock:
        return _tables.setdefault(identity, tables)
