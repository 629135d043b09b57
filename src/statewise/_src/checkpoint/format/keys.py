"""Names on disk: path keys, Variable types, dtypes and PRNG implementations as JSON, and the keys of Orbax's tree.

A path's keys keep their types: the integer `0` and the string `"0"` are two keys, before a save and after a restore.
Orbax knows text only, and writes the segments of a key with dots between them; so a leaf's Orbax key is its path as
text, with dots escaped, made unique where two paths only look alike.  The manifest says which leaf has which.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Hashable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from statewise._src.common.paths import Path
from statewise.errors import StructureError

__all__ = [
    "OrbaxKeys",
    "PathId",
    "decode_path",
    "dtype_name",
    "dtype_of",
    "encode_path",
    "path_id",
    "prng_of",
    "type_name",
]


PathId = Path | str


# --- paths -----------------------------------------------------------------------------------------------------


def encode_path(path: Path) -> list[Any]:
    """A path as JSON: text and integers as they are, tuples, floats, booleans, None and bytes as tagged objects.

    Raises:
      StructureError: a key of another type whose text would not be the same in the next process.
    """
    return [key if type(key) is str or type(key) is int else _encode(key, path) for key in path]


def _encode(key: Any, path: Path) -> Any:
    if isinstance(key, _Foreign):
        return key.encoded
    if isinstance(key, bool):
        return {"bool": key}
    if type(key) in (str, int):
        return key
    if type(key) is float:
        return {"float": key.hex()}
    if key is None:
        return {"none": None}
    if type(key) is bytes:
        return {"bytes": key.hex()}
    if type(key) is tuple:
        return {"tuple": [_encode(part, path) for part in key]}
    text = repr(key)
    if " at 0x" in text:
        raise StructureError(
            f"A path key of type {type(key).__qualname__} has no text that would be the same in another process: "
            f"{'/'.join(map(str, path))}.",
            hint=f"give {type(key).__qualname__} a __repr__ that tells its objects apart by value",
        )
    return {"type": type_name(type(key)), "repr": text}


def decode_path(encoded: Iterable[Any]) -> Path:
    """The path of its JSON; keys of types that JSON cannot make again come back as text, which encodes as they did."""
    return tuple(map(_decode, encoded))


def _decode(key: Any) -> Hashable:
    if not isinstance(key, dict):
        return key
    ((tag, value), *_) = key.items()
    if tag == "tuple":
        return tuple(map(_decode, value))
    if tag == "float":
        return float.fromhex(value)
    if tag == "bytes":
        return bytes.fromhex(value)
    return _Foreign(key) if tag == "type" else value


class _Foreign(str):
    """The text of a key that only its own process could make."""

    __slots__ = ("encoded",)
    encoded: dict[str, str]

    def __new__(cls, encoded: dict[str, str]) -> _Foreign:
        made = super().__new__(cls, encoded["repr"])
        made.encoded = encoded
        return made


def path_id(path: Path) -> PathId:
    """What two paths share if they are the same, and only then: by it the leaves of a target and a checkpoint meet.

    A path of text and integers is its own; one with other keys is text, as to Python `1`, `1.0` and `True` are equal.
    """
    for key in path:
        if type(key) is not str and type(key) is not int:
            return _ENCODER.encode(encode_path(path))
    return path


_ENCODER = json.JSONEncoder(sort_keys=True)


class OrbaxKeys:
    """Gives each path a key of its own in Orbax's tree: `("layers", "0", "kernel")`.

    No two paths get keys that Orbax would write alike, and no array stands where others hang below.
    """

    def __init__(self) -> None:
        self._nodes: dict[tuple[str, ...], dict[str, str]] = {}  # of each node: from a child's id to its text
        self._taken: set[tuple[str, ...]] = set()

    def key(self, path: Path) -> tuple[str, ...]:
        """The key of a path; the same path gets the same key."""
        made: tuple[str, ...] = ()
        for part in path or ("",):
            made += (self._child(made, _ENCODER.encode(_encode(part, path)), str(part)),)
        return made

    def apart(self, root: str, *parts: str) -> tuple[str, ...]:
        """A key for what is no leaf: below a root that no path has, whatever the model calls its own."""
        made: tuple[str, ...] = (self._child((), f"not a path: {root}", root),)
        for part in parts:
            made += (self._child(made, part, part),)
        return made

    def _child(self, node: tuple[str, ...], identity: str, name: str) -> str:
        children = self._nodes.setdefault(node, {})
        text = children.get(identity)
        if text is None:
            plain = text = _escaped(name)
            again = 1
            while (*node, text) in self._taken:
                again += 1
                text = f"{plain}#{again}"
            self._taken.add((*node, text))
            children[identity] = text
        return text


def _escaped(text: str) -> str:
    escaped = text.replace("%", "%25").replace(".", "%2E").replace("/", "%2F")
    return "".join(c if c.isprintable() else f"%u{ord(c):04X}" for c in escaped) or "%"


# --- types -----------------------------------------------------------------------------------------------------


def type_name(cls: type) -> str:
    """A type as `module:qualname`; those of NNX by their public place, wherever flax keeps them."""
    if getattr(nnx, cls.__name__, None) is cls:
        return f"flax.nnx:{cls.__name__}"
    return "jax:Array" if cls is jax.Array else f"{cls.__module__}:{cls.__qualname__}"


# --- dtypes ----------------------------------------------------------------------------------------------------


def dtype_name(dtype: Any) -> str:
    """A dtype's name; of PRNG keys `key`."""
    return "key" if jnp.issubdtype(dtype, jax.dtypes.extended) else str(np.dtype(dtype))


@functools.lru_cache(maxsize=64)
def dtype_of(name: str) -> np.dtype | None:
    """The dtype of a name; None if there is none."""
    known = name in np.sctypeDict or (name.isidentifier() and hasattr(jnp, name))
    try:
        dtype = jnp.dtype(name) if known else None
    except TypeError:
        return None
    plain = dtype is not None and not dtype.hasobject and dtype.kind not in "USMm" and dtype.names is None
    return dtype if plain else None


@functools.lru_cache(maxsize=64)
def prng_of(dtype: Any) -> str | None:
    """The name of the PRNG implementation of a key dtype; None for any other dtype."""
    if not jnp.issubdtype(dtype, jax.dtypes.extended):
        return None
    names: list[str] = []

    def note(key: Any) -> Any:
        names.append(str(jax.random.key_impl(key)))
        return jax.random.key_data(key)

    jax.eval_shape(note, jax.ShapeDtypeStruct((), dtype))
    return names[0]
