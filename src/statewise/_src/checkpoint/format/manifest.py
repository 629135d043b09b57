"""The manifest: what a checkpoint records about itself, in one JSON file beside Orbax's files.

`docs/format.md` describes the file.  This module has its records as Python objects and writes them; `parse` reads them.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from statewise._src.checkpoint.format.checksums import Sums
from statewise._src.checkpoint.format.keys import PathId, dtype_of, encode_path, path_id
from statewise._src.common.compare import LeafFacts
from statewise._src.common.nnx_graph import ArraySpec
from statewise._src.common.paths import Leaf, Path, format_path
from statewise.errors import StatewiseError

__all__ = [
    "ArrayRecord",
    "KindRecord",
    "LeafRecord",
    "Manifest",
    "StoredBuffer",
    "content_text",
    "leaves_text",
    "write_manifest",
]

NAME = "statewise.json"
FORMAT = 1
# A leaf takes about 300 bytes.  A larger file is not a manifest, whatever it says.
LARGEST = 64 * 1024 * 1024
# The name of a directory that a writer has in an object store begins like this.
OWN = "statewise-"
# The database's own file in the directory that a writer has in an object store.
_OWN_DATABASE = re.compile(rf"{OWN}[0-9a-f]+/manifest\.ocdbt")
# What a step of `Checkpoints` records, among the versions in the file: its number, and its items as `step/NAME`.
STEP = "step"
# The sums of an array until they are known.
_UNKNOWN = (-1, -1)


@dataclasses.dataclass(frozen=True, slots=True)
class ArrayRecord:
    """One array of a leaf's value.

    Attributes:
      within: its path within the value; () for a value that is one array.
      shape: its shape; for PRNG keys the keys' shape.
      dtype: its dtype's name; `key` for PRNG keys.
      prng: the PRNG implementation of keys; None for anything else.
      stored: the shape and dtype in storage, if they are not the array's own: the words of PRNG keys, the bytes
        of a dtype that Orbax does not have.
      key: its key in Orbax's tree; None if it is in a buffer, or has no elements and is not stored.
      buffer: the number of the buffer that it is in, and the element that it starts at; None if it has a key.
      sums: its checksum.
      placement: how it was sharded: `{"mesh": {"data": 8}, "spec": ["data", None]}`; None on one device.
    """

    within: Path
    shape: tuple[int, ...]
    dtype: str
    prng: str | None = None
    stored: tuple[tuple[int, ...], str] | None = None
    key: tuple[str, ...] | None = None
    buffer: tuple[int, int] | None = None
    sums: Sums = (0, 0)
    placement: Any = None

    @property
    def on_disk(self) -> tuple[tuple[int, ...], str]:
        """Returns the shape and dtype in storage."""
        return self.stored or (self.shape, self.dtype)

    @property
    def numeric(self) -> tuple[tuple[int, ...], str]:
        """Returns the shape and dtype as other formats have the array: PRNG keys as their words."""
        return self.on_disk if self.prng is not None else (self.shape, self.dtype)

    @property
    def elements(self) -> int:
        """Returns the number of elements; of PRNG keys the number of keys."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class LeafRecord:
    """One leaf: one Variable, or one raw array.

    Attributes:
      path: its first path.
      kind: the name of its kind.
      type: its type, `flax.nnx:Param`.
      structure: the structure of its value as text; None where the value is one array.
      arrays: the arrays in its value.
      aliases: its other paths.
    """

    path: Path
    kind: str
    type: str
    structure: str | None
    arrays: tuple[ArrayRecord, ...]
    aliases: tuple[Path, ...] = ()

    @functools.cached_property
    def id(self) -> PathId:
        """Identifies the leaf: leaves of two plans with the same id are the same leaf."""
        return path_id(self.path)

    def leaf(self, note: str = "") -> Leaf:
        """Returns the leaf as tables and errors show it."""
        return dataclasses.replace(self._leaf, note=note) if note else self._leaf

    @functools.cached_property
    def facts(self) -> LeafFacts:
        """Returns the leaf for a comparison; the dtype of PRNG keys names their implementation, `key<fry>`."""
        specs = [ArraySpec(each.shape, f"key<{each.prng}>" if each.prng else each.dtype) for each in self.arrays]
        ties = frozenset((path_id(alias), format_path(alias)) for alias in self.aliases)
        within = tuple(array.within for array in self.arrays)
        return LeafFacts(self.type, tuple(specs), self.structure, self.kind, ties, within=within)

    @functools.cached_property
    def pieces(self) -> list[str]:
        """Returns the leaf's text in a manifest, split at its sums; cached, because a run writes it many times."""
        # Inside a JSON string each quote has a backslash before it, so this text occurs only where the sums are.
        return content_text(_leaf_json(self)).split(_sums_text(_UNKNOWN))

    @functools.cached_property
    def _leaf(self) -> Leaf:
        array = self.arrays[0] if self.structure is None and self.arrays else None
        dtype: Any = None if array is None else dtype_of(array.dtype) if array.prng is None else f"key<{array.prng}>"
        shape = None if array is None else array.shape
        size, nbytes = sum(each.elements for each in self.arrays), sum(map(_nbytes, self.arrays))
        return Leaf(self.path, self.kind, self.type, shape, dtype, self.aliases, size, nbytes)


def _nbytes(array: ArrayRecord) -> int:
    shape, name = array.numeric
    dtype = dtype_of(name)
    return math.prod(shape) * dtype.itemsize if dtype is not None else 0


