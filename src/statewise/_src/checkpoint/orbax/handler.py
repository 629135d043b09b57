"""The handler that Orbax calls: it writes a state with its manifest into a directory, and reads states back.

It is Orbax's own handler for pytrees with two additions: the checksums and the manifest's text of the leaves, computed
in a thread while the arrays are written; and the manifest itself, which `finalize` writes last, when every other file
exists and can be listed.  Whatever commits the directory (`sw.save`, or an Orbax manager) calls `finalize` before it
renames it: a directory without a manifest is not a checkpoint.
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
    """What to save: these kinds of a state, in this layout, over this base."""

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
        """Starts a save; returns futures to wait for."""
        return await self.begin(directory, args.saving)

    async def begin(self, directory: Any, saving: Saving) -> list[Any]:
        """Starts a save, as `async_save`, for callers other than Orbax."""
        check_usable(directory, writing=True)  # here, because a user's own Orbax manager chooses the directory
        directory = epath(directory)
        laid = lay_out(saving.state, saving.kinds, saving.layout)
        self._manifest = _manifest(saving, laid)
        text = _leaves_text(laid)
        written: Sequence[Any] | None = None
        if laid.tree:  # otherwise all leaves are empty, and Orbax does not accept an empty tree
            written = await self._tree.async_save(directory, args=ocp.args.PyTreeSave(laid.tree))
        pool = concurrent.futures.ThreadPoolExecutor(1, "statewise-manifest")
        self._leaves = pool.submit(text)
        pool.shutdown(wait=False)  # a `with` block would wait
        return [*(written or ()), self._leaves]

    def save(self, directory: Any, args: Any) -> None:
        """Writes everything but the manifest."""
        run(self.async_save(directory, args))

    def finalize(self, directory: Any) -> None:
        """Writes the manifest when everything else is written; called once, by one process."""
        assert self._manifest is not None, "finalize comes after a save"
        assert self._leaves is not None, "finalize comes after a save"
        directory = epath(directory)
        leaves = self._leaves.result()
        if any(array.key or array.buffer for leaf in self._manifest.leaves for array in leaf.arrays):
            self._tree.finalize(directory)
            # If Orbax finds nothing to merge, it only logs that.
            if not (directory / "manifest.ocdbt").exists():
                raise SaveError(
                    f"Orbax could not put the checkpoint in {directory} together: it found nothing of its own there.",
                    hint="a path of plain letters: 'run/step_100'",
                )
        data = write_manifest(dataclasses.replace(self._manifest, files=files_of(directory)), leaves)
        self._manifest = self._leaves = None
        (directory / NAME).write_bytes(data)

    def finish(self, directory: Any) -> None:
        """Calls `finalize` in the one process that may, and closes this handler."""
        if jax.process_index() == 0:
            self.finalize(directory)
        self.close()

    def restore(self, directory: Any, args: Any) -> Any:
        """Restores a state, as `sw.restore` does."""
        return args.restored(epath(directory))

    def metadata(self, directory: Any) -> Any:
        """Returns what Orbax knows about the tree."""
        return self._tree.metadata(epath(directory))

    def close(self) -> None:
        """Closes Orbax's handler."""
        self._tree.close()


def run(saving: Any) -> None:
    """Waits until a save is written."""

    async def waited() -> None:
        # Wait for all of them, even if the first fails: a thread that still writes would undo the removal of the files.
        waiting = [asyncio.to_thread(future.result) for future in await saving]
        results = await asyncio.gather(*waiting, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(waited())
    else:  # in a notebook a loop is running, and another one needs another thread
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            pool.submit(asyncio.run, waited()).result()


def _leaves_text(laid: LaidOut) -> Callable[[], str]:
    """Returns a function that makes the manifest's text of the leaves, with their checksums.

    A later step may donate the arrays while that function runs in its thread, so their values are taken here.
    """
    sums: dict[int, Sums] = {}
    values: dict[int, Any] = {}
    in_buffers = {number for _, buffer in laid.packed for number in buffer.numbers}
    for number, source in enumerate(laid.sources):
        if is_spread(source):
            sums[number] = sums_of(source)  # a collective: all processes have to take part, in the same order
        elif number not in in_buffers:
            values[number] = held(source)

    def text() -> str:
        for array, buffer in laid.packed:
            sums.update(zip(buffer.numbers, sums_of_runs(array, buffer.runs), strict=True))
        sums.update((number, sums_of(value)) for number, value in values.items())
        return leaves_text(laid.records, [sums[number] for number in range(len(sums))])

    return text


def _manifest(saving: Saving, laid: LaidOut) -> Manifest:
    kinds = {
        name: KindRecord(as_code(kind.of), kind.handling(), kind.saved and name in saving.kinds)
        for name, kind in saving.state.tables.kinds.items()
    }
    written = compat.versions() | {"at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
    buffers = tuple(buffer.stored for _, buffer in laid.packed)
    return Manifest(written, saving.layout, kinds, laid.records, buffers, saving.base)
