"""`sw.save`: a state into a directory that is complete from the moment it exists.

On a disk everything is written into a hidden directory beside the final one, which is then renamed.  So a directory
with the final name is a complete checkpoint, and what a process left that died has another name.  In an object store,
where nothing can be renamed, a checkpoint is complete from the moment that its manifest exists: `store_commit`.
"""

from __future__ import annotations

import contextlib
import glob
import os
import posixpath
import secrets
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path as FilePath
from typing import Any, get_args

import jax

from statewise._src.checkpoint.format.checksums import sums_of
from statewise._src.checkpoint.format.layout import Layout, lay_out
from statewise._src.checkpoint.format.locate import find
from statewise._src.checkpoint.format.manifest import LeafRecord, Manifest
from statewise._src.checkpoint.format.parse import read_manifest
from statewise._src.checkpoint.format.records import kinds_of
from statewise._src.checkpoint.orbax.flush import make_folder, named
from statewise._src.checkpoint.orbax.paths import new_place, short_name
from statewise._src.checkpoint.orbax.progress import growing
from statewise._src.checkpoint.orbax.state_writer import Saving, StateWriter
from statewise._src.checkpoint.orbax.stores import StorePath
from statewise._src.checkpoint.store_commit import another_writer, save_in_store
from statewise._src.checkpoint.together import agreed, is_first, together
from statewise._src.common.compare import LeafFacts, compare_leaf, note_of
from statewise._src.common.problems import Problems
from statewise._src.core.plan import State
from statewise.errors import SaveError, StatewiseError, StructureError

__all__ = [
    "check_layout",
    "clear_abandoned",
    "kinds_to_save",
    "reason_of",
    "save",
    "temporary_beside",
    "write_error",
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
        writer = StateWriter(temporary, saving)
        with together(final):
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
    # All processes use one name, which the first of them chooses.
    token = agreed(secrets.randbits(32))
    temporary = temporary_beside(final, agreed(os.getpid()), token)
    first = is_first()
    try:
        with together(final):
            if first:
                make_folder(final.parent)
                clear_abandoned(final)
                temporary.mkdir()
        yield temporary
        with together(final):
            if first:
                # The order makes it safe against a crash: the data, then the name, then the directory with the name.
                with named(temporary, final):
                    temporary.rename(final)
        first = False  # nothing is left to remove
    except StatewiseError:
        raise
    except (OSError, ValueError) as error:
        # TensorStore reports what the file system rejects as a ValueError.
        if isinstance(error, OSError) or _is_of_disk(error):
            raise write_error(final, error) from error
        raise
    finally:
        if first:
            _remove(temporary)


def write_error(final: FilePath, error: Exception) -> SaveError:
    """Returns the error for something that could not be written, and of which nothing is left."""
    if final.exists():
        return another_writer(final)
    hint = "free some space, or choose a directory that can be written to"
    return SaveError(f"{final} could not be written: {reason_of(error)}. Nothing of it is left.", hint=hint)


def reason_of(error: Exception) -> str:
    """Returns what the system reported, in its own words."""
    if isinstance(error, StatewiseError):
        return error.message.rstrip(".")
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    *first, last = str(error).split(" [")[0].split(": ")  # TensorStore's text starts with where it was
    return f"{first[-1]}: {last}" if first and last.startswith('"') else last


def _remove(folder: FilePath) -> None:
    """Removes what was written; several times, because threads of a failed write may still make files for a moment."""
    for pause in (0.0, 0.02, 0.1, 0.5):
        time.sleep(pause)
        shutil.rmtree(folder, ignore_errors=True)


def _is_of_disk(error: Exception) -> bool:
    words = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "No space left", "File too large", "Error writing", "quota")
    # TensorStore adds the number to whatever the system has reported.
    return "os_error_code=" in str(error) or any(word in str(error) for word in words)


def _host() -> str:
    return "".join(c if c.isalnum() else "_" for c in socket.gethostname())[:40] if jax.process_count() == 1 else "many"


def temporary_beside(final: FilePath, pid: int, token: int) -> FilePath:
    """Returns where a process writes until the result gets its final name."""
    return final.parent / f".{short_name(final.name)}.tmp-{_host()}-{pid}-{token:08x}"


def clear_abandoned(final: FilePath) -> None:
    """Removes what processes of this machine left that died while they wrote to this same path."""
    start = f".{short_name(final.name)}.tmp-{_host()}-"
    for folder in final.parent.glob(f"{glob.escape(start)}*"):
        pid = folder.name.removeprefix(start).partition("-")[0]
        if pid.isdigit() and jax.process_count() == 1 and not _is_alive(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)  # the process exists, and is another user's
    return True


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
