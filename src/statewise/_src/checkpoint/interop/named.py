"""Names between our leaves and a source's: a source of other names as one of ours, and a state as one of theirs.

Both are decided from shapes alone.  An array is read when it is asked for, and of a stack one position at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from flax import nnx

from statewise._src.checkpoint.format.keys import words_of
from statewise._src.checkpoint.format.records import records_of, unpacked
from statewise._src.checkpoint.interop.adapter_folder import is_of_adapter
from statewise._src.checkpoint.interop.fill import fill_ours
from statewise._src.checkpoint.interop.match import is_of_run
from statewise._src.checkpoint.interop.sources import Source, SourceArray, stored_dtype
from statewise._src.common.paths import Leaf, Path, format_path, format_shape
from statewise._src.common.problems import Problems
from statewise._src.core.plan import State
from statewise._src.core.state_data import check_not_donated
from statewise._src.core.usable import check_concrete
from statewise._src.names.layout import Layout
from statewise._src.names.names import NamesData, row_hint
from statewise._src.plan.tables import OPTIMIZER

__all__ = ["arrays_of", "as_ours", "as_theirs", "model_arrays"]


@dataclasses.dataclass(frozen=True)
class PlannedArray:
    """One array of a plan that is saved.

    Attributes:
      leaf: its leaf.
      within: its keys within the leaf.
      shape: its shape, as a file has it.
      dtype: the name of its dtype, as a file has it.
      prng: for PRNG keys the implementation.
      kind: its kind.
      position: its position in the kind's part.
    """

    leaf: Leaf
    within: Path
    shape: tuple[int, ...]
    dtype: str
    prng: str | None
    kind: str
    position: int


def arrays_of(state: State) -> list[PlannedArray]:
    """Returns the arrays of a state's plan that are saved, in the plan's order."""
    plan = state.tables
    found = []
    for (record, start), leaf in zip(records_of(plan), plan.leaves, strict=True):
        if plan.kinds[record.kind].saved:
            for position, array in enumerate(record.arrays, start):
                shape, dtype = array.numeric
                found.append(PlannedArray(leaf, array.within, shape, dtype, array.prng, record.kind, position))
    return found


def model_arrays(state: State) -> list[PlannedArray]:
    """Returns the arrays of a state's plan that other programs' files have: without what belongs to a training run."""
    derived = {OPTIMIZER, *(each.into for each in state.tables.derived)}
    return [array for array in arrays_of(state) if array.kind not in derived and not is_of_run(array.leaf.type)]


def as_ours(source: Source, names: NamesData, target: State) -> tuple[Source, Problems]:
    """Returns a source as one that has the paths and shapes of a target's leaves.

    Args:
      source: the source, with their names.
      names: what our leaves are called there.
      target: the state whose leaves are to be read.

    Returns:
      the source: `others` are their names that are not used, and `by_design` our paths that it lacks by design; and
      what is wrong, all of it.
    """
    theirs = {entry.name: entry for entry in source.entries}
    problems = Problems()
    entries: dict[str, tuple[SourceArray, Layout]] = {}
    by_design: set[str] = set()
    first: dict[str, Leaf] = {}
    for array in arrays_of(target):
        layouts = names.layouts(array.leaf, array.within, array.shape, problems)
        if not layouts and names.knows(array.leaf, array.within):
            by_design.add(format_path(array.leaf.path + array.within))
        usable = [(path, layout) for path, layout in layouts if not _absent(layout, theirs)]
        for _, layout in layouts:
            for name in layout.names:
                other = first.setdefault(name, array.leaf)
                if other is not array.leaf:
                    note = f"would be read from {name}, which is also {format_path(other.path)}"
                    problems.add(array.leaf, note, "names that differ; or tie the leaves in the model")
        if layouts and not usable:
            _report_absent(array.leaf, layouts[0][1], theirs, problems)
        for path, layout in usable:
            entry = _entry(path, array, layout, theirs, problems)
            if entry is not None:
                entries[entry.name] = entry, layout
    # A name of which something else is wrong has been reported.
    others = tuple(name for name in (*theirs, *source.others) if name not in first)

    def read_part(name: str, index: Sequence[slice], into: np.ndarray) -> None:
        entry, layout = entries[name]
        wanted = [len(range(*part.indices(size))) for part, size in zip(index, layout.shape, strict=True)]
        fill_ours(source, layout, stored_dtype(entry), index, into.reshape(wanted))

    def read(wanted: Collection[str]) -> dict[str, np.ndarray]:
        arrays = {}
        for name in wanted:
            entry, _ = entries[name]
            arrays[name] = np.empty(entry.shape, stored_dtype(entry))
            read_part(name, [slice(None)] * len(entry.shape), arrays[name])
        return arrays

    ours = tuple(entry for entry, _ in entries.values())
    return Source(source.name, source.format, ours, read, others, frozenset(by_design), read_part), problems


def as_theirs(state: State, names: NamesData, adapter: bool = False) -> tuple[Source, Problems, dict[str, str]]:
    """Returns a state as a source that has their names; without what belongs to a training run.

    Args:
      state: the state.
      names: what its leaves are called there.
      adapter: whether only adapters are written, so that other leaves need no row.

    Returns:
      the source; what is wrong, all of it; and for each of their names our path.
    """
    plan = state.tables
    derived = {OPTIMIZER, *(each.into for each in plan.derived)}
    problems = Problems()
    entries: dict[str, tuple[SourceArray, PlannedArray, Layout]] = {}
    ours: dict[str, str] = {}
    for array in arrays_of(state):
        layouts = names.layouts(array.leaf, array.within, array.shape, problems)
        if not layouts and not names.knows(array.leaf, array.within):
            left_out = adapter and not issubclass(array.leaf.type, nnx.LoRAParam)
            if array.kind not in derived and not is_of_run(array.leaf.type) and not left_out:
                problems.add(array.leaf, "has no row in the names", row_hint(array.leaf.path + array.within))
            continue
        for path, layout in layouts:
            for name, shape in layout.names.items():
                if adapter and issubclass(array.leaf.type, nnx.LoRAParam) and not is_of_adapter(name):
                    note = f"would be {name}, which is not the name of a matrix in the file of an adapter"
                    problems.add(array.leaf, note, "'base_model.model.layers.{i}.q_proj.lora_A.weight', for example")
                if name in entries:
                    other = format_path(entries[name][1].leaf.path)
                    problems.add(array.leaf, f"would be written as {name}, which is also {other}", "names that differ")
                    continue
                entries[name] = SourceArray(name, (name,), shape, array.dtype, kind=array.kind), array, layout
                ours[name] = path

    def read(wanted: Collection[str]) -> dict[str, np.ndarray]:
        kinds = {entries[name][1].kind for name in wanted}
        check_not_donated(state, kinds)
        hint = "sw.convert(state, ...), with a state that has values: plan.take(model)"
        check_concrete([array for kind in kinds for array in state.part(kind).arrays], "convert", hint)
        parts, asked = {kind: unpacked(state, kind) for kind in kinds}, set(wanted)
        found: dict[str, np.ndarray] = {}
        for name in wanted:
            if name not in found:
                _, array, layout = entries[name]
                theirs = layout.to_theirs(words_of(parts[array.kind][array.position]))
                found |= {each: part for each, part in theirs.items() if each in asked}
        return found

    return Source("the state", "statewise", tuple(entry for entry, _, _ in entries.values()), read), problems, ours


def _absent(layout: Layout, theirs: Mapping[str, SourceArray]) -> list[str]:
    return [name for name in layout.names if name not in theirs]


def _report_absent(leaf: Leaf, layout: Layout, theirs: Mapping[str, SourceArray], problems: Problems) -> None:
    absent = _absent(layout, theirs)
    more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
    problems.add(leaf, f"the source has no {absent[0]}{more}", "names.check(plan, path) lists what it has")


def _entry(
    path: str, array: PlannedArray, layout: Layout, theirs: Mapping[str, SourceArray], problems: Problems
) -> SourceArray | None:
    """Returns our array as an entry; None if one of theirs has another shape, or they differ in dtype."""
    for name, shape in layout.names.items():
        if theirs[name].shape != shape:
            given = f"{name} is {format_shape(theirs[name].shape)} in the source, and not {format_shape(shape)}"
            problems.add(array.leaf, given, "a pattern, sw.Name(name, 'o i -> i o'), or a model of the source's sizes")
            return None
    dtypes = {theirs[name].dtype for name in layout.names}
    if len(dtypes) > 1:
        problems.add(array.leaf, f"its arrays are {' and '.join(sorted(dtypes))} in the source", "one dtype for them")
        return None
    dtype = dtypes.pop() if dtypes else array.dtype
    if array.prng is not None and dtype != array.dtype:
        problems.add(array.leaf, f"is a PRNG key, and {dtype} in the source", f"words of {array.dtype}")
        return None
    ours = array.leaf.path + array.within
    return SourceArray(path, ours, array.shape, dtype, stacked=layout.stack_axes, parts=tuple(layout.names))
