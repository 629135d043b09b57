"""Matching a source with a target: which array becomes which leaf, and everything that prevents it.

Names are compared as text: a leaf `layers/0/kernel` is found under that path, under `layers.0.kernel` in a safetensors
file, under `params/layers/0/kernel` in Linen's variables, and under `layers/0/kernel/value`, which is what Orbax makes
of an `nnx.State`.  All of this is decided from metadata.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx

from statewise._src.checkpoint.format.keys import OrbaxKeys
from statewise._src.checkpoint.format.manifest import ArrayRecord
from statewise._src.checkpoint.format.records import records_of
from statewise._src.checkpoint.interop.export import Piece, add_obstacles, collection_of
from statewise._src.checkpoint.interop.sources import ARRAY, NAMED, Source, SourceArray, is_linen, known_collection
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
from statewise._src.names.names import row_hint
from statewise._src.plan.tables import OPTIMIZER
from statewise.errors import RestoreError, StructureError

__all__ = ["Fit", "compare_tied", "fit", "fit_alone", "is_of_run", "note_of_tied", "same_values"]

CAST = "sw.convert(src, dst, ..., cast=True)"
_SIZES = "build the model with the sizes of the source, or rename another to it"
_DTYPE = "plan the model with the dtype of the source"
RENAME = "rename={'name in the source': 'path/of/the/leaf'}; what the source has is in the conversion's unexpected"
# Types of leaves that belong to a training run.
_OF_RUN = (nnx.RngState, nnx.OptState, compat.MetricState)


@dataclasses.dataclass
class Fit:
    """What happens to each array, and what prevents it."""

    pieces: list[Piece] = dataclasses.field(default_factory=list)
    kept: list[Leaf] = dataclasses.field(default_factory=list)
    missing: list[Leaf] = dataclasses.field(default_factory=list)
    problems: Problems = dataclasses.field(default_factory=Problems)
    unexpected: list[str] = dataclasses.field(default_factory=list)
    # Tied leaves that the source has under several of their paths: the leaf, the entry that is used, and another one.
    tied: list[tuple[Leaf, SourceArray, SourceArray]] = dataclasses.field(default_factory=list)

    def finished(self, source: Source, to: str) -> Fit:
        """Adds what the format cannot represent and what is unexpected, and returns this."""
        add_obstacles(self.problems, to, self.pieces)
        # A leaf with several arrays was added for each of them.
        self.missing, self.kept = list(dict.fromkeys(self.missing)), list(dict.fromkeys(self.kept))
        used = {piece.source for piece in self.pieces} | {other.name for _, _, other in self.tied}
        self.unexpected = [entry.name for entry in source.entries if entry.name not in used] + list(source.others)
        return self


def compare_tied(source: Source, fitted: Fit) -> None:
    """Adds as problems the tied leaves that have different values in a source, because a leaf can have only one.

    Only these leaves are read for it, also in a dry run; a source without values has nothing to compare.
    """
    pairs = [(entry, other) for _, entry, other in fitted.tied if entry.shape == other.shape]
    arrays: dict[str, np.ndarray] = {}
    with contextlib.suppress(StructureError):  # a source without values
        arrays = source.read({entry.name for pair in pairs for entry in pair}) if pairs else {}
    for leaf, entry, other in fitted.tied:
        is_unknown = entry.shape == other.shape and not arrays
        if is_unknown or (entry.shape == other.shape and same_values(arrays[entry.name], arrays[other.name])):
            continue
        hint = f"untie the leaves in the model before planning it, or leave one out: rename={{{other.name!r}: None}}"
        note = note_of_tied(entry.name, other.name)
        fitted.problems.add(leaf, note, hint)


def is_of_run(cls: Any) -> bool:
    """Returns whether leaves of a type belong to a training run, and are not in other programs' files of weights."""
    return isinstance(cls, type) and issubclass(cls, _OF_RUN)


