"""Orbax's side: a handler that writes a state with its manifest into a directory, and reads arrays back.

The handler is Orbax's own for pytrees, with two things added: the checksums, and of them the manifest's text, made in a
thread beside the write; and the manifest itself, which `finalize` writes last, when every other file stands and can be
listed.  Whoever commits the directory (`sw.save`, or an Orbax manager) calls `finalize` before it renames: a directory
without a manifest is none of ours.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import datetime
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp

from statewise._src.checkpoint.format.checksums import Sums, held, is_spread, sums_of, sums_of_runs
from statewise._src.checkpoint.format.files import files_of
from statewise._src.checkpoint.format.layout import LaidOut, lay_out
from statewise._src.checkpoint.format.manifest import NAME, KindRecord, Manifest, leaves_text, write_manifest
from statewise._src.checkpoint.orbax.epath import epath
from statewise._src.checkpoint.orbax.paths import check_usable
from statewise._src.checkpoint.orbax.write import writing_handler
from statewise._src.common import compat
from statewise._src.core.plan import State
from statewise._src.filters.explain import as_code
from statewise.errors import SaveError

__all__ = ["Saving", "StateHandler"]


@dataclasses.dataclass(frozen=True)
class Saving:
    """What is to be saved: a state, of it these kinds, in this layout, over this base."""

    state: State
    kinds: tuple[str, ...]
    layout: str = "named"
    base: Mapping[str, str] | None = None


class StateHandler(ocp.AsyncCheckpointHandler):
    """Writes states with their manifests; for Orbax to call."""

    def __init__(self) -> None:
        self._tree = writing_handler()
        self._manifest: Manifest | None = None
        self._leaves: concurrent.futures.Future[str] | None = None

    async def async_save(self, directory: Any, args: Any) -> list[Any]:
        """Starts a save; what it returns can be waited for."""
        return await self.begin(directory, args.saving)

    async def begin(self, directory: Any, saving: Saving) -> list[Any]:
        """As `async_save`, for other rooms."""
        check_usable(directory, writing=True)  # by an Orbax manager of the user's own, too
        directory = epath(directory)
        laid = lay_out(saving.state, saving.kinds, saving.layout)
        self._manifest = _manifest(saving, laid)
        text = _leaves_text(laid)
        written: Sequence[Any] | None = None
        if laid.tree:  # else nothing but empty leaves: Orbax refuses an empty tree
            written = await self._tree.async_save(directory, args=ocp.args.PyTreeSave(laid.tree))
        pool = concurrent.futures.ThreadPoolExecutor(1, "statewise-manifest")
        leaves = self._leaves = pool.submit(text)
        pool.shutdown(wait=False)  # not a `with`, which would wait
        return [*(written or ()), _Waiting(leaves)]

    def save(self, directory: Any, args: Any) -> None:
        """Writes everything but the manifest."""
        run(self.async_save(directory, args))

    def finalize(self, directory: Any) -> None:
        """Writes the manifest, when all else is written.  Called once, by one process."""
        assert self._manifest is not None, "finalize comes after a save"
        assert self._leaves is not None, "finalize comes after a save"
        directory = epath(directory)
        leaves = self._leaves.result()
        if any(array.key or array.buffer for leaf in self._manifest.leaves for array in leaf.arrays):
            self._tree.finalize(directory)
            # Where Orbax finds nothing to merge, it says so in a log alone.
            if not (directory / "manifest.ocdbt").exists():
                raise SaveError(
                    f"Orbax could not put the checkpoint in {directory} together: it found nothing of its own there.",
                    hint="a path of plain letters: 'run/step_100'",
                )
        data = write_manifest(dataclasses.replace(self._manifest, files=files_of(directory)), leaves)
        self._manifest = self._leaves = None
        (directory / NAME).write_bytes(data)

    def finish(self, directory: Any) -> None:
        """`finalize` by the one process that may, and the end of this handler."""
        if jax.process_index() == 0:
            self.finalize(directory)
        self.close()

    def restore(self, directory: Any, args: Any) -> Any:
        """Reads a state back, as `sw.restore`."""
        return args.restored(epath(directory))

    def metadata(self, directory: Any) -> Any:
        """What Orbax knows of the tree."""
        return self._tree.metadata(epath(directory))

    def close(self) -> None:
        """Lets Orbax's handler go."""
        self._tree.close()


def run(saving: Any) -> None:
    """Waits for a save to be written."""

    async def waited() -> None:
        # All of them, whatever becomes of the first: what still writes would undo the removal of a failed save.
        waiting = [asyncio.to_thread(future.result) for future in await saving]
        ended = await asyncio.gather(*waiting, return_exceptions=True)
        for error in ended:
            if isinstance(error, BaseException):
                raise error

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(waited())
    else:  # in a notebook: a loop within a loop has to be another thread's
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            pool.submit(asyncio.run, waited()).result()


class _Waiting:
    """A thread's result as a future of Orbax's."""

    def __init__(self, future: concurrent.futures.Future[Any]) -> None:
        self._future = future

    def result(self, timeout: float | None = None) -> Any:
        return self._future.result(timeout)


def _leaves_text(laid: LaidOut) -> Callable[[], str]:
    """What makes the manifest's text of the leaves, with their checksums.

    They are of arrays that a later step may donate: what they are read from is taken hold of here.
    """
    done: dict[int, Sums] = {}
    kept: dict[int, Any] = {}
    in_buffers = {number for _, together in laid.packed for number in together.members}
    for number, source in enumerate(laid.sources):
        if number in in_buffers:
            continue
        if is_spread(source):
            done[number] = sums_of(source)  # all processes together
        else:
            kept[number] = held(source)

    def text() -> str:
        for buffer, together in laid.packed:
            done.update(zip(together.members, sums_of_runs(buffer, together.runs), strict=True))
        done.update((number, sums_of(source)) for number, source in kept.items())
        return leaves_text(laid.records, [done[number] for number in range(len(done))])

    return text


def _manifest(saving: Saving, laid: LaidOut) -> Manifest:
    kinds = {
        name: KindRecord(as_code(kind.of), kind.handling(), kind.saved and name in saving.kinds)
        for name, kind in saving.state.tables.kinds.items()
    }
    written = compat.versions() | {"at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
    return Manifest(written, saving.layout, kinds, laid.records, laid.buffers, saving.base)
