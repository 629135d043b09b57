"""Files of other programs as a side of `sw.diff`: by their own names, or by `sw.Names` as leaves of a plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from statewise._src.checkpoint.diff.sources import Arrays, Side, is_path, side_of
from statewise._src.checkpoint.format.keys import PathId, dtype_of
from statewise._src.checkpoint.format.manifest import ArrayRecord, LeafRecord
from statewise._src.checkpoint.format.records import records_of
from statewise._src.checkpoint.interop.foreign import is_foreign
from statewise._src.checkpoint.interop.named import as_ours
from statewise._src.checkpoint.interop.open import open_any
from statewise._src.checkpoint.interop.sources import ARRAY, Source
from statewise._src.common.paths import format_path
from statewise._src.common.problems import Problems
from statewise._src.core.plan import Kinds, Plan, State
from statewise._src.inspect.select.select import objects_of
from statewise._src.names.names import NamesData, check_names
from statewise.errors import DeclarationError, RestoreError

__all__ = ["sides_by_names"]

_EXAMPLE = "sw.diff('published', plan.take(model), names=names)"
_DTYPE = "files in a dtype that JAX has, such as bfloat16 or float8_e4m3fn"
_HINT = "names.check(plan, path) lists what the files have; names that fit are sw.diff(path, state, names=names)"


def sides_by_names(first: object, second: object, names: object, kinds: Kinds) -> tuple[Side, Side]:
    """Makes two sides, at least one of which is files of other programs.

    Args:
      first: the one.
      second: the other.
      names: what the leaves of a model, a state or a plan are called in the files of the other side; None for two sides
        of files, which are compared by their own names.
      kinds: the kinds to plan a model by.

    Raises:
      StructureError: names is something else.
      DeclarationError: neither side is such files; or the other one is a checkpoint, which has no plan.
      RestoreError: the names do not fit.
    """
    checked = None if names is None else check_names(names, _EXAMPLE)
    files = [is_foreign(each) for each in (first, second)]
    if all(files):
        return _foreign_side(first), _foreign_side(second)
    other = second if files[0] else first
    for each in () if any(files) else filter(is_path, (first, second)):
        open_any(each)  # raises if there is nothing, or nothing that can be read
    if not any(files) or is_path(other) or checked is None:
        raise DeclarationError(
            "Names are of a model, a state or a plan, compared with another program's files.", hint=_EXAMPLE
        )
    target = other if isinstance(other, State) else _planned(other, kinds).abstract()
    named = _named_side(first if files[0] else second, checked, target)
    alone = side_of(other, kinds)
    return (named, alone) if files[0] else (alone, named)


def _planned(other: Any, kinds: Kinds) -> Plan:
    return other if isinstance(other, Plan) else kinds.plan(*objects_of(other))


def _foreign_side(path: object) -> Side:
    """Makes the side of another program's files, whose leaves have the names of the files."""
    source = open_any(path)
    records: dict[PathId, LeafRecord] = {}
    name_of: dict[PathId, str] = {}
    for entry in source.entries:
        array = ArrayRecord((), entry.shape, entry.dtype)
        record = LeafRecord((entry.name,), entry.kind or "arrays", entry.type or ARRAY, None, (array,))
        records[record.id], name_of[record.id] = record, entry.name

    def read(asked: Sequence[LeafRecord]) -> list[Arrays]:
        arrays = _arrays(source, [name_of[record.id] for record in asked])
        return [[arrays[name_of[record.id]]] for record in asked]

    kinds = {record.kind: True for record in records.values()}
    return Side(source.name, records, kinds, True, read)


def _named_side(path: object, names: NamesData, target: State) -> Side:
    """Makes the side of another program's files, as leaves of a plan.

    Raises:
      RestoreError: the names do not fit the files and the plan; everything is listed.
    """
    source = open_any(path)
    ours, problems = as_ours(source, names, target)
    problems.raise_as(RestoreError, f"{source.name} does not have what the names say: {{n}} leaves differ.", _HINT)
    entries = {entry.name: entry for entry in ours.entries}
    records: dict[PathId, LeafRecord] = {}
    found: dict[PathId, list[str]] = {}
    for record, _ in records_of(target.tables):
        ways = [record.path, *record.aliases]
        texts = [
            next((text for way in ways if (text := format_path(way + array.within)) in entries), None)
            for array in record.arrays
        ]
        known = [text for text in texts if text is not None]
        if known and len(known) == len(texts):
            arrays: list[Any] = [
                array if array.prng else dataclasses.replace(array, dtype=entries[text].dtype, stored=None)
                for array, text in zip(record.arrays, known, strict=True)
            ]
            records[record.id], found[record.id] = dataclasses.replace(record, arrays=tuple(arrays)), known

    def read(asked: Sequence[LeafRecord]) -> list[Arrays]:
        return [[_arrays(ours, (name,))[name] for name in found[record.id]] for record in asked]

    has = {record.kind for record in records.values()}
    return Side(source.name, records, {kind: kind in has for kind in target.tables.kinds}, True, read)


def _arrays(source: Source, wanted: Sequence[str]) -> dict[str, np.ndarray]:
    """Reads arrays.

    Raises:
      RestoreError: some have a dtype that JAX lacks.
    """
    problems, names = Problems(), {*wanted}
    for entry in source.entries:
        if entry.name in names and dtype_of(entry.dtype) is None:
            problems.add(entry.leaf(), f"is {entry.dtype}")
    problems.raise_as(
        RestoreError, f"{source.name} cannot be compared: {{n}} leaves have a dtype that JAX lacks.", _DTYPE
    )
    return source.read(wanted)