def note_of_tied(first: str, other: str) -> str:
    """Returns what is wrong with a tied leaf that a source has under two names, with different values."""
    return f"is tied, and has two different values in the source: {first} and {other}"


def same_values(first: np.ndarray, second: np.ndarray) -> bool:
    """Returns whether two arrays hold the same numbers, whatever their dtypes are."""
    if first.dtype != second.dtype:
        first, second = (array.astype(np.result_type(array.dtype, np.float64)) for array in (first, second))
    return first.tobytes() == second.tobytes() or bool(np.array_equal(first, second))


def _renamed(source: Source, rename: object) -> dict[str, Any]:
    """Returns the new text of each name that `rename` changes; None for names that it leaves out.

    Raises:
      RestoreError: it names something that the source does not have, or gives something other than a path.
    """
    names = [entry.name for entry in source.entries]
    if rename is None:
        return {}
    if isinstance(rename, Mapping):
        unknown = [name for name in rename if name not in {*names, *source.others}]
        if unknown:
            near = difflib.get_close_matches(str(unknown[0]), names, n=3, cutoff=0.3) or names[:3]
            hint = f"its names are like: {', '.join(map(repr, near))}" if near else "leave rename out"
            shown = ", ".join(map(repr, unknown[:5]))
            raise RestoreError(f"rename names what the source does not have: {shown}.", hint=hint)
        texts = dict(rename)
    elif callable(rename):
        texts = {name: rename(name) for name in names}
    else:
        hint = "rename={'name in the source': 'path/of/the/leaf'}"
        raise RestoreError(f"rename is {type(rename).__name__}, neither a mapping nor a function.", hint=hint)
    for name, text in texts.items():
        if not (text is None or (isinstance(text, str) and text.strip("/"))):
            hint = "rename gives a path, 'layers/0/kernel', or None to leave a name out"
            raise RestoreError(f"rename does not give a path for {name!r}, but {type(text).__name__}.", hint=hint)
    return {name: None if text is None else text.strip("/") for name, text in texts.items()}


# --- without a target ------------------------------------------------------------------------------------------


def fit_alone(source: Source, to: str, rename: object) -> Fit:
    """Fits everything in the source as it is, under the names of the other format."""
    renamed, fitted = _renamed(source, rename), Fit()
    linen = is_linen(source.entries)
    first: dict[str, SourceArray] = {}
    for entry in source.entries:
        if first.setdefault(entry.name, entry) is not entry:
            fitted.problems.add(entry.leaf(), "has the same name as another in the source", _SAME_NAME)
            continue
        text = renamed.get(entry.name, "")
        if text is None:
            continue
        path: Path = tuple(text.split("/")) if text else entry.path
        leaf = dataclasses.replace(entry.leaf(), path=path)
        if to == "linen" and entry.type == ARRAY and (entry.kind == OPTIMIZER or entry.average):
            continue  # Linen's variables have neither an optimizer's state nor averages
        if to == "linen" and entry.type is None:
            if len(path) < 2 or not linen:
                fitted.problems.add(leaf, "is not in a collection that NNX knows", _COLLECTION)
                continue
            leaf, path = dataclasses.replace(leaf, type=f"collection:{path[0]}"), path[1:]
        fitted.pieces.append(Piece(path, leaf, entry.dtype, entry.shape, entry.prng, entry.name))
    if not (fitted.pieces or fitted.problems):
        raise RestoreError(
            f"{source.name} has no arrays to convert.", hint="another source, or a rename that keeps some"
        )
    return fitted.finished(source, to)


_COLLECTION = (
    "say which type each leaf has: sw.convert(src, dst, to='linen', target=plan.abstract()); "
    "or register the collection: nnx.register_variable_name(name, Type)"
)


_SAME_NAME = "keys that only look alike (0 and '0') cannot be distinguished in another format: change one of them"


# --- with a target ---------------------------------------------------------------------------------------------


