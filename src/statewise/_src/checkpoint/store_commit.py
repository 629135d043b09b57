"""A checkpoint in an object store: complete from the moment that its manifest exists.

Nothing can be renamed there.  Each writer writes into a directory of its own below the path, `statewise-` and a random
token, then three files beside it that Orbax looks for, and at last the manifest, on the condition that there is none.
Of two writers one meets that condition.  The manifest names the directory that it belongs to, so nothing that another
writer does can change what it describes; the three files are only for Orbax, and whoever has lost writes them again as
the winner's directory has them.  What writers left that died is removed by the next one, when its manifest exists: then
no other can come to its own.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Iterator

from statewise._src.checkpoint.format.locate import FOR_ORBAX, not_ours
from statewise._src.checkpoint.format.manifest import NAME, OWN
from statewise._src.checkpoint.format.parse import read_manifest
from statewise._src.checkpoint.orbax.paths import TAKEN_HINT
from statewise._src.checkpoint.orbax.state_writer import Saving, StateWriter, run
from statewise._src.checkpoint.orbax.stores import (
    StoreError,
    StorePath,
    listing,
    probe,
    read,
    remove,
    said,
    write_if,
)
from statewise._src.checkpoint.together import agreed, is_first, together
from statewise.errors import SaveError, StatewiseError

__all__ = ["check_free", "save_in_store"]

_log = logging.getLogger("statewise")


def save_in_store(final: StorePath, saving: Saving) -> None:
    """Writes a checkpoint to an object store; every process calls this.

    Raises:
      SaveError: there is something at this path; another writer was faster; or the store refuses.
    """
    own = f"{OWN}{agreed(secrets.randbits(32)):08x}{agreed(secrets.randbits(32)):08x}"
    with _store_refusals(final):
        with together(final):
            if is_first():
                check_free(final)
        with contextlib.closing(StateWriter(final, saving, own)) as writer:
            with _removed_on_failure(final, own):
                with together(final):
                    run(writer)
                with together(final):
                    data = writer.manifest() if is_first() else b""
            with together(final):
                if is_first():
                    for name, content in writer.for_orbax().items():
                        (final / name).write_bytes(content)
                    _commit(final, own, data)


def check_free(final: StorePath) -> None:
    """Raises if there is anything at a path but what writers left that did not come to their manifest.

    Raises:
      SaveError: there is, or the store does not say.
    """
    with _store_refusals(final):
        names, is_object = listing(final), bool(final.key) and probe(final)
    if not_ours(names) or is_object:
        raise SaveError(f"There is already something at {final}, and nothing is overwritten.", hint=TAKEN_HINT)


def _commit(final: StorePath, own: str, data: bytes) -> None:
    """Writes the manifest, if there is none, and then removes what other writers left."""
    path = final / NAME
    try:
        absent = read(path)
        written = write_if(path, data, absent.generation) if absent.data is None else None
    except StoreError as error:
        # A request without an answer may have been carried out; so nothing is removed.
        raise SaveError(
            f"It is not known whether {final} is complete: {error.strerror}, when the manifest was written.",
            hint=f"sw.inspect({str(final)!r}) says whether it is; if not, save again to this path",
        ) from error
    if written is None:
        with contextlib.suppress(FileNotFoundError):  # the winner has been removed by its user
            _write_for_orbax(final)
        remove(final, [f"{own}/{name}" for name in listing(final / own)])
        raise SaveError(
            f"Another writer has written {final} at the same time. That one is complete; this one was dropped.",
            hint="another path for each writer",
        )
    try:
        _write_for_orbax(final)
        names = listing(final)
        remove(final, [name for name in names if name.startswith(OWN) and not name.startswith(f"{own}/")])
    except StoreError as error:
        _log.warning("%s is complete, but what other writers left there may not be removed: %s", final, error.strerror)


def _write_for_orbax(final: StorePath) -> None:
    """Makes the files that Orbax reads those of the checkpoint's own directory, if another writer has replaced them."""
    index = read_manifest(final).index
    for name in FOR_ORBAX if index else ():
        own = read(final / index / name).data
        if own is not None and own != read(final / name).data:
            (final / name).write_bytes(own)
        if own is None:
            remove(final, [name])


@contextlib.contextmanager
def _removed_on_failure(final: StorePath, own: str) -> Iterator[None]:
    """Removes a writer's directory if it fails while it is writing there."""
    try:
        yield
    except BaseException as failure:
        if is_first():
            try:
                remove(final / own, listing(final / own))
            except StoreError as error:
                failure.add_note(f"What it has written is left below {final / own}: {error.strerror}.")
        raise


@contextlib.contextmanager
def _store_refusals(final: StorePath) -> Iterator[None]:
    """Raises what a store refuses as a `SaveError` that says so."""
    try:
        yield
    except StatewiseError:
        raise
    except (OSError, ValueError) as error:
        refusal = error if isinstance(error, StoreError) else said(error) if isinstance(error, ValueError) else None
        if refusal is None:
            raise
        raise SaveError(
            f"{final} could not be written: {refusal.strerror}. It is not a checkpoint; whatever is left there is "
            "removed by the next save to this path.",
            hint=refusal.hint,
        ) from error
