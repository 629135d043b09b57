"""The position of a data iterator among the items of a step, through either of Orbax's interfaces: a few small files.

Orbax sees files with their contents.  `checkpoint/data.py` says what they hold.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Mapping
from typing import Any

import orbax.checkpoint as ocp

from statewise._src.checkpoint.orbax.epath import epath
from statewise._src.checkpoint.orbax.exchange import write_together

__all__ = ["DataItem"]


class DataHandler(ocp.AsyncCheckpointHandler):
    """Writes the files of each process; for Orbax's first interface to call."""

    async def async_save(self, directory: Any, args: Any) -> list[Any]:
        """Starts a save; returns futures to wait for."""
        # As for a state: Orbax may make the directory in the background.
        written = ocp.future.CommitFutureAwaitingContractedSignals(
            asyncio.to_thread(args.write_together, directory), name="statewise-data"
        )
        return [written]

    def save(self, directory: Any, args: Any) -> None:
        """Writes the files."""
        args.write_together(directory)

    def restore(self, directory: Any, args: Any = None) -> dict[str, bytes]:
        """Returns the files of all processes."""
        return _read(directory)


@ocp.args.register_with_handler(DataHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class DataItem(ocp.args.CheckpointArgs):
    """What one process saves of its iterator: files, by name.  Through the newer interface it saves itself."""

    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    limit: float | None = None  # the most seconds that a process waits for the others; None if it waits for none

    def write_together(self, directory: Any) -> None:
        """Writes the files into a directory that exists, and waits for the other processes to do so."""

        def write() -> None:
            folder = epath(directory)
            for name, content in self.files.items():
                (folder / name).write_bytes(content)

        write_together(directory, write, self.limit)

    async def save(self, directory: Any) -> Awaitable[None]:
        """Starts to save into a directory that Orbax makes; returns an awaitable that ends when all is written."""

        async def written() -> None:
            await asyncio.to_thread(self.write_together, await directory.await_creation())

        return written()

    async def load(self, directory: Any) -> Awaitable[None]:
        """Starts to load the files of all processes; returns an awaitable that ends when they are read."""

        async def loaded() -> None:
            self.files = await asyncio.to_thread(_read, directory)

        return loaded()


def _read(directory: Any) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in epath(directory).iterdir()}
