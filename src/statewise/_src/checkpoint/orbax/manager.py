"""What keeps the steps of a run: `ocp.CheckpointManager`, or `ocp.v1.training.Checkpointer`, behind one interface.

Both write the same directories, and each reads the other's: a run can change from one to the other at any step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import orbax.checkpoint as ocp

from statewise._src.checkpoint.format.manifest import NAME
from statewise._src.checkpoint.orbax.epath import epath
from statewise._src.checkpoint.orbax.exchange import ending, has_ended
from statewise._src.checkpoint.orbax.item import StateItem, set_limits
from statewise._src.checkpoint.orbax.options import Options, is_of_newer
from statewise._src.checkpoint.orbax.paths import is_url
from statewise._src.checkpoint.orbax.store_steps import complete_steps, is_marked, keep_no_listings
from statewise._src.checkpoint.orbax.stores import StorePath, listing
from statewise.errors import SaveError

__all__ = ["ITEM", "METRICS", "Json", "Manager", "open_manager"]

# The name of the state's item in each step, and of the item that Orbax judges steps by.
ITEM, METRICS = "state", "metrics"
# On s3:// Orbax would rename, unless its options say to mark what is committed, as on gs://.
_BY_MARKER = ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.COMMIT_FILE)
# What Orbax writes with arrays, for which it makes a path on disk of any URL that is not gs://.
_OF_ARRAYS = (
    ocp.args.PyTreeSave,
    ocp.args.StandardSave,
    ocp.args.ArraySave,
    ocp.args.JaxRandomKeySave,
    ocp.args.NumpyRandomKeySave,
)

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Json:
    """An extra item that is written as JSON."""

    data: Any


@runtime_checkable
class Manager(Protocol):
    """Numbers, writes, lists and deletes the steps of a directory.

    Attributes:
      orbax: the object of Orbax that does it.
      best_fn: the function that judges the metrics of a step; None if none does.
      item_example: code that makes an extra item of something that is not JSON.
    """

    orbax: Any
    best_fn: Callable[[Any], Any] | None
    item_example: str

    @property
    def directory(self) -> Any:
        """Returns the directory with the steps, as Orbax has it."""

    def item(self, given: object) -> Any:
        """Returns something as an extra item; None if it is not one by itself.

        Raises:
          SaveError: Orbax cannot write it in this directory.
        """

    def found(self) -> Mapping[int, Any]:
        """Returns the steps that are complete now, each with the directory of its state."""

    def place(self, step: int) -> Any:
        """Returns the directory that a step has, or would have."""

    def steps(self) -> Collection[int]:
        """Returns the steps that are known, including one that is being written."""

    def is_due(self, step: int) -> bool:
        """Returns whether a step is one to save."""

    def save(self, step: int, state: StateItem, extra: Mapping[str, Any]) -> None:
        """Saves a step; the one before has been waited for."""

    def restore(self, step: int, wanted: Mapping[str, Any]) -> Mapping[str, Any]:
        """Restores extra items, each with what Orbax takes to restore it."""

    def is_writing(self) -> bool:
        """Returns whether a step is being written."""

    def wait(self) -> None:
        """Waits until everything is written; raises what a write has raised."""

    def close(self) -> None:
        """Closes Orbax's object."""


def open_manager(
    directory: Any, options: Options | None, *, max_to_keep: int | None, every: int, asynchronous: bool
) -> Manager:
    """Opens a directory of steps, on the interface that the options are for; without options, on the first one.

    Args:
      directory: the directory; it is made if it does not exist.
      options: an `ocp.CheckpointManagerOptions`; or `ocp.v1.training.Checkpointer`, or a `functools.partial` of it.
      max_to_keep: how many steps to keep; None for all.
      every: saves only steps that are a multiple of this.
      asynchronous: writes in the background.
    """
    if is_url(directory):
        keep_no_listings(str(directory))
        listing(StorePath(str(directory)))  # raises what the store says; Orbax would make a bucket of any name
    if is_of_newer(options):
        return _again(lambda: _NewManager(directory, options, max_to_keep, every, asynchronous))
    own: Any = options or _options(directory, max_to_keep, every, asynchronous)
    if _is_s3(directory):
        names = own.step_name_format and _Marked(own.step_name_format)
        own = dataclasses.replace(own, step_name_format=names, atomicity_options=_BY_MARKER)
    return _again(lambda: _FirstManager(directory, own))


def _again(call: Callable[[], T]) -> T:
    """Calls a function of Orbax that looks at each step; again if one of them has just been removed."""
    for _ in range(10):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return call()
    return call()


def _found(names: Any, directory: Any) -> dict[int, Any]:
    """Returns the complete steps: those that Orbax has committed, and that have a manifest."""
    if is_url(directory):
        return complete_steps(StorePath(str(directory)), names.build_name, ITEM)
    places = {entry.step: entry.path / ITEM for entry in _again(lambda: list(names.find_all(directory)))}
    return {step: place for step, place in places.items() if (place / NAME).exists()}


