"""`sw.Checkpoints`: a checkpoint for each step of a run, on Orbax's manager.

Orbax's manager, of either of its interfaces, numbers, commits and deletes the steps, and writes in the background; the
item called `state` in each of them is what `sw.save` writes.  `Checkpoints` adds no format of its own: every step can
be read with `sw.restore`, `sw.inspect`, or with a manager of Orbax's.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any, SupportsIndex, TypeVar

import numpy as np

from statewise._src.checkpoint.checkpointable import checkpointable
from statewise._src.checkpoint.claimed import Claims
from statewise._src.checkpoint.format.layout import Layout
from statewise._src.checkpoint.format.records import check_savable
from statewise._src.checkpoint.items import bytes_in, check_counts, check_timeout, items_of_step
from statewise._src.checkpoint.orbax.flush import make_folder
from statewise._src.checkpoint.orbax.manager import ITEM, open_manager
from statewise._src.checkpoint.orbax.options import Options, check_options
from statewise._src.checkpoint.orbax.paths import steps_in
from statewise._src.checkpoint.orbax.progress import LARGE, bar
from statewise._src.checkpoint.orbax.store_errors import reads
from statewise._src.checkpoint.restore import inspect, open_checkpoint
from statewise._src.checkpoint.restore_report import RestoreReport
from statewise._src.checkpoint.restore_result import RestoreResult
from statewise._src.checkpoint.save import check_layout, kinds_to_save
from statewise._src.checkpoint.step_errors import opens, step_exists, writes
from statewise._src.checkpoint.step_items import check_step, read_items, record_of
from statewise._src.checkpoint.together import together
from statewise._src.common.numbers import whole_number
from statewise._src.core.plan import State
from statewise._src.inspect.census import Census
from statewise.errors import CorruptedError, RestoreError, SaveError

__all__ = ["Checkpoints"]

T = TypeVar("T")
# Seconds until a step whose deletion has started is not listed; it is looked for several times.
_DELETION = (0.0, 0.05, 0.2)


class Checkpoints:
    """The checkpoints of a run: one for each step, written in the background, and complete or absent.

    Use it as a context manager, or call `close`: if the interpreter ends while a step is being written, that step is
    lost (never an earlier one).

    Args:
      directory: where the steps go; it is made if it does not exist.  Or a URL, `gs://bucket/run` or `s3://bucket/run`,
        for which the clouds' own libraries find credentials.  There, if two processes write the same step, the last one
        to begin it wins, so a run that was killed can be started again without cleaning up.
      max_to_keep: how many steps to keep, the newest; None for all.
      every: saves only steps that are a multiple of this; `save` returns False for the others.
      layout: `"named"` or `"packed"`, as in `sw.save`.
      asynchronous: writes in the background; `save` returns when the arrays are copied.
      options: an `ocp.CheckpointManagerOptions` for everything that Orbax can do; it replaces `max_to_keep`, `every`
        and `asynchronous`.  Or `ocp.v1.training.Checkpointer`, to use Orbax's newer interface, or a `functools.partial`
        of it; its `preservation_policy` and `save_decision_policy` replace `max_to_keep` and `every`.

    Raises:
      SaveError: the directory cannot be made or written, or the options are something else; the store refuses, or its
        library is not installed.

    Example:
      >>> import tempfile
      >>> from flax import nnx
      >>> import statewise as sw
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> state = sw.plan(model).take(model)
      >>> with sw.Checkpoints(tempfile.mkdtemp(), max_to_keep=2) as checkpoints:
      ...     for step in range(4):
      ...         _ = checkpoints.save(step, state, metrics={"loss": 1 / (step + 1)})
      ...     checkpoints.wait()
      ...     checkpoints.steps, checkpoints.restore(state, extra=["metrics"]).extra
      ((2, 3), {'metrics': {'loss': 0.25}})
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        max_to_keep: int | None = None,
        every: int = 1,
        layout: Layout = "named",
        asynchronous: bool = True,
        options: Options | None = None,
    ) -> None:
        check_layout(layout)
        check_counts(max_to_keep, every)
        self._directory = steps_in(directory)
        check_options(options, self._directory)
        self._layout = layout
        self._bytes, self._writing, self._closed = 0, False, False
        self._step: int | None = None
        with opens(self._directory):
            if isinstance(self._directory, FilePath) and (getattr(options, "create", True) or self._directory.exists()):
                make_folder(self._directory)  # raises for a file, which Orbax does not notice
            self._manager = open_manager(
                self._directory, options, max_to_keep=max_to_keep, every=every, asynchronous=asynchronous
            )
        self._claims = Claims(self._directory, self._manager)

    @property
    def directory(self) -> Any:
        """Returns the directory with the steps."""
        return self._directory

    @property
    def manager(self) -> Any:
        """Returns Orbax's `CheckpointManager`, or its `training.Checkpointer`, for whatever else it can do."""
        return self._manager.orbax

    @property
    def steps(self) -> tuple[int, ...]:
        """Returns the complete steps, in order, whatever wrote them; each time the disk or the store is asked."""
        # The manager's `reload` would forget a step that is being written, and then never delete it.
        return tuple(self._paths())

    def _paths(self) -> dict[int, Any]:
        """Returns the complete steps, in order, with the paths of their states."""
        with reads(self._directory):
            return dict(sorted(self._manager.found().items()))

    @property
    def latest(self) -> int | None:
        """Returns the newest complete step; None if there is none; each time the disk or the store is asked."""
        return max(self.steps, default=None)

    def path(self, step: int | None = None) -> Any:
        """Returns the path of a step's state, for `sw.restore`, `sw.inspect` and `sw.diff`; by default the newest's.

        Raises:
          RestoreError: there is no such step.
        """
        return self._place(step)[1]

    def _place(self, step: int | None) -> tuple[int, Any]:
        """Returns a step, by default the newest, and the path of its state, both from one listing."""
        known = list(paths := self._paths())
        if not known:
            raise RestoreError(f"There is no checkpoint in {self._directory}.", hint="checkpoints.save(step, state)")
        step = known[-1] if step is None else step
        if step not in known:
            hint = f"one of: {', '.join(map(str, known[-5:]))}"
            raise RestoreError(f"There is no step {step} in {self._directory}.", hint=hint)
        return step, paths[step]

    def _read_from(self, step: int | None, read: Callable[[int, Any], T]) -> T:
        """Reads from a step; from the newest again, if the run deletes the one that is being read."""
        while True:
            number, path = self._place(step)
            try:
                return read(number, path)
            except (RestoreError, CorruptedError) as error:
                if not self._is_deleted(number):
                    raise
                if step is not None:
                    said = f"Step {number} in {self._directory} was deleted while it was read."
                    hint = "checkpoints.latest, or a larger max_to_keep for the run that writes"
                    raise RestoreError(said, hint=hint) from error

    def _is_deleted(self, step: int) -> bool:
        """Returns whether a step is gone; waits a moment for a deletion that has started with other files."""
        for pause in _DELETION:
            time.sleep(pause)
            if step not in self._paths():
                return True
        return False

    def save(
        self, step: SupportsIndex, state: State, /, *, data: object = None, force: bool = False, **extra: object
    ) -> bool:
        """Saves a step.

        Args:
          step: its number, larger than those of the existing steps.
          state: the state; it may be donated to the next step as soon as this returns.
          data: a data iterator: Grain's, or one whose `get_state()` returns its position, as bytes or as what JSON can
            represent, and whose `set_state(position)` goes there.  The position is the one that it has now.
          force: saves whatever `every` says, and beside newer steps; `max_to_keep` then counts from the last one saved.
          **extra: more items: anything that JSON can represent, or an `ocp.args.CheckpointArgs` (through Orbax's newer
            interface, an `ocp.v1.StatefulCheckpointable`).

        Returns:
          whether it was a step to save.

        Raises:
          SaveError: the step, or a newer one, exists already; an extra item cannot be written; `data` is not such an
            iterator; the step could not be written; or this is closed.  If the background write of an earlier step
            failed, or another process has written that step at the same time, this reports it, or `wait`.
          StructureError: the state was donated, is abstract, or is being traced.
        """
        if self._closed:
            hint = "save inside its with block, or before checkpoints.close()"
            raise SaveError(f"Checkpoints({str(self._directory)!r}) is closed.", hint=hint)
        if not isinstance(force, (bool, np.bool_)):
            raise SaveError(f"force={force!r} is neither True nor False.", hint="another name, for an extra item")
        with writes(self._directory):
            step = self._new_step(step, bool(force))
        is_due = force or self._manager.is_due(step)
        # What fails in one process, the others must not wait for in Orbax; no process waits for a step that is not due.
        with together(self._directory) if is_due else contextlib.nullcontext():
            item = checkpointable(state, layout=self._layout)
            # Before Orbax starts: a save that fails halfway is in progress forever for it.
            check_savable(item.state, kinds_to_save(item.state, None))
            items = items_of_step(self._manager, extra, data, step if is_due else None)
        if not is_due:
            return False
        item.recorded = record_of(step, items)
        with writes(self._directory, self._complete):
            self._watch(None, 0, float("inf"))
            self._claims.end()  # Orbax would wait too; here its error is that of the step before
        self._writing = False  # a save that fails is in progress forever for Orbax
        self._step, self._bytes = step, sum(leaf.nbytes for leaf in item.state.tables.leaves)
        with writes(self._directory, self._complete):
            claimed = self._claims.take(step, {ITEM: item, **items})
            self._manager.save(step, claimed.pop(ITEM), claimed)
        self._writing = True
        return True

    def _new_step(self, given: object, force: bool) -> int:
        """Returns the number of a step that may be saved."""
        step = whole_number(given, 0)
        if step is None:
            raise SaveError(f"{given!r} is not the number of a step.", hint="checkpoints.save(100, state)")
        complete = self._manager.found()
        known = {*complete, *self._manager.steps()}
        if step in known:
            remove = f"checkpoints.manager.delete({step})"
            if step in complete or self._manager.is_writing():
                raise step_exists(self._directory, step)
            raise SaveError(f"Step {step} in {self._directory} is not a complete checkpoint.", hint=remove)
        newer = sorted(number for number in known if number > step)
        if newer and not force:
            said = f"Step {step} is older than what {self._directory} holds: {', '.join(map(str, newer[-5:]))}."
            hint = "another directory, to go on from an older step; or save(..., force=True), to save it beside them"
            raise SaveError(said, hint=hint)
        return step

    def restore(
        self,
        target: State,
        /,
        *,
        step: int | None = None,
        only: str | Sequence[str] | None = None,
        cast: bool = False,
        data: object = None,
        extra: str | Sequence[str] | Mapping[str, Any] = (),
        members: int | Sequence[int | None] | None = None,
    ) -> RestoreResult:
        """Restores a step into a new state, as `sw.restore` does; waits for a step that is still being written.

        Args:
          target: a state, or an abstract one.
          step: the step; by default the newest.
          only: the kinds to restore; by default all that are `saved`.
          cast: allows other dtypes.
          data: the iterator to set to the position that `save(..., data=iterator)` saved; it is set when everything
            else is restored.
          extra: names of extra items that were saved as JSON; or, by name, the `ocp.args.CheckpointArgs` to restore
            them with (through Orbax's newer interface, the objects to load them into).
          members: which members of an ensemble, as in `sw.restore`.

        Raises:
          RestoreError: there is no such step or item, the target and the checkpoint do not match, or the iterator
            refuses the position; it then keeps its own.
          SaveError: a step that was being written could not be.
          CorruptedError: files or arrays are not what was written.

        If the run that writes deletes the step (`max_to_keep`) while it is read, without `step` the newest is read
        instead, and with it a RestoreError says so.
        """
        self.wait()  # a step that was saved just now is one that a restore is expected to find
        wanted = (extra,) if isinstance(extra, str) else extra if isinstance(extra, Mapping) else tuple(extra)

        def read(step: int, path: Any) -> RestoreResult:
            opened = open_checkpoint(path, target, only=only, cast=cast, members=members)
            with reads(self._directory):
                items, move = read_items(path.parent, step, opened.recorded, wanted, data)
            state, report = opened.restored()
            if isinstance(wanted, Mapping) and wanted:
                items = dict(self._manager.restore(step, wanted))
            if move is not None:
                move.make()  # last: everything else can still fail without having changed anything
            return RestoreResult(state, report, step, items)

        return self._read_from(step, read)

    def preview(
        self,
        target: State,
        /,
        *,
        step: int | None = None,
        only: str | Sequence[str] | None = None,
        cast: bool = False,
        members: int | Sequence[int | None] | None = None,
    ) -> RestoreReport:
        """Reports what `restore` would do; see `sw.preview`."""

        def read(step: int, path: Any) -> RestoreReport:
            opened = open_checkpoint(path, target, only=only, cast=cast, members=members)
            check_step(path.parent, step, opened.recorded)
            return opened.report

        return self._read_from(step, read)

    def inspect(self, step: int | None = None) -> Census:
        """Returns the census of a step; see `sw.inspect`."""
        return self._read_from(step, lambda _, path: inspect(path))

    def wait(self, progress: Callable[[int, int], None] | None = None, *, timeout: float | None = None) -> None:
        """Waits until everything is written.

        If that is 256 MiB or more, a terminal shows a progress bar; elsewhere the logger `statewise` gets an occasional
        line.

        Args:
          progress: called a few times a second with the bytes written and the total, instead of the bar.
          timeout: the most seconds to wait; None for as long as it takes.

        Raises:
          SaveError: something could not be written; or it is still being written after `timeout`, which goes on.
        """
        total = self._bytes
        end = time.monotonic() + check_timeout(timeout)
        with writes(self._directory, self._complete):
            if progress is None and total >= LARGE:
                with bar(f"writing a step of {self._directory.name}", total) as tell:
                    self._watch(lambda written, _: tell(written), total, end)
            else:
                self._watch(progress, total, end)
            if is_in_time := not self._is_writing():
                self._claims.end()
        if not is_in_time:
            said = f"Step {self._step} ({total:,} bytes) is still being written to {self._directory} after {timeout} s."
            hint = "checkpoints.wait() until it is complete; a process that ends before loses this step only"
            raise SaveError(said, hint=hint)

    def _is_writing(self) -> bool:
        return self._writing and self._manager.is_writing()

    def _watch(self, progress: Callable[[int, int], None] | None, total: int, end: float) -> None:
        """Waits for the background write, and reports its progress: on a disk, by the size of its files."""
        pause = 0.001 if progress is None else 0.1
        # Not by a join of its thread: up to Python 3.12 that takes a running thread for an ended one if Ctrl-C ends it.
        while self._is_writing():
            if progress is not None:
                claimed = self._claims.written
                written = bytes_in(FilePath(self._directory).glob("*tmp*")) if claimed is None else claimed
                progress(min(written, total), total)
            left = end - time.monotonic()
            if left <= 0:
                return
            time.sleep(min(pause, left))
            pause = min(1.5 * pause, 0.1)
        if progress is not None:
            progress(total, total)

    def close(self) -> None:
        """Waits until everything is written, and closes Orbax's manager.

        Raises:
          SaveError: something could not be written.
        """
        try:
            self.wait()
        finally:
            self._closed = True
            with writes(self._directory, self._complete):
                self._manager.close()

    def _complete(self) -> int | None:
        # The last step that was saved, if it is complete on a disk.
        return self._step if isinstance(self._directory, FilePath) and self._step in self.steps else None

    def __iter__(self) -> Iterator[int]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Checkpoints({str(self._directory)!r}, steps={self.steps})"
