"""A source against a target: which array becomes which leaf, and everything that is in the way.

Names are compared as text: a leaf `layers/0/kernel` is found under that path, under `layers.0.kernel` of a safetensors
file, under `params/layers/0/kernel` of Linen's variables, and under `layers/0/kernel/value`, which is what Orbax makes
of an `nnx.State`.  All of this is decided from metadata.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx

from statewise._src.checkpoint.format.keys import OrbaxKeys
from statewise._src.checkpoint.format.manifest import ArrayRecord
from statewise._src.checkpoint.format.records import Placed, records_of
from statewise._src.checkpoint.interop.export import Piece, add_obstacles, collection_of
from statewise._src.checkpoint.interop.sources import ARRAY, Source, SourceArray, is_linen, known_collection
from statewise._src.checkpoint.renested import arguments, objects
from statewise._src.common import compat
from statewise._src.common.compare import (
    MISSING,
    Field,
    LeafFacts,
    Mismatch,
    compare_leaf,
    fields_of,
    note_of,
    uncastable,
)
from statewise._src.common.nnx_graph import ArraySpec, is_abstract
from statewise._src.common.paths import Leaf, Path, format_path
from statewise._src.common.problems import Problems
from statewise._src.core.plan import State
from statewise._src.plan.tables import OPTIMIZER
from statewise.errors import RestoreError, StructureError

__all__ = ["Fit", "compare_tied", "fit", "fit_alone"]

CAST = "sw.convert(src, dst, ..., cast=True)"
_SIZES = "build the model with the sizes of the source, or rename another to it"
_DTYPE = "plan the model with the dtype of the source"
RENAME = "rename={'name in the source': 'path/of/the/leaf'}; what the source has is in the conversion's unexpected"


@dataclasses.dataclass
class Fit:
    """What becomes of each array, and what is in the way."""

    pieces: list[Piece] = dataclasses.field(default_factory=list)
    kept: list[Leaf] = dataclasses.field(default_factory=list)
    missing: list[Leaf] = dataclasses.field(default_factory=list)
    problems: Problems = dataclasses.field(default_factory=Problems)
    unexpected: list[str] = dataclasses.field(default_factory=list)
    # Tied leaves that the source has under more than one of their paths: the leaf, what it is made of, another.
    tied: list[tuple[Leaf, SourceArray, SourceArray]] = dataclasses.field(default_factory=list)

    def finished(self, source: Source, to: str) -> Fit:
        """With what the format cannot hold, and what is unexpected."""
        add_obstacles(self.problems, to, self.pieces)
        # A leaf of several arrays is one leaf all the same.
        self.missing, self.kept = list(dict.fromkeys(self.missing)), list(dict.fromkeys(self.kept))
        used = {piece.source for piece in self.pieces} | {other.name for _, _, other in self.tied}
        self.unexpected = [entry.name for entry in source.entries if entry.name not in used] + list(source.others)
        return self


def compare_tied(source: Source, fitted: Fit) -> None:
    """Notes as problems the tied leaves that have different values in a source: of one leaf only one can be kept.

    These alone are read for it, also for a dry run; a source without values has none to compare.
    """
    alike = [(leaf, one, other) for leaf, one, other in fitted.tied if one.shape == other.shape]
    try:
        arrays = source.read({entry.name for _, *entries in alike for entry in entries}) if alike else {}
    except StructureError:
        alike = []
    for leaf, one, other in fitted.tied:
        is_alike = (leaf, one, other) in alike
        if one.shape == other.shape and (not is_alike or same_values(arrays[one.name], arrays[other.name])):
            continue
        hint = f"untie the leaves in the model before planning it, or leave one out: rename={{{other.name!r}: None}}"
        note = f"is tied, and has two different values in the source: {one.name} and {other.name}"
        fitted.problems.add(leaf, note, hint)


def same_values(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays hold the same numbers, whatever their dtypes."""
    if one.dtype != other.dtype:
        one, other = (array.astype(np.result_type(array.dtype, np.float64)) for array in (one, other))
    return one.tobytes() == other.tobytes() or bool(np.array_equal(one, other))


