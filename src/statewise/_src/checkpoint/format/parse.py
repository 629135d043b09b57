"""Reading a manifest: checked field by field before anything in it is believed.

A file on disk may be corrupted, of another program, or made to harm.  No field is ever run, opened for writing, or
trusted as a size of memory; whatever is wrong with one is a `CorruptedError` that says what.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from statewise._src.checkpoint.format.files import HASHED
from statewise._src.checkpoint.format.keys import decode_path, dtype_of, encode_path
from statewise._src.checkpoint.format.manifest import (
    FORMAT,
    LARGEST,
    NAME,
    ArrayRecord,
    KindRecord,
    LeafRecord,
    Manifest,
    StoredBuffer,
    content_text,
)
from statewise._src.checkpoint.format.per_device import EACH, MEMBERS
from statewise._src.checkpoint.orbax.epath import epath
from statewise._src.common.paths import Path
from statewise._src.plan.members import shrunk
from statewise.errors import CorruptedError

__all__ = ["is_plain_file", "read_manifest"]

# How every manifest begins, of whatever format, and what the whole of one of this format is.
_HEAD = re.compile(rb'\{"statewise":([1-9][0-9]{0,8}),')
_WHOLE = re.compile(rb'\{"statewise":[0-9]+,"sha256":"([0-9a-f]{64})","content":(\{.*\})\}\n', re.DOTALL)
_DTYPE = re.compile(r"bool|(u?int|b?float|complex)[0-9]+(_\w+)?", re.ASCII)
# No array has more elements or axes than this, and no key of a path more tuples within tuples.
_MOST, _AXES, _DEEPEST = 1 << 62, 64, 16


def read_manifest(directory: Any) -> Manifest:
    """Reads and checks the manifest of a checkpoint.

    Raises:
      CorruptedError: it is not what was written, or was never written by Statewise.
    """
    path = epath(directory) / NAME
    try:
        if path.exists() and not is_plain_file(path):
            raise CorruptedError(f"{path} is no file.", hint="restore another checkpoint")
        size = path.stat().length
        if size > LARGEST:
            raise CorruptedError(f"{path} is no manifest: it has {size} bytes, and may have {LARGEST}.")
        data = path.read_bytes()
    except OSError as error:
        raise CorruptedError(
            f"{path} cannot be read: {error.strerror}.",
            hint=f"is it one of Statewise's? sw.convert({str(directory)!r}, ...) takes a plain Orbax checkpoint",
        ) from error
    try:
        return _parse(data)
    except _Newer as newer:
        raise CorruptedError(
            f"{path} is of format {newer}; this version of Statewise reads formats up to {FORMAT}.",
            hint="update Statewise: pip install --upgrade statewise",
        ) from newer
    except _Wrong as wrong:
        raise CorruptedError(f"{path} is corrupted: {wrong}.", hint="restore another checkpoint") from wrong
    except (RecursionError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        what = "it is nested too deeply" if isinstance(error, RecursionError) else "one of its fields is another"
        raise CorruptedError(f"{path} is corrupted: {what}.", hint="restore another checkpoint") from error


def is_plain_file(path: Any) -> bool:
    """Whether it is a file, or a link to one: to read a pipe or a device might never end."""
    text = str(path)
    return path.is_file() if "://" in text else os.path.isfile(text)


class _Wrong(Exception):
    """What is wrong with a manifest, in words."""


class _Newer(Exception):
    """The format of a manifest that a later version of Statewise wrote."""


def _need(condition: Any, wrong: str) -> None:
    if not condition:
        raise _Wrong(wrong)


def _parse(data: bytes) -> Manifest:
    head = _HEAD.match(data)
    if head is None:
        raise _Wrong("it is no manifest")
    if int(head[1]) > FORMAT:
        raise _Newer(int(head[1]))
    whole = _WHOLE.fullmatch(data)
    if whole is None:
        raise _Wrong("it is not whole")
    digest = hashlib.sha256(whole[2]).hexdigest()
    _need(digest == whole[1].decode(), "its checksum is another")
    try:
        content = json.loads(whole[2].decode("ascii"))
        text = content_text(content).encode()
    except ValueError as error:
        raise _Wrong("it is no JSON of a manifest") from error
    # A key that is there twice would be another value to another reader.
    _need(text == whole[2], "it is not written as Statewise writes it")
    fields = {"written", "layout", "kinds", "leaves", "buffers", "base", "files"}
    _need(isinstance(content, dict) and set(content) == fields, "its fields are others")
    _need(content["layout"] in ("named", "packed"), "its layout is unknown")
    written = _texts(content["written"], "written")
    kinds = {name: _kind(kind) for name, kind in _dict(content["kinds"], "kinds").items()}
    buffers = tuple(map(_buffer, _list(content["buffers"], "buffers")))
    leaves = tuple([_leaf(leaf, kinds, buffers) for leaf in _list(content["leaves"], "leaves")])
    keys = [array.key for leaf in leaves for array in leaf.arrays if array.key is not None]
    _check_apart([*keys, *(buffer.key for buffer in buffers)])
    ids = [leaf.id for leaf in leaves]
    _need(len(set(ids)) == len(ids), "it lists a leaf twice")
    base = None if content["base"] is None else _texts(content["base"], "base")
    _need(base is None or (set(base) == {"path", "digest"} and "\0" not in base["path"]), "its base is no checkpoint")
    files = {name: _file(name, facts) for name, facts in _dict(content["files"], "files").items()}
    return Manifest(written, content["layout"], kinds, leaves, buffers, base, files, digest)


def _check_apart(keys: Iterable[tuple[str, ...]]) -> None:
    """Every array is a node of its own in Orbax's tree, with none below it."""
    previous: tuple[str, ...] | None = None
    for key in sorted(keys):
        _need(previous is None or key[: len(previous)] != previous, "two arrays have one key")
        previous = key