class _Fitter:
    def __init__(
        self, source: Source, target: State, rename: object, cast: bool, reported: Collection[Path] = ()
    ) -> None:
        self.source = source
        self.reported = reported
        self.plan = target.tables
        self.cast = cast
        self.fitted = Fit()
        self.problems = self.fitted.problems
        self.orbax = OrbaxKeys()
        self.by_text: dict[str, SourceArray] = {}
        self.has_values = {kind: not is_abstract(target.part(kind).arrays) for kind in self.plan.kinds}
        # The kinds that the plan keeps, not the model: an optimizer's state, averages.
        self.derived = {OPTIMIZER, *(derived.into for derived in self.plan.derived)}
        renamed = _renamed(source, rename)
        for entry in source.entries:
            text = renamed.get(entry.name, entry.name)
            if text is None:
                continue
            other = self.by_text.setdefault(self.plain(text), entry)
            if other is not entry:
                self.problems.add(entry.leaf(), f"has the same path as {other.name}", RENAME)

    def plain(self, text: str) -> str:
        """Returns a name as a path's text; in a safetensors file dots separate its keys."""
        return text.replace(".", "/") if self.source.format == "safetensors" else text

    def run(self, to: str) -> Fit:
        wanted: list[tuple[Piece, list[SourceArray]]] = []
        for (record, start), leaf in zip(records_of(self.plan), self.plan.leaves, strict=True):
            is_left_out = to == "linen" and collection_of(leaf.type) is None and record.kind in self.derived
            if is_left_out or not self.plan.kinds[record.kind].saved:
                continue
            for position, array in enumerate(record.arrays, start):
                path, (shape, dtype) = record.path + array.within, array.numeric
                piece = Piece(path, leaf, dtype, shape, array.prng, at=(record.kind, position))
                wanted.append((piece, self.find(leaf, array)))
        self.check_doubles(wanted)
        present = {piece.leaf.kind for piece, entries in wanted if entries}
        for piece, entries in wanted:
            if entries:
                entry, *others = entries
                self.compare(piece, entry)
                self.fitted.tied += [(piece.leaf, entry, other) for other in others]
            elif 0 in piece.shape:
                self.keep(piece, "has no elements: there is nothing to read")
            else:
                self.absent(piece, present)
        return self.fitted.finished(self.source, to)

    def find(self, leaf: Leaf, array: ArrayRecord) -> list[SourceArray]:
        """Returns the entries that a leaf is found in, under its first path and others."""
        entries: dict[str, SourceArray] = {}
        collection = collection_of(leaf.type)
        for path in (leaf.path, *leaf.aliases):
            text = format_path(path + array.within)
            of_state = format_path((*path, "value", *array.within))
            tries = [text, of_state, "/".join(self.orbax.key(path + array.within))]
            if collection is not None:
                tries.append(f"{collection}/{text}")
            candidates = (self.by_text.get(self.plain(name)) for name in tries)
            entry = next((candidate for candidate in candidates if candidate is not None), None)
            if entry is not None:
                entries.setdefault(entry.name, entry)
        return list(entries.values())

    def check_doubles(self, wanted: Sequence[tuple[Piece, list[SourceArray]]]) -> None:
        """Adds leaves that would get one array: their paths only look alike (`0` and `"0"`, `a.b` and `a/b`)."""
        first: dict[str, Piece] = {}
        for piece, entries in wanted:
            other = first.setdefault(entries[0].name, piece) if entries else piece
            if other is not piece:
                note = f"its name in the source is also that of {format_path(other.path)}"
                self.problems.add(piece.leaf, note, RENAME)

    # --- one array -----------------------------------------------------------------------------------------------

    def keep(self, piece: Piece, why: str) -> None:
        self.fitted.kept.append(dataclasses.replace(piece.leaf, note=why))
        self.fitted.pieces.append(piece)

    def absent(self, piece: Piece, present: set[str | None]) -> None:
        """Handles a leaf that the source lacks: it keeps the target's value, if that is allowed, or is missing."""
        leaf, kind = piece.leaf, piece.leaf.kind or ""
        if format_path(piece.path) in self.source.by_design and self.has_values[kind]:
            self.keep(piece, "not in the files, as the names say")
            return
        if leaf.path in self.reported:
            return
        declared = self.plan.kinds[kind].missing == "keep"
        # What belongs to a training run is not in other programs' files of weights.
        of_run = kind in self.derived or is_of_run(leaf.type)
        foreign = self.source.format != "statewise" and kind not in present and of_run
        why = f"the source has no {kind}" if foreign else self.where(piece)
        if (declared or foreign) and self.has_values[kind]:
            self.keep(piece, why)
            return
        if self.source.format == NAMED and not (declared or foreign):
            self.problems.add(leaf, "has no row in the names", row_hint(piece.path))
            return
        self.fitted.missing.append(dataclasses.replace(leaf, note=why))
        if foreign or declared:
            self.problems.hint("a target with values, which are kept: target=plan.take(model)")
            return
        keep = f"kinds.replace({kind}=dataclasses.replace(kinds[{kind!r}], missing='keep'))"
        plan = f"kinds.plan({arguments(self.plan)}).take({objects(self.plan)})"
        own = f"or, to keep the target's values: {keep}"
        others = f"or, to begin with a model's values: kinds = {keep}; target = {plan}"
        self.problems.hint(RENAME, own if self.has_values[kind] else others)

    def where(self, piece: Piece) -> str:
        """Returns that a leaf is missing, and what the source has at its path instead."""
        entry = self.below.get(self.plain(format_path(piece.path)))
        return note_of(MISSING, "source") + (f", where {entry.name} is of another type" if entry else "")

    @functools.cached_property
    def below(self) -> dict[str, SourceArray]:
        """Returns the entries in collections of Linen's variables, by their text without the collection."""
        parted = [(*text.partition("/"), entry) for text, entry in self.by_text.items()]
        known = {top for top in {top for top, *_ in parted} if known_collection(top)}
        return {rest: entry for top, _, rest, entry in parted if top in known}

    def compare(self, piece: Piece, entry: SourceArray) -> None:
        """Compares an entry with the leaf that wants it."""
        dtype, prng = piece.dtype, piece.prng
        # Other formats do not record that an array holds the words of a PRNG key.
        if entry.prng != prng and (entry.prng is not None or self.source.format == "statewise"):
            key, other = (f"key<{each}>" if each else name for each, name in ((prng, dtype), (entry.prng, entry.dtype)))
            hint = f"make the key with jax.random.key(seed, impl={entry.prng!r})" if entry.prng else RENAME
            self.problems.add(piece.leaf, note_of([Mismatch(Field.DTYPE, key, other)], "source"), hint)
            return
        pairs = (piece.shape, dtype), (entry.shape, entry.dtype)
        facts = (LeafFacts(None, (ArraySpec(*pair),)) for pair in pairs)
        mismatches = compare_leaf(*facts)
        end = uncastable(mismatches)
        if prng is not None and mismatches:
            end = end or f", which does not become {dtype}"
        if not mismatches or (self.cast and not end and fields_of(mismatches) == (Field.DTYPE,)):
            note = f"from {entry.dtype} to {dtype}" if mismatches else ""
            self.fitted.pieces.append(dataclasses.replace(piece, source=entry.name, note=note))
        else:
            hint = _SIZES if Field.SHAPE in fields_of(mismatches) else _DTYPE if end else CAST
            self.problems.add(piece.leaf, note_of(mismatches, "source") + end, hint)


def fit(source: Source, to: str, target: State, rename: object, cast: bool, reported: Collection[Path] = ()) -> Fit:
    """Fits the leaves of a target from a source; nothing is said of leaves that are reported already."""
    return _Fitter(source, target, rename, cast, reported).run(to)