def _renamed(source: Source, rename: object) -> dict[str, Any]:
    """The new text of each name that `rename` changes; None for what it leaves out.

    Raises:
      RestoreError: it names what the source does not have, or gives something else than a path.
    """
    names = [entry.name for entry in source.entries]
    if rename is None:
        return {}
    if isinstance(rename, Mapping):
        unknown = [name for name in rename if name not in {*names, *source.others}]
        if unknown:
            near = difflib.get_close_matches(str(unknown[0]), names, n=3, cutoff=0.3) or names[:3]
            raise RestoreError(
                f"rename names what the source does not have: {', '.join(map(repr, unknown[:5]))}.",
                hint=f"its names are like: {', '.join(map(repr, near))}" if near else "leave rename out",
            )
        made = dict(rename)
    elif callable(rename):
        made = {name: rename(name) for name in names}
    else:
        raise RestoreError(
            f"rename is {type(rename).__name__}, neither a mapping nor a function.",
            hint="rename={'name in the source': 'path/of/the/leaf'}",
        )
    odd = [name for name, text in made.items() if not (text is None or (isinstance(text, str) and text.strip("/")))]
    if odd:
        raise RestoreError(
            f"rename makes no path of {odd[0]!r}, but {type(made[odd[0]]).__name__}.",
            hint="rename gives a path, 'layers/0/kernel', or None to leave a name out",
        )
    return {name: None if text is None else text.strip("/") for name, text in made.items()}


# --- without a target ------------------------------------------------------------------------------------------


def fit_alone(source: Source, to: str, rename: Any) -> Fit:
    """Everything in the source as it is, under the names of the other format."""
    renamed, made = _renamed(source, rename), Fit()
    linen = is_linen(source.entries)
    first: dict[str, SourceArray] = {}
    for entry in source.entries:
        if first.setdefault(entry.name, entry) is not entry:
            made.problems.add(entry.leaf(), "has the same name as another in the source", _SAME_NAME)
            continue
        text = renamed.get(entry.name, "")
        if text is None:
            continue
        path: Path = tuple(text.split("/")) if text else entry.path
        leaf = dataclasses.replace(entry.leaf(), path=path)
        if to == "linen" and entry.type == ARRAY and (entry.kind == OPTIMIZER or entry.average):
            continue  # Linen's variables hold neither an optimizer's state nor averages
        if to == "linen" and entry.type is None:
            if len(path) < 2 or not linen:
                made.problems.add(leaf, "is in no collection that NNX knows", _COLLECTION)
                continue
            leaf, path = dataclasses.replace(leaf, type=f"collection:{path[0]}"), path[1:]
        made.pieces.append(Piece(path, leaf, entry.dtype, entry.shape, entry.prng, entry.name))
    if not (made.pieces or made.problems):
        raise RestoreError(
            f"{source.name} has no arrays to convert.", hint="another source, or a rename that keeps some"
        )
    return made.finished(source, to)


_COLLECTION = (
    "say which type each leaf has: sw.convert(src, dst, to='linen', target=plan.abstract()); "
    "or register the collection: nnx.register_variable_name(name, Type)"
)


_SAME_NAME = "keys that only look alike (0 and '0') cannot be told apart in another format: change one of them"


# --- with one --------------------------------------------------------------------------------------------------


def fit(source: Source, to: str, target: State, rename: Any, cast: bool) -> Fit:
    """The leaves of a target, from a source."""
    return _Fitter(source, target, rename, cast).run(to)


