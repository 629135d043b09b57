"""Models that were planned before: the rows of an equal model, without flattening and matching it again.

A model is often planned several times: by each function of a program that is given a model, for another optimizer, in a
notebook.  While a plan is in use, a model with the same objects is recognized by comparing the two, which takes a
fraction of the time.  Only declarations that look at nothing but types and paths are answered in this way.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from statewise._src.common.nnx_graph import is_traced
from statewise._src.filters.explain import static_only
from statewise._src.plan.kind import Kind
from statewise._src.plan.tables import PlanTables

__all__ = ["recall", "remember"]

# Plans of models of the same classes under the same declaration: layers differ in number, or in size.
_SLOTS = 4

_known: weakref.WeakValueDictionary[Any, PlanTables] = weakref.WeakValueDictionary()
_known_lock = threading.Lock()
_numbers = itertools.count()


def recall(kinds: Mapping[str, Kind], objects: Sequence[Any], names: Sequence[str]) -> PlanTables | None:
    """Returns the tables of a plan of equal objects under the same declaration; None if none is in use.

    Their optimizers and averages may be others.
    """
    key = _key(kinds, objects, names)
    for slot in range(_SLOTS):
        with _known_lock:
            tables = _known.get((key, slot))
        read = None if tables is None else tables.read_fitting(objects)
        if read is not None and _are_alike(read[0]):
            return tables
    return None


def remember(kinds: Mapping[str, Kind], objects: Sequence[Any], leaves: Iterable[Any], tables: PlanTables) -> None:
    """Remembers the tables of a plan, for as long as it is in use.

    Args:
      kinds: the declaration.
      objects: the objects that were planned.
      leaves: all their leaves.
      tables: the tables.
    """
    if not _are_alike(leaves) or not all(static_only(kind.of) for kind in kinds.values() if not kind.rest):
        return
    key = _key(kinds, objects, tables.names)
    with _known_lock:
        known = [_known.get((key, slot)) for slot in range(_SLOTS)]
        if tables not in known:
            _known[key, known.index(None) if None in known else next(_numbers) % _SLOTS] = tables


def _key(kinds: Mapping[str, Kind], objects: Sequence[Any], names: Sequence[str]) -> Hashable:
    return kinds, tuple(names), tuple(map(type, objects))


def _are_alike(leaves: Iterable[Any]) -> bool:
    """Returns whether filters see the same of these leaves as of others at their paths: Variables, or JAX's arrays.

    A filter may tell JAX's arrays, NumPy's, shapes and tracers apart, which have the same row.
    """
    one_of_each_type = {type(leaf): leaf for leaf in leaves}.values()
    return all(isinstance(leaf, nnx.Variable | jax.Array) and not is_traced([leaf]) for leaf in one_of_each_type)
