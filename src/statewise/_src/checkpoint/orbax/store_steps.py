"""The steps of a run on an object store: which are complete, and who writes one.

Nothing is renamed there, so all writers of a step write to the same names.  A step is complete when it has Orbax's
mark, which Orbax writes last, and a manifest of ours.

An object beside the step names its writer.  Whoever begins a step writes its own name there, and Orbax then removes
what an earlier writer has left: a run that was killed goes on, and the last one to begin a step is the one that may
commit it.  A writer looks for its name before it writes the manifest, after that (which is before Orbax marks the
step), and once more when everything is written: if another name is there, it says so, and nothing of it counts.  What
is there without such a name is not ours, and stays.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
from collections.abc import Callable
from typing import Any

import jax
from etils.epath import backend

from statewise._src.checkpoint.format.manifest import NAME, OWN
from statewise._src.checkpoint.orbax.state_writer import StateWriter
from statewise._src.checkpoint.orbax.stores import StorePath, listing, probe, read, remove, write_if
from statewise.errors import SaveError

__all__ = ["MARK", "Claim", "complete_steps", "is_marked", "keep_no_listings"]

# Orbax's mark of a directory that is committed, where nothing can be renamed.
MARK = "commit_success.txt"
# The end of the name of the object that names the writer of a step.
_WRITER = ".statewise-writer"
_DIGITS = re.compile("[0-9]+$")
# The libraries behind Orbax's paths, by the scheme of their URLs; the extras have the names on the right.
_LIBRARIES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}


def keep_no_listings(url: str) -> None:
    """Makes the library behind Orbax's paths ask the store each time what there is.

    It would keep each listing for the whole life of the process: Orbax would never see a step of another process, and
    would leave objects behind when it removes one.

    Raises:
      SaveError: this library is not installed.
    """
    scheme = url.partition("://")[0]
    library, extra = _LIBRARIES[scheme]
    if importlib.util.find_spec(library) is None:
        if importlib.util.find_spec("tensorflow") is not None:
            return  # Orbax's paths take that instead, which keeps no listings
        raise SaveError(f"Steps on {scheme}:// need {library}.", hint=f"pip install 'statewise[{extra}]'")
    listings = backend.fsspec_backend.fs(url).dircache
    listings.use_listings_cache = False
    listings.clear()


def complete_steps(directory: StorePath, name_of: Callable[[int], str], item: str) -> dict[int, StorePath]:
    """Returns the complete steps, each with the directory of its state.

    It takes one listing of everything, because several questions for each step would take much longer.

    Args:
      directory: the directory of the steps.
      name_of: returns the name of a step.
      item: the name of the state in each step.
    """
    names = set(listing(directory))
    places = {}
    for name in names:
        step, _, rest = name.partition("/")
        digits = _DIGITS.search(step)
        if rest == MARK and digits and f"{step}/{item}/{NAME}" in names and name_of(int(digits[0])) == step:
            places[int(digits[0])] = directory / step / item
    return places


def is_marked(step: Any) -> bool:
    """Returns whether Orbax has committed a step."""
    return probe(StorePath(str(step)) / MARK)


class Claim:
    """The right to commit a step; the first process takes it when this is made.

    Args:
      step: the directory of the step.
      token: 16 hexadecimal digits that no other writer has, the same in every process.

    Attributes:
      own: the name of this writer's directory in each state of the step.
      written: the number of bytes that this process has written to states of the step.

    Raises:
      SaveError: there is something that no writer of ours has started.
    """

    def __init__(self, step: StorePath, token: str) -> None:
        self._step = step
        self._writer = step.parent / f"{step.name}{_WRITER}"
        self._name = json.dumps({"host": socket.gethostname(), "process": os.getpid(), "token": token}).encode()
        self.own = f"{OWN}{token}"
        self.written = 0
        self._manifests: dict[StorePath, bytes] = {}
        if jax.process_index() == 0:
            self._take()

    def _take(self) -> None:
        if read(self._writer).data is None:
            found = listing(self._step)
            if found and not any(name.endswith(f"/{NAME}") for name in found):
                raise SaveError(
                    f"There is already something at {self._step}, which is not a checkpoint of Statewise.",
                    hint="another step; or remove it with the tools of the store",
                )
        self._writer.write_bytes(self._name)

    def wrote(self, size: int) -> None:
        """Counts bytes that were written."""
        self.written += size

    def commit(self, place: StorePath, writer: StateWriter) -> None:
        """Writes the manifest of a state of the step.

        Args:
          place: the directory of the state.
          writer: has written everything else, into its own directory.

        Raises:
          SaveError: another writer has started the step since.
        """
        # A manifest that is there is one of a writer that looked for its name just before this one took the step.
        there = read(place / NAME)
        self._check()
        self._manifests[place] = data = writer.manifest()
        if write_if(place / NAME, data, there.generation) is None:
            raise self._lost()
        for name, content in writer.for_orbax.items():
            (place / name).write_bytes(content)
        self._check()

    def release(self) -> None:
        """Ends the claim, when the step is complete.

        Raises:
          SaveError: another writer has started the step since.
        """
        if jax.process_index() != 0:
            return
        found = read(self._writer).data
        if found is None and all(read(place / NAME).data == data for place, data in self._manifests.items()):
            return  # a writer that came later has found the step complete, and left it
        self._check()
        remove(self._writer.parent, [self._writer.name])

    def _check(self) -> None:
        if read(self._writer).data != self._name:
            raise self._lost()

    def _lost(self) -> SaveError:
        found = read(self._writer).data
        other = json.loads(found) if found else {}
        who = f"process {other['process']} on {other['host']}" if other else "which has ended"
        return SaveError(
            f"Another writer ({who}) has written {self._step} at the same time; this one was dropped.",
            hint="another directory for each writer",
        )