@dataclasses.dataclass
class _Wanted:
    """An array of the target, and the entry that it is found in; of a tied leaf also those of its other paths."""

    placed: Placed
    leaf: Leaf
    array: ArrayRecord
    position: int
    entry: SourceArray | None
    others: tuple[SourceArray, ...] = ()

    @property
    def path(self) -> Path:
        return self.placed.record.path + self.array.within

    @property
    def stored(self) -> tuple[tuple[int, ...], str]:
        """Shape and dtype as they are written: of PRNG keys those of their words."""
        return self.array.on_disk if self.array.prng is not None else (self.array.shape, self.array.dtype)

    def piece(self, source: str | None, note: str = "") -> Piece:
        shape, dtype = self.stored
        at = (self.placed.record.kind, self.position)
        return Piece(self.path, self.leaf, dtype, shape, self.array.prng, source, at, note)


class _Fitter:
    def __init__(self, source: Source, target: State, rename: Any, cast: bool) -> None:
        self.source = source
        self.target = target
        self.cast = cast
        self.made = Fit()
        self.orbax = OrbaxKeys()
        self.by_text: dict[str, SourceArray] = {}
        self.has_values = {kind: not is_abstract(target.part(kind).arrays) for kind in target.tables.kinds}
        renamed = _renamed(source, rename)
        for entry in source.entries:
            text = renamed.get(entry.name, entry.name)
            if text is None:
                continue
            other = self.by_text.setdefault(self.plain(text), entry)
            if other is not entry:
                self.made.problems.add(entry.leaf(), f"has the same path as {other.name}", RENAME)

    def plain(self, text: str) -> str:
        """A name as a path's text; in a safetensors file dots stand for slashes."""
        return text.replace(".", "/") if self.source.format == "safetensors" else text

    def run(self, to: str) -> Fit:
        wanted = [
            self.wanted(placed, leaf, array, placed.start + at)
            for placed, leaf in zip(records_of(self.target.tables), self.target.tables.leaves, strict=True)
            if self.target.tables.kinds[placed.record.kind].saved
            and not (to == "linen" and collection_of(leaf.type) is None and self.is_derived(leaf))
            for at, array in enumerate(placed.record.arrays)
        ]
        self.check_doubles(wanted)
        there = {one.placed.record.kind for one in wanted if one.entry is not None}
        for one in wanted:
            if one.entry is not None:
                self.compare(one, one.entry)
                self.made.tied += [(one.leaf, one.entry, other) for other in one.others]
            elif 0 in one.stored[0]:
                self.keep(one, "has no elements: there is nothing to read")
            else:
                self.absent(one, there)
        return self.made.finished(self.source, to)

    def wanted(self, placed: Placed, leaf: Leaf, array: ArrayRecord, position: int) -> _Wanted:
        entries = self.find(leaf, array)
        return _Wanted(placed, leaf, array, position, entries[0] if entries else None, tuple(entries[1:]))

    def find(self, leaf: Leaf, array: ArrayRecord) -> list[SourceArray]:
        """The entries that a leaf is found in, under its first path and others."""
        found: dict[str, SourceArray] = {}
        collection = collection_of(leaf.type)
        for path in (leaf.path, *leaf.aliases):
            text = format_path(path + array.within)
            of_state = format_path((*path, "value", *array.within))
            tries = [text, of_state, "/".join(self.orbax.key(path + array.within))]
            if collection is not None:
                tries.append(f"{collection}/{text}")
            for candidate in tries:
                entry = self.by_text.get(self.plain(candidate))
                if entry is not None:
                    found.setdefault(entry.name, entry)
                    break  # the next names are for where this one is not there
        return list(found.values())

    def check_doubles(self, wanted: list[_Wanted]) -> None:
        """Two leaves whose paths only look alike (`0` and `"0"`, `a.b` and `a/b`) would get one array."""
        first: dict[str, _Wanted] = {}
        for one in wanted:
            if one.entry is None:
                continue
            other = first.setdefault(one.entry.name, one)
            if other is not one:
                note = f"its name in the source is also that of {format_path(other.path)}"
                self.made.problems.add(one.leaf, note, RENAME)

    # --- one array -----------------------------------------------------------------------------------------------

    def is_derived(self, leaf: Leaf) -> bool:
        """Whether it is no leaf of the model, but kept by the plan: an optimizer's state, an average."""
        return leaf.kind in {OPTIMIZER, *(average.into for average in self.target.tables.averages)}

    def keep(self, one: _Wanted, why: str) -> None:
        self.made.kept.append(dataclasses.replace(one.leaf, note=why))
        self.made.pieces.append(one.piece(None))

    def absent(self, one: _Wanted, there: set[str]) -> None:
        """A leaf that the source lacks: its value is the target's, where that is allowed; otherwise it is missing."""
        kind = one.placed.record.kind
        declared = self.target.tables.kinds[kind].missing == "keep"
        of_run = _is_of_run(one.leaf) or self.is_derived(one.leaf)
        foreign = self.source.format != "statewise" and kind not in there and of_run
        why = f"the source has no {kind}" if foreign else self.where(one)
        if (declared or foreign) and self.has_values[kind]:
            self.keep(one, why)
            return
        self.made.missing.append(dataclasses.replace(one.leaf, note=why))
        if foreign or declared:
            self.made.problems.hint("a target with values, which are kept: target=plan.take(model)")
        else:
            self.made.problems.hint(RENAME)
            keep = f"kinds.replace({kind}=dataclasses.replace(kinds[{kind!r}], missing='keep'))"
            own = f"or, to keep the target's values: {keep}"
            # An abstract target has none.
            plan = f"kinds.plan({arguments(self.target.tables)}).take({objects(self.target.tables)})"
            others = f"or, to begin with a model's values: kinds = {keep}; target = {plan}"
            self.made.problems.hint(own if self.has_values[kind] else others)

    def where(self, one: _Wanted) -> str:
        """That it is missing, and where something of its path is instead."""
        entry = self.below.get(self.plain(format_path(one.path)))
        return note_of(MISSING, "source") + (f", where {entry.name} is of another type" if entry else "")

    @functools.cached_property
    def below(self) -> dict[str, SourceArray]:
        """What stands in the collections of Linen's variables, by its text without the collection."""
        parted = [(*text.partition("/"), entry) for text, entry in self.by_text.items()]
        known = {top for top in {top for top, *_ in parted} if known_collection(top)}
        return {rest: entry for top, _, rest, entry in parted if top in known}

    def compare(self, one: _Wanted, entry: SourceArray) -> None:
        """Whether an entry has what a leaf wants."""
        (shape, dtype), prng = one.stored, one.array.prng
        # Other formats do not say of an array that it holds the words of a PRNG key.
        if entry.prng != prng and (entry.prng is not None or self.source.format == "statewise"):
            key, other = (f"key<{each}>" if each else name for each, name in ((prng, dtype), (entry.prng, entry.dtype)))
            hint = f"make the key with jax.random.key(seed, impl={entry.prng!r})" if entry.prng else RENAME
            self.made.problems.add(one.leaf, note_of([Mismatch(Field.DTYPE, key, other)], "source"), hint)
            return
        facts = (LeafFacts(None, (ArraySpec(*each),)) for each in ((shape, dtype), (entry.shape, entry.dtype)))
        mismatches = compare_leaf(*facts)
        end = uncastable(mismatches)
        if prng is not None and mismatches:
            end = end or f", which does not become {dtype}"
        if not mismatches:
            self.made.pieces.append(one.piece(entry.name))
        elif self.cast and not end and fields_of(mismatches) == (Field.DTYPE,):
            self.made.pieces.append(one.piece(entry.name, f"from {entry.dtype} to {dtype}"))
        else:
            hint = _SIZES if Field.SHAPE in fields_of(mismatches) else _DTYPE if end else CAST
            self.made.problems.add(one.leaf, note_of(mismatches, "source") + end, hint)


def _is_of_run(leaf: Leaf) -> bool:
    """Whether a leaf belongs to a training run rather than to a model, so that files of weights do not have it."""
    types = (nnx.RngState, nnx.OptState, compat.MetricState)
    return leaf.kind == OPTIMIZER or (isinstance(leaf.type, type) and issubclass(leaf.type, types))
