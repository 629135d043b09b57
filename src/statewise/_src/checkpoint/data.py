"""The position of a data iterator, as an item of a step: `checkpoints.save(step, state, data=iterator)`.

The protocol is that of Grain: `get_state()` returns the position, as bytes or as what JSON can represent, and
`set_state(position)` goes there.  Each process has an iterator of its own, and so a file of its own.  The files have
the names and the contents that Grain's own handlers for Orbax give them, so that either reads the other's; beside each
is a second one, with a checksum, the step, and what wrote it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import sys
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from statewise._src.checkpoint.orbax.data_item import DataItem
from statewise._src.checkpoint.orbax.store_steps import MARK
from statewise.errors import CorruptedError, RestoreError, SaveError, StatewiseError

__all__ = ["DATA", "Move", "check_iterator", "check_not_position", "data_item", "find_move"]

# The name of the item.
DATA = "data"
_FILE = re.compile(r"process_(\d+)-of-(\d+)\.(json|bytes)")
# What is beside such a file.
_RECORD = re.compile(r"process_\d+-of-\d+\.statewise")
_ANOTHER = "another step: checkpoints.restore(target, step=..., data=iterator); or leave out data="


@runtime_checkable
class Positioned(Protocol):
    """An iterator that says where it is, and goes there."""

    def get_state(self) -> Any:
        """Returns the position."""

    def set_state(self, state: Any, /) -> Any:
        """Goes to a position."""


@dataclasses.dataclass(frozen=True)
class _Position:
    """A position as it is stored: JSON or other bytes; `given` is what the iterator knows it as."""

    content: bytes
    is_json: bool
    given: str  # "bytes" or "json"

    def fresh(self) -> Any:
        """Returns the position for an iterator, which may keep and change it."""
        return self.content if self.given == "bytes" else json.loads(self.content)

    def differs(self, other: _Position) -> bool:
        """Returns whether two positions are not the same, as far as that can be seen."""
        if not (self.is_json and other.is_json):
            return False  # two pickles of one object may differ
        one, two = (json.dumps(json.loads(each.content), sort_keys=True) for each in (self, other))
        return one != two


def check_iterator(data: object, error: type[StatewiseError]) -> None:
    """Raises an error of this class if something does not say where it is."""
    if isinstance(data, Positioned) and not isinstance(data, type):
        return
    if hasattr(data, "state_dict") and hasattr(data, "load_state_dict"):
        hint = "an object with get_state() that returns its state_dict(), and set_state(state) that loads it"
    elif hasattr(data, "__getitem__") or not hasattr(data, "__iter__") or hasattr(data, "__next__"):
        hint = "an iterator of Grain's, or of your own with these two methods; another item has another name"
    else:
        hint = "iterator = iter(dataset), once, before the loop; then data=iterator"
    raise error(f"data= is {_type_of(data)}, which has no get_state() and set_state(state).", hint=hint)


def _type_of(data: object) -> str:
    cls = type(data)
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


def _maker_of(data: object) -> str:
    """Returns the type of an iterator, with the version of its package: Grain's positions are those of one version."""
    package = type(data).__module__.partition(".")[0]
    version = getattr(sys.modules.get(package), "__version__", None)
    return f"{_type_of(data)} of {package} {version}" if version else _type_of(data)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).rstrip('.')}."


# --- saving ------------------------------------------------------------------------------------------------------


def data_item(data: Any, step: int) -> DataItem:
    """Returns the item with the position that an iterator has now."""
    position = _position_of(data, SaveError)
    name = _name(jax.process_index(), jax.process_count())
    record = {
        "format": 1,
        "step": step,
        "state": position.given,
        "sha256": hashlib.sha256(position.content).hexdigest(),
        "iterator": _maker_of(data),
    }
    return DataItem(
        {
            f"{name}.{'json' if position.is_json else 'bytes'}": position.content,
            f"{name}.statewise": json.dumps(record, indent=1).encode(),
        }
    )


def _name(index: int, count: int) -> str:
    return f"process_{index}-of-{count}"


