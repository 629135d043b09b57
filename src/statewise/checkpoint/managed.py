"""`sw.Checkpoints`: a checkpoint for each step of a run, on Orbax's manager.

Orbax's manager numbers, commits and deletes the steps, and writes in the background; the item called `state` in each
of them is what `sw.save` writes.  `Checkpoints` adds no format of its own: every step can be read with `sw.restore`,
`sw.inspect`, or with a manager of Orbax's.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read postponed ones of a NamedTuple.
import contextlib
import os
import sys
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any, NamedTuple

import orbax.checkpoint as ocp

from statewise.census import Census
from statewise.checkpoint.items import checkpointable
from statewise.checkpoint.report import RestoreReport
from statewise.checkpoint.restoring import inspect, preview, restore
from statewise.checkpoint.saving import check_layout, kinds_to_save
from statewise.errors import RestoreError, SaveError, StatewiseError
from statewise.state import State

__all__ = ["Checkpoints", "Restored"]

ITEM = "state"
# Bytes: from here on somebody who waits wants to see how far it is.
LARGE = 256 * 1024 * 1024


class Restored(NamedTuple):
    """What `Checkpoints.restore` gives.

    Attributes:
      state: the state.
      report: what happened to each leaf.
      step: of which step.
      extra: the extra items that were asked for, by name.

    Example:
      >>> import tempfile
      >>> from flax import nnx
      >>> import statewise as sw
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> state = sw.plan(model).take(model)
      >>> with sw.Checkpoints(tempfile.mkdtemp()) as checkpoints:
      ...     _ = checkpoints.save(7, state)
      ...     checkpoints.wait()
      ...     state, report, step, extra = checkpoints.restore(state)
      >>> step, report.ok
      (7, True)
    """

    state: State
    report: RestoreReport
    step: int
    extra: dict[str, Any]


class Checkpoints:
    """The checkpoints of a run: a step each, written in the background, complete or not there at all.

    Use it as a context manager, or call `close`: an interpreter that ends while a step is being written loses that step
    (never an earlier one).

    Args:
      directory: where the steps go; it is made if it is not there.
      max_to_keep: how many steps to keep, the newest; None for all.
      every: saves only steps that are a multiple of this; `save` returns False for the others.
      layout: `"named"` or `"packed"`, as in `sw.save`.
      asynchronous: writes in the background; `save` returns when the arrays are copied.
      options: an `ocp.CheckpointManagerOptions` instead, for all that Orbax can do; the three above are then its.

    Raises:
      SaveError: the directory cannot be made or written.

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
        directory: Any,
        *,
        max_to_keep: int | None = None,
        every: int = 1,
        layout: str = "named",
        asynchronous: bool = True,
        options: Any = None,
    ) -> None:
        check_layout(layout)
        self._layout = layout
        self._bytes = 0
        self._directory = FilePath(os.fspath(directory)).absolute() if "://" not in str(directory) else directory
        self._options = options or ocp.CheckpointManagerOptions(
            max_to_keep=max_to_keep,
            save_interval_steps=every,
            enable_async_checkpointing=asynchronous,
            create=True,
        )
        try:
            self._manager = ocp.CheckpointManager(self._directory, options=self._options)
        except OSError as error:
            raise SaveError(
                f"{self._directory} cannot be used: {error.strerror or error}.",
                mend="a directory that can be written to",
            ) from error

    @property
    def directory(self) -> Any:
        """Where the steps are."""
        return self._directory

    @property
    def manager(self) -> Any:
        """Orbax's `CheckpointManager`, for what it can do besides."""
        return self._manager

    @property
    def steps(self) -> tuple[int, ...]:
        """The complete steps, in order."""
        self._manager.reload()
        return tuple(sorted(self._manager.all_steps()))

    @property
    def latest(self) -> int | None:
        """The newest complete step; None if there is none."""
        return max(self.steps, default=None)

    def path(self, step: int | None = None) -> Any:
        """Where the state of a step is, for `sw.restore`, `sw.inspect` and `sw.diff`; by default of the newest.

        Raises:
          RestoreError: there is no such step.
        """
        known = self.steps
        if not known:
            raise RestoreError(f"There is no checkpoint in {self._directory}.", mend="checkpoints.save(step, state)")
        step = known[-1] if step is None else step
        if step not in known:
            shown = ", ".join(map(str, known[-5:]))
            raise RestoreError(f"There is no step {step} in {self._directory}.", mend=f"one of: {shown}")
        names = self._options.step_name_format or ocp.path.step.standard_name_format(
            step_prefix=self._options.step_prefix,
            step_format_fixed_length=self._options.step_format_fixed_length,
        )
        return names.find_step(self._manager.directory, step).path / ITEM

    def save(self, step: int, state: State | Any, /, *, force: bool = False, **extra: Any) -> bool:
        """Saves a step.

        Args:
          step: its number.
          state: the state; it may be donated to the next step at once.
          force: saves whatever `every` says.
          **extra: more items: anything that JSON can hold, or an `ocp.args.CheckpointArgs` (a data iterator's, say).

        Returns:
          whether it was a step to save.

        Raises:
          SaveError: the step is there already, or could not be written; where the background write of an earlier step
            has failed, that is said here, or by `wait`.
          StructureError: the state is spent, abstract, or being traced.
        """
        items = {ITEM: checkpointable(state, layout=self._layout)}
        kinds_to_save(items[ITEM].state, None)
        for name, item in extra.items():
            items[name] = item if isinstance(item, ocp.args.CheckpointArgs) else ocp.args.JsonSave(item)
        self._bytes = sum(leaf.nbytes for leaf in items[ITEM].state.plan.leaves)
        if step in self._manager.all_steps():
            raise SaveError(f"There is a step {step} already in {self._directory}.", mend="another step")
        try:
            return bool(self._manager.save(step, args=ocp.args.Composite(**items), force=force))
        except StatewiseError:
            raise
        except (OSError, ValueError) as error:
            raise self._failed(error) from error

    def restore(
        self,
        target: State | Any,
        /,
        *,
        step: int | None = None,
        only: str | Sequence[str] | None = None,
        cast: bool = False,
        extra: Sequence[str] | Mapping[str, Any] = (),
    ) -> Restored:
        """Restores a step into a new state, as `sw.restore` does.

        Args:
          target: a state, or an abstract one.
          step: which one; by default the newest.
          only: the kinds to restore; by default all that are `saved`.
          cast: allows other dtypes.
          extra: names of extra items that were saved as JSON; or, by name, the `ocp.args.CheckpointArgs` to restore
            them with.

        Raises:
          RestoreError: there is no such step or item, or target and checkpoint disagree.
          DamagedError: files or arrays that are not what was written.
        """
        step = self.latest if step is None else step
        path = self.path(step)
        assert step is not None, "path has found one"
        state, report = restore(path, target, only=only, cast=cast)
        asked = dict(extra) if isinstance(extra, Mapping) else {name: ocp.args.JsonRestore() for name in extra}
        missing = [name for name in asked if not (path.parent / name).exists()]
        if missing:
            raise RestoreError(
                f"Step {step} has no item {missing[0]!r}.",
                mend="one of: " + ", ".join(sorted(entry.name for entry in path.parent.iterdir() if entry.is_dir())),
            )
        items = dict(self._manager.restore(step, args=ocp.args.Composite(**asked)).items()) if asked else {}
        return Restored(state, report, step, items)

    def preview(
        self, target: State | Any, /, *, step: int | None = None, only: Any = None, cast: bool = False
    ) -> RestoreReport:
        """What `restore` would do; see `sw.preview`."""
        return preview(self.path(step), target, only=only, cast=cast)

    def inspect(self, step: int | None = None) -> Census:
        """The census of a step; see `sw.inspect`."""
        return inspect(self.path(step))

    def wait(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Waits until everything is written; in a terminal, with a progress bar where that is 256 MiB or more.

        Args:
          progress: called a few times a second with the bytes written and the bytes in all, in place of the bar.

        Raises:
          SaveError: something could not be written.
        """
        total = self._bytes
        try:
            if progress is not None:
                self._watch(progress, total)
            elif total >= LARGE and sys.stderr.isatty():
                self._show(total)
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except (OSError, ValueError) as error:
            raise self._failed(error) from error

    def _watch(self, progress: Callable[[int, int], None], total: int) -> None:
        """Tells how far the background write is, by the size of the files that it has made."""
        while self._manager.is_saving_in_progress():
            progress(min(_bytes_in(FilePath(self._directory).glob("*tmp*")), total), total)
            time.sleep(0.1)
        progress(total, total)

    def _show(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(f"writing {self._directory}", total=total)
            self._watch(lambda written, _: bar.update(task, completed=written), total)

    def close(self) -> None:
        """Waits until everything is written, and lets the directory go.

        Raises:
          SaveError: something could not be written.
        """
        try:
            self.wait()
        finally:
            self._manager.close()

    def _failed(self, error: Exception) -> SaveError:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).split(" [")[0]
        return SaveError(
            f"A step could not be written to {self._directory}: {reason}. Earlier steps are whole.",
            mend="free some space, or choose a directory that can be written to",
        )

    def __iter__(self) -> Iterator[int]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Checkpoints({str(self._directory)!r}, steps={self.steps})"


def _bytes_in(folders: Iterable[FilePath]) -> int:
    """The size of all files below some folders, as far as they are still there."""
    total = 0
    for folder in folders:
        for path, _, names in os.walk(folder):
            for name in names:
                with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
                    total += os.path.getsize(os.path.join(path, name))
    return total
