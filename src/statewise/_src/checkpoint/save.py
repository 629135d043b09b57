"""`sw.save`: a state into a directory that is complete from the moment it exists.

On a disk everything is written into a hidden directory beside the final one, which is then renamed.  So a directory
with the final name is a complete checkpoint, and what a process left that died has another name.  In an object store,
where nothing can be renamed, a checkpoint is complete from the moment that its manifest exists: `store_commit`.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
from collections.abc import Iterator, Sequence
from pathlib import Path as FilePath
from typing import Any, get_args

from statewise._src.checkpoint.format.checksums import sums_of
from statewise._src.checkpoint.format.layout import Layout, lay_out
from statewise._src.checkpoint.format.locate import find
from statewise._src.checkpoint.format.manifest import LeafRecord, Manifest
from statewise._src.checkpoint.format.parse import read_manifest
from statewise._src.checkpoint.format.records import kinds_of
from statewise._src.checkpoint.orbax.flush import make_folder, named
from statewise._src.checkpoint.orbax.paths import new_place
from statewise._src.checkpoint.orbax.progress import growing
from statewise._src.checkpoint.orbax.state_writer import Saving, StateWriter
from statewise._src.checkpoint.orbax.stores import StorePath
from statewise._src.checkpoint.store_commit import save_in_store
from statewise._src.checkpoint.temporary import clear_abandoned, removed_on_failure, temporary_of_all
from statewise._src.checkpoint.together import is_first, together
from statewise._src.common.compare import LeafFacts, compare_leaf, note_of
from statewise._src.common.problems import Problems
from statewise._src.core.plan import State
from statewise.errors import SaveError, StructureError

__all__ = [
    "check_layout",
    "kinds_to_save",
    "save",
]


def save(
    path: str | os.PathLike[str],
    state: State,
    *,
    only: str | Sequence[str] | None = None,
    base: str | os.PathLike[str] | None = None,
    layout: Layout = "named",
) -> None:
    """Writes a state to a disk or an object store: every kind except ephemeral ones, optimizer state included.

    What is at `path` afterwards is complete; if anything goes wrong, nothing is there.  It is also a plain Orbax
    checkpoint, in which each leaf has its own path.  With several processes, all of them call this.

    Args:
      path: a directory that does not exist yet; its parents are made.  Or the URL of one in an object store,
        `gs://bucket/run/step_100` or `s3://...`, for which the clouds' own libraries find credentials.  Nothing is ever
        overwritten: `sw.Checkpoints` keeps a directory for each step.
      state: a state; it does not change.
      only: the kinds to save, such as `("lora",)`; by default all that are `saved`.
      base: the path of a checkpoint that has the kinds which `only` leaves out, unchanged; a restore takes them from
        there.  Their checksums are compared, so they are unchanged.  A base cannot have a base of its own.  If the plan
        has an optimizer, its state is a kind too: `only=("lora", "optimizer")`.
      layout: `"named"`, each array under its own path, or `"packed"`: arrays of up to a mebibyte share a few arrays,
        for speed, and only Statewise can separate them.

    Raises:
      SaveError: there is something at `path` already, or it cannot be written (a full disk, no permission, a store
        that refuses); or another writer was faster.
      StructureError: the state was donated, is abstract, or is being traced; `base` has other values.
      DeclarationError: `only` names a kind that does not exist, or one that is declared ephemeral.

    Example:
      >>> import tempfile
      >>> from flax import nnx
      >>> import statewise as sw
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> state = sw.plan(model).take(model)
      >>> folder = tempfile.mkdtemp()
      >>> sw.save(f"{folder}/first", state)
      >>> state, report = sw.restore(f"{folder}/first", state)
      >>> report.counts["params"]
      {'restored': 2}
    """
    with together(path):  # what one process cannot read or write, the others may
        if not isinstance(state, State):
            raise StructureError(
                f"sw.save wants a state, not {type(state).__name__}.", hint="sw.save(path, plan.take(model))"
            )
        kinds = kinds_to_save(state, only)
        check_layout(layout)
        final = new_place(path, example="sw.save('run/step_100', state)")
        saving = Saving(state, kinds, layout, _base(state, kinds, base, final))
    first = is_first()  # this one shows the progress of all
    size = sum(leaf.nbytes for leaf in state.tables.leaves if leaf.kind in kinds) if first else 0
    if isinstance(final, StorePath):
        save_in_store(final, saving, size)
        return
    with _committed(final) as temporary, growing(f"writing {final.name}", size, lambda: [temporary]):
        with together(final):
            writer = StateWriter(temporary, saving)
            writer.write()
        with together(final):
            if first:
                writer.finish()


def check_layout(layout: object) -> None:
    """Raises if a layout is unknown."""
    if layout not in get_args(Layout):
        raise SaveError(f"layout={layout!r} is neither 'named' nor 'packed'.", hint="layout='packed'")


def kinds_to_save(state: State, only: object) -> tuple[str, ...]:
    """Returns the kinds that a save writes."""
    hint = "declare it saved: kinds.replace({name}=dataclasses.replace(kinds['{name}'], saved=True))"
    return kinds_of(state, only, ", and is never saved", hint)


@contextlib.contextmanager
def _committed(final: FilePath) -> Iterator[FilePath]:
    """Yields a directory to write into; afterwards it has the final name, or is removed if something went wrong."""
    temporary, first = temporary_of_all(final), is_first()
    with removed_on_failure(final, temporary, is_first=first):
        with together(final):
            if first:
                make_folder(final.parent)
                clear_abandoned(final)
                temporary.mkdir()
        yield temporary
        with together(final, lambda: os.path.exists(final)):
            if first:
                # The order makes it safe against a crash: the data, then the name, then the directory with the name.
                with named(temporary, final):
                    temporary.rename(final)


# --- over a base -----------------------------------------------------------------------------------------------


def _base(state: State, kinds: tuple[str, ...], base: object, final: FilePath | StorePath) -> dict[str, str] | None:
    """Returns what the manifest records about the base: its path, and the digest that identifies it."""
    if base is None:
        return None
    found = find(base)
    folder = found if isinstance(found, StorePath) else FilePath(os.fspath(found))
    manifest = read_manifest(folder)
    rest = tuple(name for name in kinds_to_save(state, None) if name not in kinds)
    if not rest:
        return None  # a restore would take nothing from it
    problems = _compare_with_base(state, rest, manifest)
    problems.raise_as(
        StructureError,
        f"The base {folder} does not have the values of this state: a restore would go back to older ones.",
        f"save these kinds too: only={(*kinds, *dict.fromkeys(leaf.kind for leaf in problems.leaves))!r}; "
        "or a new base first: sw.save(base, state)",
    )
    return {"path": _relative(folder, final.parent), "digest": manifest.digest}


def _relative(folder: FilePath | StorePath, start: FilePath | StorePath) -> str:
    """Returns the path of a base as seen from a directory; if one of them is in another store, its complete path."""
    if isinstance(folder, StorePath):
        if isinstance(start, StorePath) and (folder.scheme, folder.bucket) == (start.scheme, start.bucket):
            return posixpath.relpath(f"/{folder.key}", f"/{start.key}")
        return str(folder)
    # With links followed: a link called `latest` may lead elsewhere when this is restored.
    real = os.path.realpath(folder)
    return real if isinstance(start, StorePath) else os.path.relpath(real, os.path.realpath(start))


def _compare_with_base(state: State, kinds: tuple[str, ...], manifest: Manifest) -> Problems:
    laid = lay_out(state, kinds, "named")
    sources, saved = iter(laid.sources), {leaf.id: leaf for leaf in manifest.leaves}
    problems = Problems()
    for record in laid.records:
        base = saved.get(record.id)
        sums = [sums_of(next(sources)) for _ in record.arrays]
        expected = None if base is None else _facts(base, [array.sums for array in base.arrays])
        mismatches = compare_leaf(_facts(record, sums), expected)
        if mismatches:
            problems.add(record.leaf(), note_of(mismatches, "base"))
    return problems


def _facts(record: LeafRecord, sums: Any) -> LeafFacts:
    """Returns what has to be the same for a restore to take a leaf from the base: its arrays, and their checksums."""
    return record.facts._replace(type=None, kind=None, ties=None, structure=None, within=None, values=sums)