def _is_s3(directory: object) -> bool:
    return str(directory).startswith("s3://")


class _Marked:
    """The names of steps, where a step that is not marked is not committed; what made them does not know that."""

    def __init__(self, names: Any) -> None:
        self._names = names
        self.single_host_load_and_broadcast = getattr(names, "single_host_load_and_broadcast", False)

    def build_name(self, step: int) -> str:
        return str(self._names.build_name(step))

    def find_all(self, directory: Any) -> Iterator[Any]:
        yield from (found for found in self._names.find_all(directory) if is_marked(found.path))

    def find_step(self, directory: Any, step: int) -> Any:
        found = self._names.find_step(directory, step)
        if not is_marked(found.path):
            raise ValueError(f"{found.path} is not committed.")
        return found


class _Timed:
    """The names of steps, where one whose metadata cannot be read is the oldest: without a time none can be saved."""

    def __init__(self, names: Any) -> None:
        self._names = names
        self.build_name = names.build_name
        self.single_host_load_and_broadcast = getattr(names, "single_host_load_and_broadcast", False)

    def find_all(self, directory: Any) -> Iterator[Any]:
        yield from map(self._timed, self._names.find_all(directory))

    def find_step(self, directory: Any, step: int) -> Any:
        return self._timed(self._names.find_step(directory, step))

    @staticmethod
    def _timed(found: Any) -> Any:
        if found.commit_timestamp_nsecs is not None:
            return found
        return ocp.v1.training.CheckpointMetadata(
            step=found.step, path=found.path, metadata=found.metadata, commit_timestamp_nsecs=0
        )


class _OrbaxManager:
    """What both interfaces do alike."""

    orbax: Any
    _names: Any  # Orbax's format of the names of steps
    _ending: Sequence[threading.Thread] = ()  # what ends the last save

    @property
    def directory(self) -> Any:
        return self.orbax.directory

    def found(self) -> Mapping[int, Any]:
        return _found(self._names, self.directory)

    def place(self, step: int) -> Any:
        return self.directory / self._names.build_name(step)

    def is_due(self, step: int) -> bool:
        return self.orbax.should_save(step)

    def is_writing(self) -> bool:
        return self.orbax.is_saving_in_progress() and not has_ended(self._ending)

    def close(self) -> None:
        self.orbax.close()


# --- the first interface -----------------------------------------------------------------------------------------


def _options(directory: Any, max_to_keep: int | None, every: int, asynchronous: bool) -> ocp.CheckpointManagerOptions:
    policies = ocp.checkpoint_managers
    return ocp.CheckpointManagerOptions(
        max_to_keep=max_to_keep,
        # Not `save_interval_steps`, with which Orbax saves the first step whatever its number is.
        save_decision_policy=policies.AnySavePolicy(
            [policies.FixedIntervalPolicy(every), policies.PreemptionCheckpointingPolicy()]
        ),
        enable_async_checkpointing=asynchronous,
        # On a local disk this takes no time.  In the background, if it fails, whatever waits for it waits for
        # minutes, and the process cannot end for as long.
        async_options=ocp.options.AsyncOptions(create_directories_asynchronously=is_url(directory)),
        create=True,
    )


class _FirstManager(_OrbaxManager):
    """`ocp.CheckpointManager`."""

    item_example = "an ocp.args.CheckpointArgs, such as ocp.args.PyTreeSave(...)"

    def __init__(self, directory: Any, options: ocp.CheckpointManagerOptions) -> None:
        self.orbax = ocp.CheckpointManager(epath(directory), options=options)
        self.best_fn = options.best_fn
        self._processes = options.multiprocessing_options
        self._timing = options.async_options or ocp.options.AsyncOptions()
        self._saving_thread: int | None = None
        self.orbax.reached_preemption = functools.partial(self._reached_preemption, self.orbax.reached_preemption)
        self._names = options.step_name_format or ocp.path.step.standard_name_format(
            step_prefix=options.step_prefix,
            step_format_fixed_length=options.step_format_fixed_length,
            temporary_path_cls=options.temporary_path_class,
            atomicity_options=options.atomicity_options,
        )

    def _reached_preemption(self, ask: Callable[[int], bool], step: int) -> bool:
        """Asks whether all processes are to save this step, but not from the thread that ends a write.

        That one asks about the step it has written, only to log it.  JAX takes the last step that was asked about for
        the one that training is at, and chooses the step after it: one that training has passed, so that no process
        would ever save.
        """
        return self._saving_thread in (None, threading.get_ident()) and ask(step)

    def item(self, given: object) -> Any:
        if isinstance(given, ocp.args.JsonSave):
            return Json(given.item)
        if _is_s3(self.directory) and isinstance(given, _OF_ARRAYS):
            hint = "numbers as JSON; a state as sw.checkpointable(state); or a directory on disk or on gs://"
            raise SaveError(f"Orbax cannot write the arrays of {type(given).__name__} to s3://.", hint=hint)
        return given if isinstance(given, ocp.args.CheckpointArgs) else None

    def steps(self) -> Collection[int]:
        return self.orbax.all_steps()

    def save(self, step: int, state: StateItem, extra: Mapping[str, Any]) -> None:
        items = {name: ocp.args.JsonSave(item.data) if isinstance(item, Json) else item for name, item in extra.items()}
        metrics = extra.get(METRICS)
        judged = metrics.data if isinstance(metrics, Json) else None
        set_limits([state, *extra.values()], self._processes, self._timing)
        self._saving_thread = threading.get_ident()
        # The metrics a second time: if the options have a `best_fn`, Orbax passes these to it.
        with ending() as self._ending:
            self.orbax.save(step, args=ocp.args.Composite(**{ITEM: state}, **items), metrics=judged, force=True)

    def restore(self, step: int, wanted: Mapping[str, Any]) -> Mapping[str, Any]:
        return dict(self.orbax.restore(step, args=ocp.args.Composite(**wanted)).items())

    def wait(self) -> None:
        self.orbax.wait_until_finished()
        self.orbax.check_for_errors()


