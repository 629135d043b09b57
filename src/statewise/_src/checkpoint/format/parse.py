"""Reading a manifest: each field is checked before it is used.

A file on disk may be corrupted, from another program, or malicious.  No field is ever executed, opened for writing, or
trusted as a size of memory.  Whatever is wrong with one is a `CorruptedError` that says so.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from statewise._src.checkpoint.format.files import HASHED
from statewise._src.checkpoint.format.keys import decode_path, dtype_of, encode_path, is_utf8
from statewise._src.checkpoint.format.manifest import (
    FORMAT,
    LARGEST,
    NAME,
    STEP,
    ArrayRecord,
    KindRecord,
    LeafRecord,
    Manifest,
    StoredBuffer,
    content_text,
)
from statewise._src.checkpoint.format.per_device import EACH, MEMBERS
from statewise._src.checkpoint.orbax.epath import own_path, read_at_most, size_of
from statewise._src.checkpoint.orbax.store_errors import StoreError, unreadable
from statewise._src.checkpoint.orbax.stores import is_url
from statewise._src.common.paths import Path
from statewise._src.plan.members import shrunk
from statewise.errors import CorruptedError

__all__ = ["is_plain_file", "read_manifest"]

# The start of a manifest of any format, and a complete manifest of this one.
_HEAD = re.compile(rb'\{"statewise":([1-9][0-9]{0,8}),')
_COMPLETE = re.compile(rb'\{"statewise":[0-9]+,"sha256":"([0-9a-f]{64})","content":(\{.*\})\}\n', re.DOTALL)
_DTYPE = re.compile(r"bool|(u?int|b?float|complex)[0-9]+(_\w+)?", re.ASCII)
# The limits of an array's elements and axes, and of tuples nested in a path key.
_MOST, _AXES, _DEEPEST = 1 << 62, 64, 16
# The tags of path keys that JSON does not have, with the types of their values.
_TAGS: dict[str, type[Any]] = {"tuple": list, "float": str, "bytes": str, "bool": bool, "none": type(None)}


def read_manifest(directory: Any) -> Manifest:
    """Reads and checks the manifest of a checkpoint.

    Raises:
      CorruptedError: it is not what was written, or was never written by Statewise.
      RestoreError: the object store that it is in does not give it.
    """
    path = own_path(directory) / NAME
    try:
        if not is_url(path) and path.exists() and not is_plain_file(path):
            raise CorruptedError(f"{path} is not a file.", hint="restore another checkpoint")
        data = read_at_most(path, LARGEST)
        if data is None:
            size = f"more than {LARGEST}" if is_url(path) else f"{size_of(path)}"
            raise CorruptedError(f"{path} is not a manifest: it has {size} bytes, and the limit is {LARGEST}.")
    except StoreError as error:
        raise unreadable(path, error) from error
    except OSError as error:
        hint = f"is it one of Statewise's? sw.convert({str(directory)!r}, ...) takes a plain Orbax checkpoint"
        raise CorruptedError(f"{path} cannot be read: {error.strerror}.", hint=hint) from error
    head = _HEAD.match(data)
    if head is not None and int(head[1]) > FORMAT:
        raise CorruptedError(
            f"{path} is of format {int(head[1])}; this version of Statewise reads formats up to {FORMAT}.",
            hint="update Statewise: pip install --upgrade statewise",
        )
    try:
        return _parse(data)
    except (RecursionError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        malformed = "it is nested too deeply" if isinstance(error, RecursionError) else "one of its fields is malformed"
        what = error if isinstance(error, _InvalidError) else malformed
        raise CorruptedError(f"{path} is corrupted: {what}.", hint="restore another checkpoint") from error


def is_plain_file(path: Any) -> bool:
    """Returns whether a path is a file, or a link to one: reading a pipe or a device might never end."""
    return path.is_file() if is_url(path) else os.path.isfile(str(path))


class _InvalidError(ValueError):
    """What is wrong with a manifest, in words."""


def _need(condition: Any, wrong: str) -> None:
    if not condition:
        raise _InvalidError(wrong)


def _parse(data: bytes) -> Manifest:
    head = _HEAD.match(data)
    if head is None:
        raise _InvalidError("it is not a manifest")
    complete = _COMPLETE.fullmatch(data)
    if complete is None:
        raise _InvalidError("it is incomplete")
    digest = hashlib.sha256(complete[2]).hexdigest()
    _need(digest == complete[1].decode(), "its checksum does not match")
    try:
        content = json.loads(complete[2].decode("ascii"))
        text = content_text(content).encode()
    except ValueError as error:
        raise _InvalidError("its content is not JSON") from error
    # A key that occurs twice would have another value for another reader.
    _need(text == complete[2], "it is not written as Statewise writes it")
    _fields(content, "its content", {"written", "layout", "kinds", "leaves", "buffers", "base", "files"})
    _need(content["layout"] in ("named", "packed"), "its layout is unknown")
    written = _texts(content["written"], "written")
    kinds = {name: _kind(kind) for name, kind in _dict(content["kinds"], "kinds").items()}
    buffers = tuple(map(_buffer, _list(content["buffers"], "buffers")))
    leaves = tuple([_leaf(leaf, kinds, buffers) for leaf in _list(content["leaves"], "leaves")])
    keys = [array.key for leaf in leaves for array in leaf.arrays if array.key is not None]
    keys = sorted([*keys, *(buffer.key for buffer in buffers)])
    # Every array is a node of its own in Orbax's tree, with none below it; sorted, a prefix comes right before.
    _need(all(key[: len(before)] != before for before, key in itertools.pairwise(keys)), "two arrays have one key")
    _need(len({leaf.id for leaf in leaves}) == len(leaves), "it lists a leaf twice")
    base = None if content["base"] is None else _texts(content["base"], "base")
    is_base = base is None or (set(base) == {"path", "digest"} and "\0" not in base["path"])
    _need(is_base, "its base is not a checkpoint")
    files = {name: _file(name, facts) for name, facts in _dict(content["files"], "files").items()}
    recorded = {name: written.pop(name) for name in [*written] if name.partition("/")[0] == STEP}
    return Manifest(written, content["layout"], kinds, leaves, buffers, base, files, digest, recorded)


def _dict(value: Any, name: str) -> dict[str, Any]:
    _need(isinstance(value, dict), f"its {name} are not an object")
    return value


def _list(value: Any, name: str) -> list[Any]:
    _need(isinstance(value, list), f"its {name} are not a list")
    return value


def _fields(value: Any, name: str, fields: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict) or value.keys() != fields:
        raise _InvalidError(f"{name} has other fields")
    return value


def _two(value: Any, name: str) -> tuple[Any, Any]:
    if isinstance(value, list) and len(value) == 2:
        return value[0], value[1]
    raise _InvalidError(f"{name} is not a list of two")


def _texts(value: Any, name: str) -> dict[str, str]:
    texts = _dict(value, name)
    _need(all(isinstance(text, str) for text in texts.values()), f"its {name} are not text")
    return texts


def _kind(value: Any) -> KindRecord:
    kind = _fields(value, "a kind", {"of", "treatment", "saved"})
    _need(isinstance(kind["of"], str) and isinstance(kind["treatment"], str), "a kind is not text")
    _need(isinstance(kind["saved"], bool), "a kind is neither saved nor not")
    return KindRecord(kind["of"], kind["treatment"], kind["saved"])


def _count(value: Any, name: str) -> int:
    _need(type(value) is int and 0 <= value < _MOST, f"{name} is not a count")
    return value


def _key(value: Any) -> tuple[str, ...]:
    key = tuple(_list(value, "keys"))
    is_key = bool(key) and all(isinstance(part, str) and part and not set("/.") & set(part) for part in key)
    _need(is_key, "a key is invalid")
    _need(is_utf8("".join(key)), "a key is not UTF-8")  # which TensorStore requires
    return key


def _buffer(value: Any) -> StoredBuffer:
    buffer = _fields(value, "a buffer", {"key", "dtype", "elements"})
    elements = _count(buffer["elements"], "the size of a buffer")
    return StoredBuffer(_key(buffer["key"]), _dtype(buffer["dtype"]), elements)


def _path(value: Any) -> Path:
    keys = _list(value, "paths")
    if all(type(key) is str or type(key) is int for key in keys):
        return tuple(keys)
    _need(all(_is_path_key(key) for key in keys), "a path is invalid")
    try:
        path = decode_path(keys)
    except ValueError:  # the text of a float or of bytes is not one
        raise _InvalidError("a path is invalid") from None
    _need(encode_path(path) == value, "a path is invalid")
    return path


def _is_path_key(key: Any, depth: int = 0) -> bool:
    """Returns whether `decode_path` may take a key: it has a known type, and is not nested too deeply."""
    if type(key) in (str, int):
        return True
    if not isinstance(key, dict):
        return False
    if set(key) == {"type", "repr"}:
        return all(isinstance(text, str) for text in key.values())
    if len(key) != 1:
        return False
    ((tag, value),) = key.items()
    expected = _TAGS.get(tag)
    if expected is None or not isinstance(value, expected):
        return False
    return tag != "tuple" or (depth < _DEEPEST and all(_is_path_key(part, depth + 1) for part in value))


# A manifest has thousands of leaves, so what follows is written for speed: the common case first, shapes and dtypes
# from a cache.
_LEAF_FIELDS = {"path", "kind", "type", "structure", "aliases", "arrays"}
_ARRAY_FIELDS = {"within", "shape", "dtype", "prng", "stored", "key", "buffer", "sums", "placement"}


def _leaf(value: Any, kinds: Mapping[str, KindRecord], buffers: Sequence[StoredBuffer]) -> LeafRecord:
    leaf = _fields(value, "a leaf", _LEAF_FIELDS)
    kind, name, structure = leaf["kind"], leaf["type"], leaf["structure"]
    _need(isinstance(kind, str) and kind in kinds, "a leaf has an unknown kind")
    _need(isinstance(name, str) and ":" in name, "a leaf has no type")
    arrays = tuple([_array(array, buffers) for array in _list(leaf["arrays"], "arrays")])
    if structure is None:
        _need(len(arrays) == 1, "a leaf's value is not an array")
    else:
        _need(isinstance(structure, str), "a leaf's structure is not text")
    aliases = _list(leaf["aliases"], "aliases")
    return LeafRecord(_path(leaf["path"]), kind, name, structure, arrays, tuple(map(_path, aliases)) if aliases else ())


def _array(value: Any, buffers: Sequence[StoredBuffer]) -> ArrayRecord:
    array = _fields(value, "an array", _ARRAY_FIELDS)
    shape, dtype, prng = _shape(array["shape"]), array["dtype"], array["prng"]
    on_disk, stored = (shape, dtype), None
    if array["stored"] is not None:
        inner, name = _two(array["stored"], "a stored array")
        on_disk = stored = (_shape(inner), _dtype(name))
    if prng is not None:
        _need(isinstance(prng, str) and dtype == "key", "a PRNG key is invalid")
        _need(stored is not None and stored[0][: len(shape)] == shape, "a PRNG key has no words")
    else:
        _dtype(dtype)
        if stored is not None:
            is_bytes = stored == (shape, "uint8") and np.dtype(dtype_of(dtype)).itemsize == 1
            _need(is_bytes, "an array is stored in another form")
    key = None if array["key"] is None else _key(array["key"])
    buffer = None if array["buffer"] is None else _pair(array["buffer"])
    if buffer is not None:
        _need(key is None, "an array is stored twice")
        _need(buffer[0] < len(buffers), "an array is in an unknown buffer")
        inside = buffers[buffer[0]]
        _need(buffer[1] + math.prod(on_disk[0]) <= inside.elements, "an array extends beyond its buffer")
        _need(inside.dtype == on_disk[1], "an array has another dtype than its buffer")
    elif key is None:
        _need(math.prod(on_disk[0]) == 0, "an array is not stored")
    placement = array["placement"]
    if placement is not None:
        _need(isinstance(placement, dict), "a placement is not an object")
        if EACH in placement:
            devices = placement[EACH]
            _need(type(devices) is int and shape[:1] == (devices,), "an array does not have a value for each device")
        if MEMBERS in placement:
            is_ensemble = EACH not in placement and _has_members(placement[MEMBERS], shape)
            _need(is_ensemble, "an array does not have a value for each member")
    within = _path(array["within"]) if array["within"] != [] else ()
    return ArrayRecord(within, shape, dtype, prng, stored, key, buffer, _pair(array["sums"]), placement)


def _has_members(members: Any, shape: tuple[int, ...]) -> bool:
    """Returns whether an array of this shape may hold these members."""
    if not isinstance(members, dict) or not {"number", "axis"} <= set(members) <= {"number", "axis", EACH}:
        return False
    if not all(type(value) is int for value in members.values()) or not 0 <= members["axis"] < len(shape):
        return False
    axis = members["axis"]
    of_one = shrunk(shape, axis)
    return shape[axis] == members["number"] > 0 and (EACH not in members or of_one[:1] == (members[EACH],))


def _shape(value: Any) -> tuple[int, ...]:
    try:
        return _known_shape(*_list(value, "shapes"))
    except TypeError:  # a size that cannot be hashed
        raise _InvalidError("an axis is not a count") from None


@functools.lru_cache(maxsize=1024, typed=True)  # typed, because 1 and True are equal but True is not a size
def _known_shape(*sizes: Any) -> tuple[int, ...]:
    shape = tuple(_count(size, "an axis") for size in sizes)
    _need(len(shape) <= _AXES and math.prod(size or 1 for size in shape) < _MOST, "an array is larger than any can be")
    return shape


def _dtype(value: Any) -> str:
    if not isinstance(value, str) or not _is_dtype(value):
        raise _InvalidError(f"the dtype {str(value)[:40]!r} is unknown")
    return value


@functools.lru_cache(maxsize=256)
def _is_dtype(name: str) -> bool:
    return _DTYPE.fullmatch(name) is not None and dtype_of(name) is not None and str(dtype_of(name)) == name


def _pair(value: Any) -> tuple[int, int]:
    first, second = _two(value, "a pair of numbers")
    if type(first) is int and type(second) is int and 0 <= first < _MOST and 0 <= second < _MOST:
        return first, second
    raise _InvalidError("a number is not a count")


def _file(name: str, value: Any) -> dict[str, Any]:
    facts = _dict(value, "files")
    parts = name.split("/")
    # "\\" and ":" separate directories or name drives on other systems.
    _need(not ({"", ".", ".."} & set(parts) or set("\\\0:") & set(name)), "a file is outside of the checkpoint")
    _need(is_utf8(name), "the name of a file is not UTF-8")
    _need(set(facts) <= {"bytes", "sha256", "parts"} and "bytes" in facts, "a file has other fields")
    size = _count(facts["bytes"], "the size of a file")
    _need(isinstance(facts.get("sha256", ""), str), "a file's checksum is not text")
    hashed, end = (size, size) if "parts" not in facts else (0, 0)
    for start, length in map(_pair, _list(facts.get("parts", []), "parts")):
        _need(start >= end and length > 0, "the parts of a file overlap")
        hashed, end = hashed + length, start + length
    _need(end <= size, "a part of a file extends beyond its end")
    _need("sha256" in facts or "parts" not in facts, "parts of a file have no checksum")
    _need("sha256" not in facts or hashed <= HASHED, "a file is too large for a checksum of its own")
    return facts