@dataclasses.dataclass(frozen=True, slots=True)
class StoredBuffer:
    """Several small arrays of one kind and dtype, one after the other, in one array of Orbax's tree."""

    key: tuple[str, ...]
    dtype: str
    elements: int


@dataclasses.dataclass(frozen=True, slots=True)
class KindRecord:
    """One kind of the declaration: its filter as code, its handling in words, and whether it was saved."""

    of: str
    handling: str
    saved: bool

    def to_json(self) -> dict[str, Any]:
        """Returns the record as format 1 writes it: there a kind's handling has the key `treatment`."""
        return {"of": self.of, "treatment": self.handling, "saved": self.saved}


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a checkpoint records about itself.

    Attributes:
      written: the versions of the software that wrote it, and when.
      layout: `named` or `packed`.
      kinds: the declaration, by name.
      leaves: the leaves.
      buffers: the buffers that packed arrays are in.
      base: another checkpoint that holds the kinds which this one leaves out: `{"path", "digest"}`.
      files: every other file of the checkpoint, by its path within: `{"bytes", "sha256"}`, sha256 of small files only.
      digest: the SHA-256 of all that; empty before it is written.
      recorded: what a step of `Checkpoints` records: its number under `step`, and its other items under `step/NAME`.
    """

    written: Mapping[str, str]
    layout: str
    kinds: Mapping[str, KindRecord]
    leaves: tuple[LeafRecord, ...]
    buffers: tuple[StoredBuffer, ...] = ()
    base: Mapping[str, str] | None = None
    files: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    digest: str = ""
    recorded: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def index(self) -> str:
        """Returns the directory in the checkpoint that has the database's own file; empty for the checkpoint itself."""
        # In an object store each writer has a directory of its own; a checkpoint has that of the one that completed it.
        return next((name.partition("/")[0] for name in self.files if _OWN_DATABASE.fullmatch(name)), "")

    def has_saved(self, kind: str) -> bool:
        """Returns whether the checkpoint itself has a kind, not its base."""
        return kind in self.kinds and self.kinds[kind].saved

    def stored(self, array: ArrayRecord) -> tuple[tuple[str, ...], tuple[int, ...], str] | None:
        """Returns the key in Orbax's tree under which an array is stored, and the stored shape and dtype.

        It is the array itself, or the buffer that it is in.  None for an array without elements, which is not stored.
        """
        if array.buffer is not None:
            buffer = self.buffers[array.buffer[0]]
            return buffer.key, (buffer.elements,), buffer.dtype
        return None if array.key is None else (array.key, *array.on_disk)


# --- writing ---------------------------------------------------------------------------------------------------


def leaves_text(leaves: Sequence[LeafRecord], sums: Iterable[Sums]) -> str:
    """Returns the text of the leaves in a manifest's content.

    Args:
      leaves: the leaves, except for their checksums.
      sums: the checksum of each array, in order.
    """
    remaining = iter(sums)
    return f"[{','.join([_leaf_text(leaf, remaining) for leaf in leaves])}]"


def _leaf_text(leaf: LeafRecord, sums: Iterator[Sums]) -> str:
    first, *rest = leaf.pieces
    # `rest` comes first in `zip`, so that a checksum is taken from the iterator only for an array of this leaf.
    return first + "".join([_sums_text(pair) + piece for piece, pair in zip(rest, sums, strict=False)])


def _sums_text(sums: Sums) -> str:
    return f'"sums":[{sums[0]},{sums[1]}]'


def _leaf_json(leaf: LeafRecord) -> dict[str, Any]:
    return {
        "path": encode_path(leaf.path),
        "kind": leaf.kind,
        "type": leaf.type,
        "structure": leaf.structure,
        "aliases": [encode_path(path) for path in leaf.aliases],
        "arrays": [
            # The fields in their order, which is part of the format; JSON has lists for tuples.
            {name: getattr(array, name) for name in ArrayRecord.__slots__}
            | {"within": encode_path(array.within), "sums": _UNKNOWN}
            for array in leaf.arrays
        ],
    }


def content_text(content: Any) -> str:
    """Returns the text of a manifest's content, from which its digest is computed."""
    return json.dumps(content, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def write_manifest(manifest: Manifest, leaves: str) -> bytes:
    """Returns the bytes of the manifest's file.

    Args:
      manifest: the manifest, except for the leaves' checksums.
      leaves: the text of the leaves, from `leaves_text`.

    Raises:
      StatewiseError: it would be larger than a manifest may be.
    """
    parts = {
        "written": content_text({**manifest.written, **manifest.recorded}),
        "layout": content_text(manifest.layout),
        "kinds": content_text({name: kind.to_json() for name, kind in manifest.kinds.items()}),
        "leaves": leaves,
        "buffers": content_text(list(map(dataclasses.asdict, manifest.buffers))),
        "base": content_text(dict(manifest.base) if manifest.base else None),
        "files": content_text({name: dict(facts) for name, facts in sorted(manifest.files.items())}),
    }
    text = "{" + ",".join(f'"{name}":{part}' for name, part in parts.items()) + "}"
    digest = hashlib.sha256(text.encode()).hexdigest()
    data = f'{{"statewise":{FORMAT},"sha256":"{digest}","content":{text}}}\n'.encode()
    if len(data) > LARGEST:
        raise StatewiseError(
            f"The manifest of {len(manifest.leaves)} leaves would take {len(data)} bytes; the limit is {LARGEST}.",
            hint="save in several checkpoints: sw.save(path, state, only=('params',)), and one more for the rest",
        )
    return data