# --- the newer interface -----------------------------------------------------------------------------------------


class _NewManager(_OrbaxManager):
    """`ocp.v1.training.Checkpointer`."""

    item_example = "an object that saves and loads itself (ocp.v1.StatefulCheckpointable)"
    best_fn: Callable[[Any], Any] | None = None  # a preservation policy judges, when the steps are written

    def __init__(self, directory: Any, make: Any, max_to_keep: int | None, every: int, asynchronous: bool) -> None:
        keywords = make.keywords if isinstance(make, functools.partial) else {}
        training = ocp.v1.training
        policies = training.save_decision_policies
        given = keywords.get("context")
        self._context = ocp.v1.Context(given)
        if given is None:  # as for the first interface
            self._context.asynchronous.create_directories_asynchronously = is_url(directory)
        defaults = {
            "save_decision_policy": policies.AnySavePolicy(
                [policies.FixedIntervalPolicy(every), policies.PreemptionCheckpointingPolicy()]
            ),
            "preservation_policy": None if max_to_keep is None else training.preservation_policies.LatestN(max_to_keep),
        }
        used = defaults | keywords | {"context": self._context}
        self._names = keywords.get("step_name_format") or ocp.v1.path.step.standard_name_format()
        if _is_s3(directory):
            self._context.atomicity.mode = _BY_MARKER.mode
            self._names = _Marked(self._names)
        # Not passed on if it is the default: Orbax's own knows the time of a step from its directory, if its metadata
        # is gone because its deletion was cut short.
        if _is_s3(directory) or "step_name_format" in keywords:
            used["step_name_format"] = self._names = _Timed(self._names)
        self.orbax = training.Checkpointer(epath(directory), **used)
        self._asynchronous = asynchronous
        self._response: Any = None

    def item(self, given: object) -> Any:
        return given if isinstance(given, ocp.v1.StatefulCheckpointable) else None

    def steps(self) -> Collection[int]:
        return [checkpoint.step for checkpoint in self.orbax.checkpoints]

    def save(self, step: int, state: StateItem, extra: Mapping[str, Any]) -> None:
        items = {name: item.data if isinstance(item, Json) else item for name, item in extra.items()}
        metrics = items.pop(METRICS, None)
        if metrics is not None and not (isinstance(metrics, dict) and metrics):
            hint = f"{METRICS}={{'loss': 0.5}}, or another name"
            said = f"{METRICS}={metrics!r} is not a dict of numbers, which Orbax's newer interface needs."
            raise SaveError(said, hint=hint)
        context = ocp.v1.Context(self._context)
        registry = ocp.v1.handlers.local_registry(context.checkpointables.registry, include_global_registry=False)
        for name in items:
            if isinstance(extra[name], Json):  # otherwise Orbax would write a dict as a tree of arrays
                registry.add(ocp.v1.handlers.JsonHandler, checkpointable_name=name)
        context.checkpointables.registry = registry
        set_limits([state, *extra.values()], context.multiprocessing, context.asynchronous)
        with context, ending() as self._ending:
            self._response = self.orbax.save_checkpointables_async(
                step, {ITEM: state, **items}, force=True, metrics=metrics
            )
        if not self._asynchronous:
            self.wait()

    def restore(self, step: int, wanted: Mapping[str, Any]) -> Mapping[str, Any]:
        if step not in self.steps():
            self.orbax.reload()  # another process has written it
        return self.orbax.load_checkpointables(step, dict(wanted))

    def wait(self) -> None:
        if self._response is not None:
            try:
                self._response.result()  # which has what the write has raised
            except Exception:  # raised again, when Orbax has forgotten it
                self._response = None
                with contextlib.suppress(Exception):  # the same, which Orbax raises once more in this thread
                    self.orbax.wait()
                raise
            self._response = None  # not before: an interrupted wait leaves it to the next one
        self.orbax.wait()
