"""`sw.convert`: a checkpoint of one format into another, leaf by leaf, or a dry run of it.

The order is: open the source (metadata only); find for each leaf where it comes from and what prevents it; raise with
everything that is wrong; read; write.  A conversion into a state follows the target: it determines which leaves there
are, and the source's names are matched with the text of their paths.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np

from statewise._src.checkpoint.format.keys import words_of
from statewise._src.checkpoint.format.records import unpacked
from statewise._src.checkpoint.interop.adapter_folder import ADAPTER_FILE, adapter_config, as_read, as_written
from statewise._src.checkpoint.interop.export import FORMATS, Format, checkpoint_destination, destination, export
from statewise._src.checkpoint.interop.export_folder import check_options, export_folder
from statewise._src.checkpoint.interop.fit_names import fit_names
from statewise._src.checkpoint.interop.match import Fit, compare_tied, fit, fit_alone
from statewise._src.checkpoint.interop.named import as_theirs
from statewise._src.checkpoint.interop.open import open_any
from statewise._src.checkpoint.interop.sources import NAMED, Source, SourceArray, open_mapping
from statewise._src.checkpoint.save import save
from statewise._src.common.narrowing import Casts
from statewise._src.common.paths import Leaf, format_dtype, format_path, format_shape
from statewise._src.common.problems import counted
from statewise._src.common.tables import ShownData, Table, leaf_dict
from statewise._src.core.batches import check_not_batch
from statewise._src.core.plan import State
from statewise._src.core.state_data import check_not_donated
from statewise._src.names.names import NamesData, check_names
from statewise._src.plan.arrays import Spot
from statewise.errors import RestoreError, SaveError, StructureError

__all__ = ["Conversion", "convert"]
__all__ = ["Conversion", "convert"]

_BY_NAMES = (
    "sw.convert(state, 'folder', names=names); to read such files: sw.restore(path, target, names=names), or "
    "sw.convert(path, 'run/converted', target=target, names=names)"
)
_TARGET = "sw.convert(src, dst, target=plan.take(model)), or plan.abstract()"


@dataclasses.dataclass(frozen=True)
class Conversion(ShownData):
    """What a conversion did, or would do, leaf by leaf; prints as a table.

    Attributes:
      source: what was converted, in words.
      dst: where it went; None if nothing was written.
      source_format: the source's format: `statewise`, `orbax`, `safetensors` or `mapping`.
      to: the format written: `statewise`, `orbax`, `safetensors` or `linen`.
      matched: for each array its name in the source, which for a state is its path, and the leaf that it becomes; the
        leaf's `note` reports a cast.
      kept: leaves that have the target's own value, each with the reason in its `note`.
      missing: leaves of the target that the source lacks, each with what is known about it in its `note`.
      problems: leaves that the source has but that do not fit, each with what is wrong in its `note`.
      unexpected: the source's names that were not used.
      hints: for each sort of problem, what to change.
      tree: the nested dict of NumPy arrays, if there was no path to write to; None otherwise.

    Example:
      >>> from flax import nnx
      >>> import statewise as sw
      >>> state = sw.plan(nnx.Linear(2, 3, rngs=nnx.Rngs(0))).abstract()
      >>> variables = {"params": {"kernel": jax.ShapeDtypeStruct((2, 3), "float32")}}
      >>> conversion = sw.convert(variables, "run/linear", target=state, dry_run=True)
      >>> conversion.ok, [str(leaf) for leaf in conversion.missing]
      (False, ['bias: Param(3,) float32  kind=params  (missing from the source)'])
    """

    source: str
    dst: str | None
    source_format: str
    to: str
    matched: tuple[tuple[str, Leaf], ...]
    kept: tuple[Leaf, ...] = ()
    missing: tuple[Leaf, ...] = ()
    problems: tuple[Leaf, ...] = ()
    unexpected: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    tree: Any = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def ok(self) -> bool:
        """Returns whether the conversion succeeds."""
        return not (self.problems or self.missing)

    def raise_problems(self) -> None:
        """Raises if something prevents the conversion.

        Raises:
          RestoreError: with everything that does.
        """
        wrong = (*self.missing, *self.problems)
        if wrong:
            raise RestoreError(
                f"{self.source} does not become {self.dst or 'variables'} ({self.to}): "
                f"{counted(len(wrong), 'leaf is', 'leaves are')} in the way. Nothing was read or written.",
                leaves=wrong,
                hint="\n".join(self.hints),
            )

    def table(self) -> Table:
        """Returns a table with a line for each array, then one for each name that is unexpected."""
        rows = [_row(name, leaf, "cast" if leaf.note.startswith("from ") else "matched") for name, leaf in self.matched]
        for outcome, leaves in (("kept", self.kept), ("missing", self.missing), ("problem", self.problems)):
            rows += [_row("-", leaf, outcome) for leaf in leaves]
        rows += [(name, "-", "-", "-", "-", "unexpected", "-") for name in self.unexpected]
        columns = ("source", "path", "kind", "shape", "dtype", "outcome", "why")
        return Table(f"{self.source} to {self.dst or 'variables'} ({self.to})", columns, tuple(rows))

    def to_dict(self) -> dict[str, Any]:
        """Returns the conversion as plain data, without arrays."""
        leaves = {"kept": self.kept, "missing": self.missing, "problems": self.problems}
        return {
            "source": self.source,
            "dst": self.dst,
            "source_format": self.source_format,
            "to": self.to,
            "ok": self.ok,
            "matched": [{"source": name} | leaf_dict(leaf) for name, leaf in self.matched],
            **{name: list(map(leaf_dict, some)) for name, some in leaves.items()},
            "unexpected": list(self.unexpected),
            "hints": list(self.hints),
        }


def _row(name: str, leaf: Leaf, outcome: str) -> tuple[str, ...]:
    shown = (format_path(leaf.path), leaf.kind or "-", format_shape(leaf.shape), format_dtype(leaf.dtype))
    return (name, *shown, outcome, leaf.note or "-")


def convert(
    src: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Mapping[str, Any] | State,
    dst: str | os.PathLike[str] | None,
    *,
    target: State | None = None,
    to: Format | None = None,
    rename: Mapping[str, str | None] | Callable[[str], str | None] | None = None,
    dry_run: bool = False,
    cast: bool = False,
    names: NamesData | None = None,
    max_shard_bytes: SupportsIndex | None = None,
    extra_files: Sequence[str | os.PathLike[str]] = (),
) -> Conversion:
    """Converts a checkpoint: of Statewise, plain Orbax, safetensors, or Linen variables, each into each.

    Args:
      src: the path of a checkpoint of Statewise, of a plain Orbax checkpoint (or a manager's step with one tree), or of
        a `.safetensors` file, several of them, or a folder; or nested dicts of arrays, such as Linen's variables; or,
        with `names`, a state.
      dst: a path at which there is nothing, for a checkpoint of Statewise also in an object store; or None, to get a
        nested dict as the result's `tree` (with `to="orbax"` or `"linen"`).
      target: a state, or an abstract one: it determines which leaves there are, and their kinds, types, shapes and
        dtypes.  A checkpoint of Statewise needs one; without it, everything in the source is converted as it is.
      to: `"statewise"`, `"orbax"`, `"safetensors"` or `"linen"` (a plain Orbax checkpoint of variable collections);
        by default `"safetensors"` if `dst` ends in `.safetensors`, and `"statewise"` otherwise.
      rename: from names in the source to the paths of leaves, `layers/0/kernel`, as a mapping or a function; None
        leaves a name out.  A mapping does not change names that it does not have.
      dry_run: writes nothing, does not raise for mismatches, and reads no array, except for tied leaves that the source
        has under several names: their arrays have to be equal.
      cast: allows other dtypes, floating-point to floating-point and integer to integer.
      names: what the leaves are called elsewhere (`sw.Names`).  With a state as `src` it is written under these names:
        into a folder of safetensors files, as models are published, unless `dst` ends in `.safetensors`.  With a
        `target`, `src` are files that have these names.
      max_shard_bytes: the most bytes of arrays in one file of such a folder; 5 GiB if it is None.
      extra_files: files that are copied into the folder as they are, such as `config.json`.  With an
        `adapter_config.json` of the package peft among them the folder is one of a LoRA adapter: it has the leaves that
        are called `base_model.model...`, and no others, in `adapter_model.safetensors`; B is divided by the scale.

    Returns:
      what was matched, kept, missing, unexpected.  Leaves that a source cannot have (optimizer state, RNG, metrics)
      keep the target's values; others that are missing only if their kind declares `missing="keep"`.

    Raises:
      RestoreError: leaves are missing, have another shape or dtype, or do not exist in the format, or casts would lose
        numbers: all are listed, and nothing was written.  Or the source is not of a known format.
      CorruptedError: the source is not what was written.
      SaveError: there is something at `dst` already, or it cannot be written.
      StructureError: the target is not a state, or is needed and was not given.
      StatewiseError: the package safetensors is needed, and is not installed.

    Example:
      >>> import tempfile
      >>> from flax import nnx
      >>> import statewise as sw
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> state = sw.plan(model).take(model)
      >>> variables = sw.convert(state["params"], None, target=state, to="linen").tree
      >>> variables["params"]["kernel"].shape
      (2, 3)
      >>> folder = tempfile.mkdtemp()
      >>> print(sw.convert(variables, f"{folder}/linear", target=state).table().rows[0])
      ('params/bias', 'bias', 'params', '(3,)', 'float32', 'matched', '-')
      >>> sw.inspect(f"{folder}/linear")["params"].size
      9
    """
    if names is not None:
        check_names(names, _BY_NAMES)
    if names is not None and target is None:
        return _by_names(src, dst, to, names, dry_run, max_shard_bytes, extra_files, rename, cast)
    if names is not None and (rename is not None or isinstance(src, State)):
        raise StructureError("Files are read into a target by names, without rename; a state is not.", hint=_BY_NAMES)
    if isinstance(src, State):
        open_any(src)  # raises, before anything else about the arguments
    if max_shard_bytes is not None or extra_files:
        raise SaveError(
            "max_shard_bytes and extra_files are of a folder, which is written from a state by names.",
            hint="sw.convert(state, 'folder', names=names, max_shard_bytes=5 * 2**30)",
        )
    written = _format(dst, to)
    if target is not None and not isinstance(target, State):
        raise StructureError(f"The target of a conversion is a state, not {type(target).__name__}.", hint=_TARGET)
    if target is not None:
        check_not_batch(target)
    elif written == "statewise":
        raise StructureError(
            "A checkpoint of Statewise needs a target, which has the kinds and types of the leaves.", hint=_TARGET
        )
    place = None if dst is None or written == "statewise" else destination(dst, written)
    final = checkpoint_destination(dst) if dst is not None and written == "statewise" else place
    source = open_mapping(src) if isinstance(src, Mapping) else open_any(src)
    if names is not None and target is not None:
        source, fitted = fit_names(as_read(src, source), written, target, names, cast)
    else:
        fitted = fit_alone(source, written, rename) if target is None else fit(source, written, target, rename, cast)
    compare_tied(source, fitted)
    conversion = _conversion(source, final, written, fitted)
    if dry_run:
        return conversion
    conversion.raise_problems()
    arrays = _arrays(source, fitted, target, conversion)
    if written == "statewise" and target is not None and final is not None:
        save(final, _state(target, fitted, arrays))
        return conversion
    return dataclasses.replace(conversion, tree=export(written, place, fitted.pieces, arrays))


def _by_names(
    src: Any,
    dst: Any,
    to: str | None,
    names: NamesData,
    dry_run: bool,
    max_shard_bytes: Any,
    extra_files: Any,
    rename: Any,
    cast: bool,
) -> Conversion:
    """Writes a state under the names of other programs."""
    if not isinstance(src, State):
        raise StructureError(
            f"With names a state is converted, or files into a target; not {type(src).__name__} alone.", hint=_BY_NAMES
        )
    if rename is not None or cast or dst is None or to not in (None, "safetensors"):
        raise StructureError(
            "A state is written under other names into safetensors files: rename, cast and other formats do not go "
            "with it.",
            hint=_BY_NAMES,
        )
    check_not_batch(src)
    most, others = check_options(max_shard_bytes, extra_files)
    final = destination(dst, "safetensors")
    if final.name.endswith(".safetensors") and (max_shard_bytes is not None or others):
        fact = f"{final.name} is one file, and max_shard_bytes and extra_files are of a folder."
        raise SaveError(fact, hint=_BY_NAMES)
    if final.name == ADAPTER_FILE:
        fact = f"{ADAPTER_FILE} is of an adapter, and its adapter_config.json gives the scale of its matrices."
        raise SaveError(fact, hint="sw.convert(state, 'folder', names=names, extra_files=['adapter_config.json'])")
    config = adapter_config(others)
    if config is not None and max_shard_bytes is not None:
        raise SaveError("The file of an adapter is one file, and max_shard_bytes is of several.", hint=_BY_NAMES)
    source, problems, ours = as_theirs(src, names, adapter=config is not None)
    if config is not None and not problems:
        source = as_written(source, config)
    # Without a single array, the leaves that have no row say why.
    fitted = Fit() if problems and not source.entries else fit_alone(source, "safetensors", None)
    fitted.problems.extend(problems)
    conversion = _conversion(source, final, "safetensors", fitted)
    conversion = dataclasses.replace(conversion, matched=tuple((ours[name], leaf) for name, leaf in conversion.matched))
    if dry_run:
        return conversion
    conversion.raise_problems()
    export_folder(source, final, None if config else most, others, ADAPTER_FILE if config else "model.safetensors")
    return conversion


def _format(dst: object, to: str | None) -> str:
    if to is None and dst is not None:
        to = "safetensors" if str(dst).endswith(".safetensors") else "statewise"
    if to not in FORMATS:
        raise SaveError(
            f"to={to!r} is not a format." if to else "If nothing is written, to= has to name the format.",
            hint="one of: " + ", ".join(map(repr, FORMATS)),
        )
    if dst is None and to not in ("orbax", "linen"):
        raise SaveError(f"to={to!r} needs a path to write to.", hint="sw.convert(src, 'run/converted', ...)")
    return to


def _conversion(source: Source, final: Any, to: str, fitted: Fit) -> Conversion:
    skips_empty = final is not None and to in ("orbax", "linen")
    empty = "has no elements, so that Orbax stores nothing"
    parts = {entry.name: _shown(entry) for entry in source.entries}
    notes = [piece.note or (empty if skips_empty and 0 in piece.shape else "") for piece in fitted.pieces]
    return Conversion(
        source=source.name,
        dst=None if final is None else str(final),
        source_format="safetensors" if source.format == NAMED else source.format,
        to=to,
        matched=tuple(
            (parts.get(piece.source, piece.source), dataclasses.replace(piece.leaf, note=note))
            for piece, note in zip(fitted.pieces, notes, strict=True)
            if piece.source is not None
        ),
        kept=tuple(fitted.kept),
        missing=tuple(fitted.missing),
        problems=tuple(fitted.problems.leaves),
        unexpected=tuple(fitted.unexpected),
        hints=tuple(fitted.problems.hints),
    )


def _shown(entry: SourceArray) -> str:
    """Returns what an entry is called in the source."""
    more = f" and {len(entry.parts) - 1} more" if len(entry.parts) > 1 else ""
    return f"{entry.parts[0]}{more}" if entry.parts else entry.name


# --- values ----------------------------------------------------------------------------------------------------


def _arrays(source: Source, fitted: Fit, target: State | None, conversion: Conversion) -> list[np.ndarray]:
    """Returns the array of each piece as it is written: PRNG keys as their words."""
    read = source.read([piece.source for piece in fitted.pieces if piece.source is not None])
    own = {} if target is None else _kept(fitted, target)
    arrays = []
    for piece in fitted.pieces:
        if piece.source is not None:
            arrays.append(read[piece.source])
        else:
            arrays.append(own[piece.at] if piece.at in own else np.zeros(piece.shape, piece.dtype))
    casts = Casts(jax=False)
    for piece, array in zip(fitted.pieces, arrays, strict=True):
        casts.add(piece.leaf, array, piece.dtype)
    before = f"{source.name} does not become {conversion.dst or 'variables'} ({conversion.to}). "
    casts.check(RestoreError, "plan the model with the dtype of the source", before=before, after="written")
    with np.errstate(all="ignore"):  # what NumPy would warn about has been checked
        pairs = zip(fitted.pieces, arrays, strict=True)
        return [array.astype(jnp.dtype(piece.dtype), copy=False) for piece, array in pairs]


def _kept(fitted: Fit, target: State) -> dict[Spot | None, np.ndarray]:
    """Returns the target's own values that are kept, by kind and position; none without elements."""
    pieces = [piece for piece in fitted.pieces if piece.source is None and 0 not in piece.shape]
    spots = [piece.at for piece in pieces if piece.at is not None]
    check_not_donated(target, {kind for kind, _ in spots})
    parts = {kind: unpacked(target, kind) for kind in {kind for kind, _ in spots}}
    return {(kind, position): words_of(parts[kind][position]) for kind, position in spots}


def _state(target: State, fitted: Fit, arrays: list[np.ndarray]) -> State:
    """Returns a state with these arrays; kinds that are never saved stay abstract."""
    plan = target.tables.plain
    parts: dict[str, list[Any]] = {
        kind: [jax.ShapeDtypeStruct(spec.shape, spec.dtype) for spec in specs] for kind, specs in plan.specs.items()
    }
    for piece, array in zip(fitted.pieces, arrays, strict=True):
        assert piece.at is not None, "with a target every piece has its place"
        kind, position = piece.at
        is_key = piece.prng is not None
        parts[kind][position] = jax.random.wrap_key_data(jnp.asarray(array), impl=piece.prng) if is_key else array
    return State.of(plan, parts.values())
