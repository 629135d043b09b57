"""A state among the items of an Orbax checkpoint, through either of Orbax's interfaces.

For `ocp.CheckpointManager` and the checkpointers it is an argument with a handler of its own, to save and to restore.
For `ocp.v1` it is an object that saves and loads itself (`StatefulCheckpointable`), with a handler that also reads it
as a plain tree, for those who have no state to load it into.
"""

from __future__ import annotations

import abc
import asyncio
import os
import types
from collections.abc import Awaitable, Iterable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from statewise._src.checkpoint.orbax.data_item import DataItem
from statewise._src.checkpoint.orbax.epath import epath, flush_item
from statewise._src.checkpoint.orbax.exchange import LIMIT, write_together
from statewise._src.checkpoint.orbax.handler import StateHandler
from statewise._src.checkpoint.orbax.state_writer import Saving, StateWriter
from statewise._src.checkpoint.orbax.store_steps import Claim
from statewise._src.checkpoint.orbax.stores import StorePath
from statewise._src.core.plan import State

__all__ = ["StateItem"]


class StateItem(ocp.args.CheckpointArgs, abc.ABC):
    """A state that Orbax saves and loads; the class that has one says what is saved, and how it is restored."""

    recorded: Mapping[str, str] = types.MappingProxyType({})  # what the manifest records of a step of `Checkpoints`
    claim: Claim | None = None  # the right to commit the step; None where Orbax commits it by a rename
    # The most seconds that a process waits for the others.  With None the first interface waits for none: a manager of
    # the user's own may be for some of the processes.
    limit: float | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        ocp.args.register_with_handler(StateHandler, for_save=True, for_restore=True)(cls)

    @property
    @abc.abstractmethod
    def saving(self) -> Saving:
        """Returns what a save writes."""

    def writer(self, directory: Any) -> StateWriter:
        """Returns what writes the state into a directory; it need not exist yet."""
        if self.claim is None:
            return StateWriter(directory, self.saving)
        return StateWriter(directory, self.saving, self.claim.own, self.claim.wrote)

    def commit(self, directory: Any, writer: StateWriter) -> None:
        """Writes the manifest, when everything else is written."""
        if self.claim is None:
            writer.finish()
            flush_item(directory)
        else:
            self.claim.commit(StorePath(str(directory)), writer)

    @abc.abstractmethod
    def restored(self, directory: str | os.PathLike[str]) -> State:
        """Restores the state and returns it."""

    async def save(self, directory: Any) -> Awaitable[None]:
        """Starts to save into a directory that Orbax makes; returns an awaitable that ends when all is written."""
        writer = self.writer(directory.path)
        if jax.process_count() > 1:
            await directory.await_creation()  # for the processes to write into it

        # In threads, because `write` blocks and Orbax runs this in its event loop.
        async def written() -> None:
            await directory.await_creation()
            await asyncio.to_thread(write_together, directory.path, writer.write, self.limit or LIMIT)
            if jax.process_index() == 0:
                await asyncio.to_thread(self.commit, directory.path, writer)

        return written()

    async def load(self, directory: Any) -> Awaitable[State]:
        """Starts to load; returns an awaitable that ends when the state is restored."""
        return asyncio.to_thread(self.restored, epath(directory))


def set_limits(items: Iterable[Any], processes: Any, timing: Any) -> None:
    """Tells our own items of a step how long its processes wait for each other: as long as Orbax does by its options.

    Args:
      items: the items; those of others are left as they are.
      processes: Orbax's options of processes; if not all of them write together, none is waited for.
      timing: Orbax's options of the background write.
    """
    if processes.active_processes is None and processes.primary_host is not None:
        for item in items:
            if isinstance(item, (StateItem, DataItem)):
                item.limit = timing.timeout_secs


class StateItemHandler(ocp.v1.CheckpointableHandler[Any, Any]):
    """Saves and loads states through `ocp.v1`; without a state to load into, it loads a plain tree of arrays."""

    async def save(self, directory: Any, checkpointable: Any) -> Awaitable[None]:
        """Starts to save; returns an awaitable that ends when all is written."""
        return await checkpointable.save(directory)

    async def load(self, directory: Any, abstract_checkpointable: Any = None) -> Awaitable[Any]:
        """Starts to load; returns an awaitable of the item, or of the tree."""
        if abstract_checkpointable is None:
            return await ocp.v1.handlers.PyTreeHandler().load(directory)
        loading = await abstract_checkpointable.load(directory)

        async def loaded() -> Any:
            await loading
            return abstract_checkpointable

        return loaded()

    async def metadata(self, directory: Any) -> Any:
        """Returns what Orbax knows about the tree."""
        return await ocp.v1.handlers.PyTreeHandler().metadata(directory)

    def is_handleable(self, checkpointable: Any) -> bool:
        """Returns whether it saves this object."""
        return isinstance(checkpointable, StateItem)

    def is_abstract_handleable(self, abstract_checkpointable: Any) -> bool:
        """Returns whether it loads into this object."""
        return isinstance(abstract_checkpointable, StateItem)


# What the first interface has written is read by the same handler.
ocp.v1.handlers.register_handler(
    StateItemHandler, secondary_typestrs=[f"{StateHandler.__module__}.{StateHandler.__qualname__}"]
)
