"""What the manifest of a step records of it, and the items beside the state that are read with it.

Orbax writes each item on its own, and JSON without a checksum.  So the manifest of the state, which has one and is
written last, records the number of the step and what the other items hold.  What older versions and Orbax's own
managers have written has no such entries; nothing is compared then.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from statewise._src.checkpoint.data import DATA, Move, check_not_position, find_move
from statewise._src.checkpoint.format.manifest import STEP
from statewise._src.checkpoint.orbax.manager import METRICS, Json
from statewise._src.checkpoint.orbax.store_steps import MARK
from statewise.errors import CorruptedError, RestoreError

__all__ = ["check_step", "read_items", "record_of"]

# The files in which Orbax's two interfaces keep JSON.
_JSON_FILES = ("metadata", "data.json", METRICS)
# The hint of an item that is corrupted.
_ANOTHER = "leave it out, or restore another step: checkpoints.restore(target, step=...)"


def record_of(step: int, items: Mapping[str, Any]) -> dict[str, str]:
    """Returns what the manifest of a step records: its number, and each item, with a checksum if it is JSON."""
    record = {STEP: str(step)}
    for name, item in items.items():
        if not isinstance(item, Json):
            record[f"{STEP}/{name}"] = ""
        elif item.data is not None:  # for which Orbax may write nothing
            record[f"{STEP}/{name}"] = _checksum(item.data)
    return record


def _checksum(value: Any) -> str:
    """Returns the SHA-256 of a JSON value: of its text with sorted keys, whatever the text in the file is."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check_step(folder: Any, step: int, recorded: Mapping[str, str]) -> None:
    """Raises if the state of a step is that of another one.

    Raises:
      CorruptedError: it was saved with another step.
    """
    saved = recorded.get(STEP, str(step))
    if saved != str(step):
        raise CorruptedError(
            f"The state of step {step} in {folder.parent} is corrupted: it was saved with step {saved}.",
            hint="restore another step: checkpoints.restore(target, step=...); or, if the directory was renamed on "
            f"purpose, sw.restore(checkpoints.path({step}), target)",
        )


def read_items(
    folder: Any, step: int, recorded: Mapping[str, str], extra: Sequence[str] | Mapping[str, Any], data: object
) -> tuple[dict[str, Any], Move | None]:
    """Reads and checks the items of a step; moves nothing so far.

    Args:
      folder: the directory of the step.
      step: its number.
      recorded: what the manifest of its state records.
      extra: the names of the extra items; or, by name, what Orbax restores them with: these are only checked.
      data: the iterator to set to the position of the step; None for none.

    Returns:
      the items that are read as JSON, and what to do with the iterator.

    Raises:
      RestoreError: there is no such item, or it is something else; the iterator does not say where it is.
      CorruptedError: an item is not what was written, or is gone; the state is that of another step.
    """
    check_step(folder, step, recorded)
    by_orbax = isinstance(extra, Mapping)
    with _all_there(folder, step):
        _check_has(folder, step, recorded, [*extra, *(() if data is None else (DATA,))])
        if DATA in extra and not by_orbax:
            check_not_position(folder / DATA, step)
        move = None if data is None else find_move(folder / DATA, data, step)
        read = [name for name in extra if not by_orbax or recorded.get(f"{STEP}/{name}")]
        values = {name: _read_item(folder / name, step, recorded.get(f"{STEP}/{name}")) for name in read}
    return {} if by_orbax else values, move


@contextlib.contextmanager
def _all_there(folder: Any, step: int) -> Iterator[None]:
    """Raises if what was listed a moment ago is gone: the run may be deleting the step, which the caller finds out."""
    try:
        yield
    except FileNotFoundError as error:
        said = f"Step {step} in {folder.parent} is corrupted: a file of its items was removed while it was read."
        raise CorruptedError(said, hint=_ANOTHER) from error


def _check_has(folder: Any, step: int, recorded: Mapping[str, str], names: Sequence[str]) -> None:
    """Raises if a step does not have all of these items."""
    there = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    for name in names:
        if name not in there:
            if f"{STEP}/{name}" in recorded:
                said = f"Step {step} in {folder.parent} is corrupted: its item {name!r} is missing."
                raise CorruptedError(said, hint=_ANOTHER)
            raise RestoreError(f"Step {step} has no item {name!r}.", hint="one of: " + ", ".join(there))


def _read_item(folder: Any, step: int, expected: str | None) -> Any:
    """Returns the value of an item that is JSON; compares it with its checksum, if there is one."""
    value = _read_json(folder)
    if expected and _checksum(value) != expected:
        raise CorruptedError(
            f"The item {folder.name!r} of step {step} in {folder.parent.parent} is corrupted: it is not what was "
            "written.",
            hint=_ANOTHER,
        )
    return value


def _read_json(folder: Any) -> Any:
    """Reads an extra item that is JSON, whichever interface has written it.

    Raises:
      RestoreError: it is something else.
      CorruptedError: its file is not what was written, or is gone.
    """
    for name in _JSON_FILES:
        try:
            return json.loads((folder / name).read_text())
        except FileNotFoundError:
            continue
        except ValueError as error:
            raise CorruptedError(
                f"The item {folder.name!r} in {folder.parent} is corrupted: {name} is not JSON: {error}.",
                hint=_ANOTHER,
            ) from error
    if all(entry.name == MARK for entry in folder.iterdir()):
        said = f"The item {folder.name!r} in {folder.parent} is corrupted: it has no file."
        raise CorruptedError(said, hint=_ANOTHER)
    raise RestoreError(
        f"The item {folder.name!r} in {folder.parent} is not JSON.",
        hint=f"say how to restore it: checkpoints.restore(target, extra={{{folder.name!r}: ocp.args.PyTreeRestore()}})",
    )
