"""Writing a state with its manifest into a directory, for whatever commits the directory.

The arrays are a tree as Orbax writes it.  The manifest is beside them; `finish` writes it last, when every other file
exists and can be listed.  Whoever commits the directory (`sw.save`, or Orbax, through either of its interfaces)
calls `finish` before it renames it: a directory without a manifest is not a checkpoint.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import datetime
from collections.abc import Callable, Mapping
from typing import Any

import jax

from statewise._src.checkpoint.format.checksums import Sums, held, sums_of, sums_of_runs
from statewise._src.checkpoint.format.files import files_of
from statewise._src.checkpoint.format.layout import LaidOut, lay_out
from statewise._src.checkpoint.format.manifest import NAME, KindRecord, Manifest, leaves_text, write_manifest
from statewise._src.checkpoint.orbax.epath import own_path
from statewise._src.checkpoint.orbax.paths import check_usable
from statewise._src.checkpoint.orbax.write import TreeWriter
from statewise._src.common import compat
from statewise._src.core.plan import State
from statewise._src.filters.explain import as_code

__all__ = ["Saving", "StateWriter"]


@dataclasses.dataclass(frozen=True)
class Saving:
    """What to save: these kinds of a state, in this layout, over this base; and what its manifest records of a step."""

    state: State
    kinds: tuple[str, ...]
    layout: str = "named"
    base: Mapping[str, str] | None = None
    recorded: Mapping[str, str] = dataclasses.field(default_factory=dict)


class StateWriter:
    """Writes a state with the values that it has now; made in the main thread of every process.

    Args:
      directory: where it will be written; it need not exist before `write`.
      saving: what to save.
      own: in an object store, the directory below it that this writer has, if others may write there too.
      wrote: is called with a number of bytes whenever this many more are written.

    Raises:
      SaveError: the directory cannot be written to.
      StructureError: the state was donated, is abstract, or is being traced.
    """

    def __init__(
        self, directory: Any, saving: Saving, own: str = "", wrote: Callable[[int], None] = lambda size: None
    ) -> None:
        check_usable(directory, writing=True)  # here, because a user's own Orbax manager chooses the directory
        self._directory = own_path(directory)
        self._own = own
        self._several = jax.process_count() > 1
        laid = lay_out(saving.state, saving.kinds, saving.layout)
        self._manifest = _manifest(saving, laid)
        self._text = _leaves_text(laid)
        # Without a tree all leaves are empty, and Orbax does not accept an empty tree.
        self._tree = TreeWriter(laid.tree, own, wrote) if laid.tree else None
        self._leaves: str | None = None

    def write(self) -> None:
        """Writes everything that this process writes, but for the manifest; in any thread."""
        if self._several:
            if self._tree is not None:
                self._tree.write(self._directory)
            return
        with concurrent.futures.ThreadPoolExecutor(1, "statewise-manifest") as pool:
            leaves = pool.submit(self._text, {})  # the checksums, while the arrays are written
            if self._tree is not None:
                self._tree.write(self._directory)
            self._leaves = leaves.result()

    def finish(self) -> None:
        """Writes the manifest when every process has written; called once, by one process."""
        (self._directory / NAME).write_bytes(self.manifest())

    def manifest(self) -> bytes:
        """Returns the manifest when every process has written, and puts everything else into its place."""
        sums = {} if self._tree is None else self._tree.finish(self._directory)
        leaves = self._text(sums) if self._several else self._leaves
        assert leaves is not None, "this comes after write"
        files = files_of(self._directory, self._own)
        return write_manifest(dataclasses.replace(self._manifest, files=files), leaves)

    @property
    def for_orbax(self) -> Mapping[str, bytes]:
        """Returns the files that Orbax looks for at the path itself, if the writer has its own directory."""
        return {} if self._tree is None else self._tree.for_orbax


def _leaves_text(laid: LaidOut) -> Callable[[Mapping[str, Sums]], str]:
    """Returns a function that makes the manifest's text of the leaves, with their checksums.

    A later step may donate the arrays while that function runs in its thread, so their values are taken here.  If
    several processes write, those of the stored arrays are given to it: each process has summed what it has written.
    """
    stored = [array.key for record in laid.records for array in record.arrays]
    names = {number: ".".join(key) for number, key in enumerate(stored) if key} if jax.process_count() > 1 else {}
    in_buffers = {number for _, buffer in laid.packed for number in buffer.numbers}
    values = {
        number: held(source)
        for number, source in enumerate(laid.sources)
        if number not in names and number not in in_buffers
    }

    def text(given: Mapping[str, Sums]) -> str:
        sums = {number: given[name] for number, name in names.items()}
        for array, buffer in laid.packed:
            sums.update(zip(buffer.numbers, sums_of_runs(array, buffer.runs), strict=True))
        sums.update((number, sums_of(value)) for number, value in values.items())
        return leaves_text(laid.records, [sums[number] for number in range(len(sums))])

    return text


def _manifest(saving: Saving, laid: LaidOut) -> Manifest:
    kinds = {
        name: KindRecord(as_code(kind.of), kind.handling(), kind.saved and name in saving.kinds)
        for name, kind in saving.state.tables.kinds.items()
    }
    written = compat.versions() | {"at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
    buffers = tuple(buffer.stored for _, buffer in laid.packed)
    return Manifest(written, saving.layout, kinds, laid.records, buffers, saving.base, recorded=saving.recorded)