def _position_of(data: Any, failure: type[StatewiseError]) -> _Position:
    """Returns the position of an iterator; raises an error of this class if it cannot be stored."""
    try:
        state = data.get_state()
    except Exception as error:  # an iterator of the user's own may raise anything
        raise failure(
            f"{_type_of(data)}.get_state() failed: {_told(error)}",
            hint="an iterator that can say where it is; or leave out data=",
        ) from error
    if isinstance(state, bytes):
        return _Position(state, _is_json(state), "bytes")
    try:
        return _Position(json.dumps(_plain(state, ""), indent=4).encode(), True, "json")
    # The last two: it is nested too deeply, or has an integer of thousands of digits.
    except (_NotJsonError, RecursionError, ValueError) as error:
        raise failure(
            f"The position of {_type_of(data)} cannot be written: {str(error).rstrip('.')}.",
            hint="get_state() that returns bytes, or dicts with text as keys, lists, numbers and text",
        ) from error


class _NotJsonError(Exception):
    """A part of a position that JSON would change or not represent."""


def _plain(value: Any, where: str) -> Any:
    """Returns what JSON gives back unchanged, but for tuples, which become lists."""
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(each, f"{where}[{number}]") for number, each in enumerate(value)]
    here = f" at {where}" if where else ""
    if not isinstance(value, Mapping):
        raise _NotJsonError(f"it has {_type_of(value)}{here}, which JSON cannot represent")
    for key in value:
        if not isinstance(key, str):
            raise _NotJsonError(f"it has the key {key!r}{here}, which JSON would turn into text")
    return {key: _plain(each, f"{where}[{key!r}]") for key, each in value.items()}


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return False
    return True


# --- restoring ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Move:
    """What a restore does with an iterator, when everything else is done."""

    iterator: Any
    there: _Position
    here: _Position
    said: str  # which step, and what saved it

    def make(self) -> None:
        """Sets the iterator to its position.

        Raises:
          RestoreError: the iterator refused; it is where it was.
        """
        try:
            self.iterator.set_state(self.there.fresh())
            arrived = _position_of(self.iterator, RestoreError)
        except Exception as error:  # likewise
            why = error.message if isinstance(error, StatewiseError) else _told(error)
            raise self._refused(why, self._undo()) from error
        if arrived.differs(self.there):
            why = "get_state() then does not return what set_state was given."
            raise self._refused(why, self._undo())

    def _undo(self) -> str:
        """Goes back; returns what there is to say about that."""
        said = "It did not go back to its own position either: make it again."
        try:
            self.iterator.set_state(self.here.fresh())
            arrived = _position_of(self.iterator, RestoreError)
        except Exception as error:  # likewise
            raise self._refused(_told(error), said) from error
        return said if arrived.differs(self.here) else "It is where it was."

    def _refused(self, why: str, after: str) -> RestoreError:
        return RestoreError(
            f"{_type_of(self.iterator)} did not take {self.said}: {why} {after}",
            hint="an iterator of the same pipeline as was saved; or leave out data=, to start the data again",
        )


def check_not_position(folder: Any, step: int) -> None:
    """Raises if an item that is to be read as JSON is the position of an iterator."""
    if any(_FILE.fullmatch(entry.name) or _RECORD.fullmatch(entry.name) for entry in folder.iterdir()):
        raise RestoreError(
            f"The item {DATA!r} of step {step} is the position of an iterator.",
            hint=f"checkpoints.restore(target, step={step}, data=iterator)",
        )


def find_move(folder: Any, data: Any, step: int) -> Move:
    """Finds the position for this process in the item of a step; moves nothing so far.

    Raises:
      RestoreError: the item is something else, or is of another number of processes, or `data` is not an iterator.
      CorruptedError: the files are not what was written, or are gone.
    """
    check_iterator(data, RestoreError)
    here = _position_of(data, RestoreError)
    files, count = _files(folder, step)
    index, number = jax.process_index(), jax.process_count()
    if count == number:
        there, maker = _read(folder, files[index], step, here)
    else:
        there, maker = _of_all(folder, files, step, here)
    return Move(data, there, here, f"the position of step {step}" + (f", of {maker}" if maker else ""))


