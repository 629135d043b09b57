"""A checkpoint in an object store: complete from the moment that its manifest exists.

Nothing can be renamed there.  Each writer writes into a directory of its own below the path, `statewise-` and a random
token, and then the manifest, on the condition that there is none.  Of two writers one meets that condition.  The
manifest names the directory that it belongs to, so nothing that another writer does can change what it describes.

When its manifest exists, the winner writes beside it what Orbax looks for, and removes what other writers left: those
that died, and those that are still writing, of which none can come to its own manifest any more.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping

from statewise._src.checkpoint.format.locate import is_left
from statewise._src.checkpoint.format.manifest import NAME, OWN
from statewise._src.checkpoint.orbax.paths import TAKEN_HINT
from statewise._src.checkpoint.orbax.progress import counting
from statewise._src.checkpoint.orbax.state_writer import Saving, StateWriter
from statewise._src.checkpoint.orbax.store_errors import StoreError, said
from statewise._src.checkpoint.orbax.store_steps import MARK
from statewise._src.checkpoint.orbax.stores import StorePath, listing, probe, read, remove, write_all, write_if
from statewise._src.checkpoint.together import agreed_token, is_first, together
from statewise.errors import SaveError, StatewiseError

__all__ = ["another_writer", "check_free", "save_in_store"]

_log = logging.getLogger("statewise")


def save_in_store(final: StorePath, saving: Saving, size: int = 0) -> None:
    """Writes a checkpoint to an object store; every process calls this.

    Args:
      final: its path.
      saving: what to save.
      size: the number of bytes to write, of which this process shows how many are written; 0 for none.

    Raises:
      SaveError: there is something at this path; another writer was faster; or the store refuses.
    """
    own = f"{OWN}{agreed_token()}"
    with _store_refusals(final):
        with together(final):
            if is_first():
                check_free(final)
        with _removed_on_failure(final, own), counting(f"writing {final.name}", size) as wrote:
            with together(final):
                writer = StateWriter(final, saving, own, wrote)
                writer.write()
            with together(final):
                data = writer.manifest() if is_first() else b""
        with together(final, lambda: _is_complete(final)):
            if is_first():
                _commit(final, own, data)
                _finish(final, own, writer.for_orbax)


def check_free(final: StorePath) -> None:
    """Raises if there is anything at a path but what writers left that did not come to their manifest.

    Raises:
      SaveError: there is, or the store does not say.
    """
    with _store_refusals(final):
        names, is_object = listing(final), bool(final.key) and probe(final)
    if is_object or not all(map(is_left, names)):
        raise SaveError(f"There is already something at {final}, and nothing is overwritten.", hint=TAKEN_HINT)


def _commit(final: StorePath, own: str, data: bytes) -> None:
    """Writes the manifest, if there is none."""
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
        lost = another_writer(final)
        _remove_own(final, own, lost)
        raise lost


def another_writer(final: object) -> SaveError:
    """Returns the error for a path that another writer has written first."""
    return SaveError(
        f"Another writer has written {final} at the same time. That one is complete; this one was dropped.",
        hint="another path for each writer",
    )


def _is_complete(final: StorePath) -> bool:
    """Returns whether the store says that there is a manifest."""
    try:
        return probe(final / NAME)
    except StoreError:
        return False


def _finish(final: StorePath, own: str, for_orbax: Mapping[str, bytes]) -> None:
    """Writes what Orbax looks for beside the manifest, and removes what other writers left."""
    try:
        write_all(final, for_orbax)
        if for_orbax:  # Orbax takes what has no such file for incomplete, and this is the last that it needs
            (final / MARK).write_text("The manifest of Statewise was written before this file.")
        remove(final, [name for name in listing(final) if is_left(name) and not name.startswith(f"{own}/")])
    except StoreError as error:
        _log.warning("%s is complete, but not all that Orbax needs to read it is there: %s", final, error.strerror)


@contextlib.contextmanager
def _removed_on_failure(final: StorePath, own: str) -> Iterator[None]:
    """Removes a writer's directory if it fails while it is writing there.

    Raises:
      SaveError: another writer has come to its manifest, and has removed what this one was writing.
    """
    try:
        yield
    except BaseException as failure:
        if is_first():
            _remove_own(final, own, failure)
        is_of_store = isinstance(failure, (OSError, ValueError)) and not isinstance(failure, StatewiseError)
        if is_of_store and _is_complete(final):
            raise another_writer(final) from failure
        raise


def _remove_own(final: StorePath, own: str, failure: BaseException) -> None:
    """Removes a writer's directory; if the store refuses that, the failure says so too."""
    try:
        remove(final / own, listing(final / own))
    except StoreError as error:
        failure.add_note(f"What it has written is left below {final / own}: {error.strerror}.")


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
