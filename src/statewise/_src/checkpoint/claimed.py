"""The claim of `Checkpoints` to the step that it writes; only on an object store, where nothing can be renamed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from statewise._src.checkpoint.checkpointable import Checkpointable
from statewise._src.checkpoint.orbax.manager import Manager
from statewise._src.checkpoint.orbax.store_steps import Claim
from statewise._src.checkpoint.orbax.stores import StorePath
from statewise._src.checkpoint.step_errors import step_exists
from statewise._src.checkpoint.together import agreed_token, together

__all__ = ["Claims"]


class Claims:
    """Takes and ends the claim to each step of a manager.

    Args:
      directory: the directory of the steps; on a disk nothing is claimed.
      manager: what writes them.
    """

    def __init__(self, directory: Any, manager: Manager) -> None:
        self._directory = directory
        self._manager = manager
        self._claim: Claim | None = None

    @property
    def written(self) -> int | None:
        """Returns the number of bytes that were written of the step that is claimed; None if there is none."""
        return None if self._claim is None else self._claim.written

    def take(self, step: int, items: Mapping[str, Any]) -> dict[str, Any]:
        """Takes the right to commit a step; that to the one before has ended.

        Args:
          step: its number.
          items: its items.

        Returns:
          the items, of which the states know that the step is claimed.

        Raises:
          SaveError: the step is complete, or there is something that is not ours.
        """
        if not isinstance(self._directory, StorePath):
            return dict(items)
        token = agreed_token()
        with together(self._directory):
            claim = Claim(StorePath(str(self._manager.place(step))), token)
            if step in self._manager.found():  # another writer has committed it since it was looked for
                claim.release()
                raise step_exists(self._directory, step)
        self._claim = claim
        return {name: _claimed(item, claim) for name, item in items.items()}

    def end(self) -> None:
        """Waits for the step that is being written, and ends the claim to it.

        Raises:
          SaveError: another writer has taken it.
        """
        try:
            self._manager.wait()
        except Exception:  # an interrupted wait, which the next one goes on with, keeps the claim
            self._claim = None
            raise
        claim, self._claim = self._claim, None
        if claim is not None:
            claim.release()


def _claimed(item: Any, claim: Claim) -> Any:
    """Returns an item that knows the claim, if it is a state: a copy, because the user's own may be saved elsewhere."""
    if isinstance(item, Checkpointable):
        item = copy.copy(item)
        item.claim = claim
    return item