def _dict(value: Any, name: str) -> dict[str, Any]:
    _need(isinstance(value, dict), f"its {name} are no object")
    return value


def _list(value: Any, name: str) -> list[Any]:
    _need(isinstance(value, list), f"its {name} are no list")
    return value


def _is_utf8(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _two(value: Any, name: str) -> tuple[Any, Any]:
    if isinstance(value, list) and len(value) == 2:
        return value[0], value[1]
    raise _Wrong(f"{name} is not a list of two")


def _texts(value: Any, name: str) -> dict[str, str]:
    texts = _dict(value, name)
    _need(all(isinstance(text, str) for text in texts.values()), f"its {name} are no texts")
    return texts


def _kind(value: Any) -> KindRecord:
    kind = _dict(value, "kinds")
    _need(set(kind) == {"of", "treatment", "saved"}, "a kind has other fields")
    _need(isinstance(kind["of"], str) and isinstance(kind["treatment"], str), "a kind is no text")
    _need(isinstance(kind["saved"], bool), "a kind is neither saved nor not")
    return KindRecord(kind["of"], kind["treatment"], kind["saved"])


def _count(value: Any, name: str) -> int:
    _need(type(value) is int and 0 <= value < _MOST, f"{name} is no count")
    return value


def _key(value: Any) -> tuple[str, ...]:
    key = tuple(_list(value, "keys"))
    _need(
        bool(key) and all(isinstance(part, str) and part and not set("/.") & set(part) for part in key), "a key is none"
    )
    _need(_is_utf8("".join(key)), "a key is not UTF-8")  # and no text for TensorStore
    return key


def _buffer(value: Any) -> StoredBuffer:
    one = _dict(value, "buffers")
    _need(set(one) == {"key", "dtype", "elements"}, "a buffer has other fields")
    return StoredBuffer(_key(one["key"]), _dtype(one["dtype"]), _count(one["elements"], "the size of a buffer"))


def _path(value: Any) -> Path:
    keys = _list(value, "paths")
    if all(type(key) is str or type(key) is int for key in keys):
        return tuple(keys)
    _need(all(_is_path_key(key) for key in keys), "a path is none")
    try:
        path = decode_path(keys)
    except ValueError:  # of what float and bytes are made of
        raise _Wrong("a path is none") from None
    _need(encode_path(path) == value, "a path is none")
    return path


def _is_path_key(key: Any, depth: int = 0) -> bool:
    """Whether `decode_path` may see this: of the types that it knows, and not nested without end."""
    if type(key) in (str, int):
        return True
    if not isinstance(key, dict):
        return False
    if set(key) == {"type", "repr"}:
        return all(isinstance(text, str) for text in key.values())
    if len(key) != 1:
        return False
    ((tag, value),) = key.items()
    if tag == "tuple":
        return isinstance(value, list) and depth < _DEEPEST and all(_is_path_key(part, depth + 1) for part in value)
    if tag in ("float", "bytes"):
        return isinstance(value, str)
    return (tag == "bool" and isinstance(value, bool)) or (tag == "none" and value is None)


# A manifest has thousands of leaves: what follows is written for speed, with what all of them share looked up.
_LEAF_FIELDS = {"path", "kind", "type", "structure", "aliases", "arrays"}
_ARRAY_FIELDS = {"within", "shape", "dtype", "prng", "stored", "key", "buffer", "sums", "placement"}


def _leaf(value: Any, kinds: Mapping[str, KindRecord], buffers: Sequence[StoredBuffer]) -> LeafRecord:
    leaf = _dict(value, "leaves")
    if leaf.keys() != _LEAF_FIELDS:
        raise _Wrong("a leaf has other fields")
    kind, name, structure = leaf["kind"], leaf["type"], leaf["structure"]
    if not isinstance(kind, str) or kind not in kinds:
        raise _Wrong("a leaf is of no kind")
    if not isinstance(name, str) or ":" not in name:
        raise _Wrong("a leaf has no type")
    arrays = tuple([_array(array, buffers) for array in _list(leaf["arrays"], "arrays")])
    if structure is None:
        _need(len(arrays) == 1, "a leaf's value is no array")
    elif not isinstance(structure, str):
        raise _Wrong("a leaf's structure is no text")
    aliases = _list(leaf["aliases"], "aliases")
    return LeafRecord(_path(leaf["path"]), kind, name, structure, arrays, tuple(map(_path, aliases)) if aliases else ())


def _array(value: Any, buffers: Sequence[StoredBuffer]) -> ArrayRecord:
    one = _dict(value, "arrays")
    if one.keys() != _ARRAY_FIELDS:
        raise _Wrong("an array has other fields")
    shape, dtype, prng = _shape(one["shape"]), one["dtype"], one["prng"]
    on_disk, stored = (shape, dtype), None
    if one["stored"] is not None:
        inner, name = _two(one["stored"], "a stored array")
        on_disk = stored = (_shape(inner), _dtype(name))
    if prng is not None:
        _need(isinstance(prng, str) and dtype == "key", "a PRNG key is none")
        _need(stored is not None and stored[0][: len(shape)] == shape, "a PRNG key has no words")
    elif not isinstance(dtype, str) or not _is_dtype(dtype):
        raise _Wrong(f"the dtype {str(dtype)[:40]!r} is unknown")
    elif stored is not None:
        _need(stored == (shape, "uint8") and np.dtype(dtype_of(dtype)).itemsize == 1, "an array is stored as another")
    key = None if one["key"] is None else _key(one["key"])
    buffer = None if one["buffer"] is None else _place(one["buffer"])
    if buffer is not None:
        _need(key is None, "an array is stored twice")
        _need(buffer[0] < len(buffers), "an array stands in no buffer")
        there = buffers[buffer[0]]
        _need(buffer[1] + math.prod(on_disk[0]) <= there.elements, "an array stands beyond its buffer")
        _need(there.dtype == on_disk[1], "an array is of another dtype than its buffer")
    elif key is None:
        _need(math.prod(on_disk[0]) == 0, "an array is not stored")
    placement = one["placement"]
    if placement is not None:
        _need(isinstance(placement, dict), "a placement is none")
        each = placement.get(EACH)
        _need(EACH not in placement or (type(each) is int and shape[:1] == (each,)), _NOT_EACH)
        _need(MEMBERS not in placement or (EACH not in placement and _has_members(placement[MEMBERS], shape)), _NOT_ALL)
    within = _path(one["within"]) if one["within"] != [] else ()
    return ArrayRecord(within, shape, dtype, prng, stored, key, buffer, _place(one["sums"]), placement)


_NOT_EACH = "an array has not a value for each device"
_NOT_ALL = "an array has not a value for each member"


def _has_members(members: Any, shape: tuple[int, ...]) -> bool:
    """Whether an array of this shape may hold these members."""
    if not isinstance(members, dict) or not {"number", "axis"} <= set(members) <= {"number", "axis", EACH}:
        return False
    if not all(type(value) is int for value in members.values()) or not 0 <= members["axis"] < len(shape):
        return False
    one = shrunk(shape, members["axis"])
    return shape[members["axis"]] == members["number"] > 0 and (EACH not in members or one[:1] == (members[EACH],))


def _shape(value: Any) -> tuple[int, ...]:
    try:
        return _known_shape(*_list(value, "shapes"))
    except TypeError:  # what cannot be hashed
        raise _Wrong("an axis is no count") from None


@functools.lru_cache(maxsize=1024, typed=True)  # typed: true is no 1
def _known_shape(*sizes: Any) -> tuple[int, ...]:
    shape = tuple(_count(size, "an axis") for size in sizes)
    _need(len(shape) <= _AXES and math.prod(size or 1 for size in shape) < _MOST, "an array is larger than any can be")
    return shape


def _dtype(value: Any) -> str:
    if not isinstance(value, str) or not _is_dtype(value):
        raise _Wrong(f"the dtype {str(value)[:40]!r} is unknown")
    return value


@functools.lru_cache(maxsize=256)
def _is_dtype(name: str) -> bool:
    return _DTYPE.fullmatch(name) is not None and dtype_of(name) is not None and str(dtype_of(name)) == name


def _place(value: Any) -> tuple[int, int]:
    first, second = _two(value, "a pair of numbers")
    if type(first) is int and type(second) is int and 0 <= first < _MOST and 0 <= second < _MOST:
        return first, second
    raise _Wrong("a number is no count")


def _file(name: str, value: Any) -> dict[str, Any]:
    facts = _dict(value, "files")
    parts = name.split("/")
    _need(not ({"", ".", ".."} & set(parts) or set("\\\0:") & set(name)), "a file lies outside")
    _need(_is_utf8(name), "the name of a file is not UTF-8")
    _need(set(facts) <= {"bytes", "sha256", "parts"} and "bytes" in facts, "a file has other fields")
    size = _count(facts["bytes"], "the size of a file")
    _need(isinstance(facts.get("sha256", ""), str), "a file's checksum is no text")
    hashed, end = (size, size) if "parts" not in facts else (0, 0)
    for start, length in map(_place, _list(facts.get("parts", []), "parts")):
        _need(start >= end and length > 0, "the parts of a file overlap")
        hashed, end = hashed + length, start + length
    _need(end <= size, "a part of a file lies beyond its end")
    _need("sha256" in facts or "parts" not in facts, "parts of a file have no checksum")
    _need("sha256" not in facts or hashed <= HASHED, "a file is too large for a checksum of its own")
    return facts
