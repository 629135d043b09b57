"""The handler that Orbax's first interface calls: it writes a state into a directory, and reads states back.

Whatever commits the directory (a checkpointer, or a manager) calls `finalize` before it renames it.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import orbax.checkpoint as ocp

from statewise._src.checkpoint.orbax.epath import epath
from statewise._src.checkpoint.orbax.exchange import write_together
from statewise._src.checkpoint.orbax.state_writer import StateWriter
from statewise._src.checkpoint.orbax.write import tree_handler

__all__ = ["StateHandler"]


class StateHandler(ocp.AsyncCheckpointHandler):
    """Writes states with their manifests; for Orbax to call."""

    def __init__(self) -> None:
        self._writer: StateWriter | None = None
        self._item: Any = None

    async def async_save(self, directory: Any, args: Any) -> list[Any]:
        """Starts a save; returns futures to wait for."""
        self._item, self._writer = args, (writer := args.writer(directory))
        # Orbax may make the directory in the background: this future waits until it exists.
        written = ocp.future.CommitFutureAwaitingContractedSignals(
            asyncio.to_thread(write_together, directory, writer.write, args.limit), name="statewise-arrays"
        )
        return [written]

    def save(self, directory: Any, args: Any) -> None:
        """Writes everything but the manifest."""
        self._item, self._writer = args, args.writer(directory)
        write_together(directory, self._writer.write, args.limit)

    def finalize(self, directory: Any) -> None:
        """Writes the manifest when everything else is written; called once, by one process."""
        assert self._writer is not None, "finalize comes after a save"
        self._item.commit(directory, self._writer)
        self.close()

    def restore(self, directory: Any, args: Any) -> Any:
        """Restores a state, as `sw.restore` does."""
        return args.restored(epath(directory))

    def metadata(self, directory: Any) -> Any:
        """Returns what Orbax knows about the tree."""
        with contextlib.closing(tree_handler()) as handler:
            return handler.metadata(epath(directory))

    def close(self) -> None:
        """Closes what the last save used."""
        self._item = self._writer = None
