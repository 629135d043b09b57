"""Reading a manifest: checked field by field before anything in it is believed.

A file on disk may be damaged, of another program, or made to harm.  No field is ever run, opened for writing, or
trusted as a size of memory; whatever is wrong with one is a `DamagedError` that says what.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from statewise import _compat
from statewise.checkpoint.keys import decode_path, dtype_of, encode_path
from statewise.checkpoint.manifest import (
    FORMAT,
    LARGEST,
    NAME,
    ArrayRecord,
    Buffer,
    KindRecord,
    LeafRecord,
    Manifest,
    content_text,
)
from statewise.errors import DamagedError
from statewise.paths import Path

__all__ = ["read_manifest"]


def read_manifest(directory: Any) -> Manifest:
    """Reads and checks the manifest of a checkpoint.

    Raises:
      DamagedError: it is not what was written, or was never written by Statewise.
    """
    path = _compat.epath(directory) / NAME
    try:
        size = path.stat().length
        if size > LARGEST:
            raise DamagedError(f"{path} is no manifest: it has {size} bytes, and may have {LARGEST}.")
        data = path.read_bytes()
    except OSError as error:
        raise DamagedError(
            f"{path} cannot be read: {error.strerror}.",
            mend=f"is it one of Statewise's? sw.convert({str(directory)!r}, ...) takes a plain Orbax checkpoint",
        ) from error
    try:
        return _parse(data)
    except _Wrong as wrong:
        raise DamagedError(f"{path} is damaged: {wrong}.", mend="restore another checkpoint") from wrong
    except (RecursionError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        what = "it is nested too deeply" if isinstance(error, RecursionError) else "it is no JSON of a manifest"
        raise DamagedError(f"{path} is damaged: {what}.", mend="restore another checkpoint") from error


class _Wrong(Exception):
    """What is wrong with a manifest, in words."""


def _need(condition: Any, wrong: str) -> None:
    if not condition:
        raise _Wrong(wrong)


def _parse(data: bytes) -> Manifest:
    outer = json.loads(data.decode("ascii"))
    _need(isinstance(outer, dict) and list(outer) == ["statewise", "sha256", "content"], "it is no manifest")
    version = outer["statewise"]
    _need(type(version) is int, "its version is no number")
    _need(version <= FORMAT, f"its format is {version}, and this version of Statewise knows {FORMAT}; update Statewise")
    text = content_text(outer["content"])
    digest = hashlib.sha256(text.encode()).hexdigest()
    whole = f'{{"statewise":{version},"sha256":"{digest}","content":{text}}}\n'
    _need(digest == outer["sha256"] and whole.encode() == data, "its checksum is another")
    content = outer["content"]
    fields = {"written", "layout", "kinds", "leaves", "buffers", "base", "files"}
    _need(isinstance(content, dict) and set(content) == fields, "its fields are others")
    _need(content["layout"] in ("named", "packed"), "its layout is unknown")
    written = _texts(content["written"], "written")
    kinds = {name: _kind(kind) for name, kind in _dict(content["kinds"], "kinds").items()}
    buffers = tuple(map(_buffer, _list(content["buffers"], "buffers")))
    leaves = tuple(_leaf(leaf, kinds, buffers) for leaf in _list(content["leaves"], "leaves"))
    ids = [leaf.id for leaf in leaves]
    _need(len(set(ids)) == len(ids), "it lists a leaf twice")
    base = None if content["base"] is None else _texts(content["base"], "base")
    _need(base is None or set(base) == {"path", "digest"}, "its base is no checkpoint")
    files = {name: _file(name, facts) for name, facts in _dict(content["files"], "files").items()}
    return Manifest(written, content["layout"], kinds, leaves, buffers, base, files, digest)


def _dict(value: Any, name: str) -> dict[str, Any]:
    _need(isinstance(value, dict), f"its {name} are no object")
    return value


def _list(value: Any, name: str) -> list[Any]:
    _need(isinstance(value, list), f"its {name} are no list")
    return value


def _texts(value: Any, name: str) -> dict[str, str]:
    texts = _dict(value, name)
    _need(all(isinstance(text, str) for text in texts.values()), f"its {name} are no texts")
    return texts


def _kind(value: Any) -> KindRecord:
    kind = _dict(value, "kinds")
    _need(set(kind) == {"of", "treatment", "saved"}, "a kind has other fields")
    _need(isinstance(kind["of"], str) and isinstance(kind["treatment"], str), "a kind is no text")
    _need(isinstance(kind["saved"], bool), "a kind is neither saved nor not")
    return KindRecord(**kind)


def _count(value: Any, name: str) -> int:
    _need(type(value) is int and 0 <= value < 1 << 62, f"{name} is no count")
    return value


def _key(value: Any) -> tuple[str, ...]:
    key = tuple(_list(value, "keys"))
    _need(
        bool(key) and all(isinstance(part, str) and part and not set("/.") & set(part) for part in key), "a key is none"
    )
    return key


def _buffer(value: Any) -> Buffer:
    one = _dict(value, "buffers")
    _need(set(one) == {"key", "dtype", "elements"}, "a buffer has other fields")
    return Buffer(_key(one["key"]), _dtype(one["dtype"]), _count(one["elements"], "the size of a buffer"))


def _path(value: Any) -> Path:
    path = decode_path(_list(value, "paths"))
    hash(path)
    _need(encode_path(path) == value, "a path is none")
    return path


def _leaf(value: Any, kinds: Mapping[str, KindRecord], buffers: Sequence[Buffer]) -> LeafRecord:
    leaf = _dict(value, "leaves")
    _need(set(leaf) == {"path", "kind", "type", "structure", "aliases", "arrays"}, "a leaf has other fields")
    _need(isinstance(leaf["kind"], str) and leaf["kind"] in kinds, "a leaf is of no kind")
    _need(isinstance(leaf["type"], str) and ":" in leaf["type"], "a leaf has no type")
    _need(leaf["structure"] is None or isinstance(leaf["structure"], str), "a leaf's structure is no text")
    arrays = tuple(_array(array, buffers) for array in _list(leaf["arrays"], "arrays"))
    _need(leaf["structure"] is not None or len(arrays) == 1, "a leaf's value is no array")
    aliases = tuple(map(_path, _list(leaf["aliases"], "aliases")))
    return LeafRecord(_path(leaf["path"]), leaf["kind"], leaf["type"], leaf["structure"], arrays, aliases)


_ARRAY_FIELDS = {"within", "shape", "dtype", "prng", "stored", "key", "buffer", "sums", "placement"}


def _array(value: Any, buffers: Sequence[Buffer]) -> ArrayRecord:
    one = _dict(value, "arrays")
    _need(set(one) == _ARRAY_FIELDS, "an array has other fields")
    shape = _shape(one["shape"])
    stored = None
    if one["stored"] is not None:
        inner, name = _list(one["stored"], "stored arrays")
        stored = (_shape(inner), _dtype(name))
    if one["prng"] is None:
        _dtype(one["dtype"])
        _need(stored is None or stored == (shape, "uint8"), "an array is stored as another")
    else:
        _need(isinstance(one["prng"], str) and one["dtype"] == "key", "a PRNG key is none")
        _need(stored is not None and stored[0][: len(shape)] == shape, "a PRNG key has no words")
    made = ArrayRecord(
        within=_path(one["within"]),
        shape=shape,
        dtype=one["dtype"],
        prng=one["prng"],
        stored=stored,
        key=None if one["key"] is None else _key(one["key"]),
        buffer=None if one["buffer"] is None else _place(one["buffer"]),
        sums=_place(one["sums"]),
        placement=one["placement"],
    )
    _need(made.key is None or made.buffer is None, "an array is stored twice")
    inside, dtype = made.on_disk
    if made.buffer is not None:
        number, start = made.buffer
        _need(number < len(buffers), "an array stands in no buffer")
        _need(start + math.prod(inside) <= buffers[number].elements, "an array stands beyond its buffer")
        _need(buffers[number].dtype == dtype, "an array is of another dtype than its buffer")
    _need(made.key or made.buffer or math.prod(inside) == 0, "an array is not stored")
    _need(made.placement is None or isinstance(made.placement, dict), "a placement is none")
    return made


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(_count(size, "an axis") for size in _list(value, "shapes"))


def _dtype(value: Any) -> str:
    _need(isinstance(value, str) and dtype_of(value) is not None, f"the dtype {str(value)[:40]!r} is unknown")
    return value


def _place(value: Any) -> tuple[int, int]:
    first, second = (_count(part, "a number") for part in _list(value, "numbers"))
    return first, second


def _file(name: str, value: Any) -> dict[str, Any]:
    facts = _dict(value, "files")
    parts = name.split("/")
    _need(not ({"", ".", ".."} & set(parts) or "\\" in name or "\0" in name or ":" in name), "a file lies outside")
    _need(set(facts) <= {"bytes", "sha256"} and "bytes" in facts, "a file has other fields")
    _count(facts["bytes"], "the size of a file")
    _need(isinstance(facts.get("sha256", ""), str), "a file's checksum is no text")
    return facts