def _files(folder: Any, step: int) -> tuple[dict[int, str], int]:
    """Returns the names of the files by process, and how many processes there were."""
    names = [entry.name for entry in folder.iterdir()]
    matched = [found for name in names if (found := _FILE.fullmatch(name))]
    if all(name == MARK or _RECORD.fullmatch(name) for name in names):
        raise CorruptedError(f"The item {DATA!r} of step {step} is corrupted: it has no position.", hint=_ANOTHER)
    if not matched:
        raise RestoreError(
            f"The item {DATA!r} of step {step} is not the position of an iterator.",
            hint=f"checkpoints.restore(target, step={step}, extra={DATA!r}), if it was saved as JSON",
        )
    files = {int(found[1]): found[0] for found in matched}
    counts = {int(found[2]) for found in matched}
    count = max(counts)
    missing = [index for index in range(count) if index not in files]
    if missing or len(counts) > 1 or len(matched) != count:
        which = f"process {missing[0]} of {count} has none" if missing else ", ".join(sorted(map(str, files.values())))
        raise CorruptedError(
            f"The item {DATA!r} of step {step} does not have one file for each process: {which}.", hint=_ANOTHER
        )
    return files, count


def _read(folder: Any, name: str, step: int, here: _Position) -> tuple[_Position, str]:
    """Returns the position in a file, and what saved it, as far as that is known."""
    content = (folder / name).read_bytes()
    is_json = name.endswith(".json")
    if is_json and not _is_json(content):
        raise _corrupted(name, step, "it is not JSON")
    beside = folder / f"{name.rpartition('.')[0]}.statewise"
    try:
        written = beside.read_bytes()
    except FileNotFoundError:  # Grain's own handler has saved it
        return _Position(content, is_json, here.given if is_json else "bytes"), ""
    try:
        record = json.loads(written)
        known = (record["format"], record["step"], record["sha256"], record["state"], record["iterator"])
        if not isinstance(known[0], int) or known[3] not in ("json", "bytes"):
            raise ValueError("a field is not what it can be")
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise _corrupted(beside.name, step, "it is not a record of Statewise's") from error
    if known[0] != 1:
        raise RestoreError(
            f"The item {DATA!r} of step {step} is of format {known[0]}, which this version does not know.",
            hint="pip install --upgrade statewise",
        )
    if hashlib.sha256(content).hexdigest() != known[2]:
        raise _corrupted(name, step, "it is not what was written")
    if known[1] != step:
        raise _corrupted(name, step, f"it was saved with step {known[1]}")
    return _Position(content, is_json, known[3]), str(known[4])


def _corrupted(name: str, step: int, why: str) -> CorruptedError:
    return CorruptedError(f"The item {DATA!r} of step {step} is corrupted: {name}: {why}.", hint=_ANOTHER)


def _of_all(folder: Any, files: Mapping[int, str], step: int, here: _Position) -> tuple[_Position, str]:
    """Returns the position of another number of processes, where they all had one that is for any number."""
    found = [_read(folder, files[index], step, here) for index in sorted(files)]
    first, maker = found[0]
    processes = "1 process" if len(files) == 1 else f"{len(files)} processes"
    said = f"The data of step {step} were saved by {processes}, not by {jax.process_count()}."
    hint = f"{processes} again; or leave out data=, and start the data at the step: dataset[step * batch_size :]"
    if not _is_elastic(first):
        raise RestoreError(f"{said} Each position is of the part that one process had.", hint=hint)
    if any(position.differs(first) for position, _ in found):
        raise RestoreError(f"{said} The processes were at different positions.", hint=hint)
    return first, maker


def _is_elastic(position: _Position) -> bool:
    """Returns whether a position is one of `grain.experimental.ElasticIterator`, which counts for all processes."""
    grain = sys.modules.get("grain")  # imported already if the iterator is Grain's
    elastic = getattr(getattr(grain, "experimental", None), "ElasticIterator", None)
    if elastic is None or not position.is_json:
        return False
    example = elastic(grain.MapDataset.range(1), 1, grain.sharding.NoSharding()).get_state()  # type: ignore[union-attr]
    state = json.loads(position.content)
    return isinstance(state, dict) and state.keys() == example.keys()
