"""Names on disk: path keys, Variable types, dtypes and PRNG implementations as JSON, and the keys of Orbax's tree.

A path's keys keep their types: the integer `0` and the string `"0"` are two keys, before a save and after a restore.
Orbax has only text, and writes the segments of a key with dots between them.  Therefore a leaf's Orbax key is its path
as text, with dots escaped, made unique where two paths only look alike.  The manifest records which leaf has which key.
"""

from __future__ import annotations

import functools
import itertools
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
    "is_utf8",
    "path_id",
    "prng_of",
    "type_name",
    "words_of",
]


PathId = Path | str


# --- paths -----------------------------------------------------------------------------------------------------


def encode_path(path: Path) -> list[Any]:
    """Returns a path as JSON: text and integers are themselves; other keys are tagged objects.

    Raises:
      StructureError: a key is of another type, and its text would not be the same in the next process.
    """
    return [_encode(key, path) for key in path]


def _encode(key: Any, path: Path) -> Any:
    if type(key) is str or type(key) is int:  # nearly all keys
        return key
    if isinstance(key, _ForeignKey):
        return key.encoded
    if isinstance(key, bool):
        return {"bool": key}
    if type(key) is float:
        return {"float": key.hex()}
    if key is None:
        return {"none": None}
    if type(key) is bytes:
        return {"bytes": key.hex()}
    if type(key) is tuple:
        return {"tuple": [_encode(part, path) for part in key]}
    text = repr(key)
    if " at 0x" in text:  # an address, which is another one in each process
        raise StructureError(
            f"A path key of type {type(key).__qualname__} has no text that would be the same in another process: "
            f"{'/'.join(map(str, path))}.",
            hint=f"give {type(key).__qualname__} a __repr__ that tells its objects apart by value",
        )
    return {"type": type_name(type(key)), "repr": text}


def decode_path(encoded: Iterable[Any]) -> Path:
    """Returns the path of its JSON; keys of types that JSON cannot represent become text that encodes as they did."""
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
    return _ForeignKey(key) if tag == "type" else value


class _ForeignKey(str):
    """The text of a key whose type only the process that saved it could construct."""

    __slots__ = ("encoded",)
    encoded: dict[str, str]

    def __new__(cls, encoded: dict[str, str]) -> _ForeignKey:
        key = super().__new__(cls, encoded["repr"])
        key.encoded = encoded
        return key


def path_id(path: Path) -> PathId:
    """Returns what two paths share if and only if they are the same: it matches a target's leaves with a checkpoint's.

    A path of text and integers is its own id.  A path with other keys gets a text, because to Python `1`, `1.0` and
    `True` are equal.
    """
    for key in path:
        if type(key) is not str and type(key) is not int:
            return _ENCODER.encode(encode_path(path))
    return path


_ENCODER = json.JSONEncoder(sort_keys=True)


class OrbaxKeys:
    """Gives each path a key of its own in Orbax's tree: `("layers", "0", "kernel")`.

    No two paths get keys that Orbax would write the same way, and no array's key is a prefix of another's.
    """

    def __init__(self) -> None:
        self._texts: dict[tuple[tuple[str, ...], str], str] = {}  # from a node and a child's id to its text
        self._taken: set[tuple[str, ...]] = set()

    def key(self, path: Path) -> tuple[str, ...]:
        """Returns the key of a path; the same path gets the same key."""
        return self._below((), ((_ENCODER.encode(_encode(part, path)), str(part)) for part in path or ("",)))

    def apart(self, root: str, *parts: str) -> tuple[str, ...]:
        """Returns a key for something other than a leaf: below a root that no path of a model can have."""
        return self._below((), [(f"not a path: {root}", root), *((part, part) for part in parts)])

    def _below(self, node: tuple[str, ...], parts: Iterable[tuple[str, str]]) -> tuple[str, ...]:
        for identity, name in parts:
            node += (self._child(node, identity, name),)
        return node

    def _child(self, node: tuple[str, ...], identity: str, name: str) -> str:
        if (node, identity) not in self._texts:
            plain = _escaped(name)
            # Another child may have this name, "0" beside 0: then the next is "0#2".
            texts = itertools.chain([plain], (f"{plain}#{number}" for number in itertools.count(2)))
            text = next(text for text in texts if (*node, text) not in self._taken)
            self._taken.add((*node, text))
            self._texts[node, identity] = text
        return self._texts[node, identity]


def _escaped(text: str) -> str:
    escaped = text.replace("%", "%25").replace(".", "%2E").replace("/", "%2F")
    return "".join(c if c.isprintable() else f"%u{ord(c):04X}" for c in escaped) or "%"


def is_utf8(text: str) -> bool:
    """Returns whether text can be encoded as UTF-8: it has no surrogates, which stand for undecodable bytes."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


# --- types -----------------------------------------------------------------------------------------------------


def type_name(cls: type) -> str:
    """Returns a type as `module:qualname`; a type of NNX by its public name, wherever flax defines it."""
    if getattr(nnx, cls.__name__, None) is cls:
        return f"flax.nnx:{cls.__name__}"
    return "jax:Array" if cls is jax.Array else f"{cls.__module__}:{cls.__qualname__}"


# --- dtypes ----------------------------------------------------------------------------------------------------


def dtype_name(dtype: Any) -> str:
    """Returns a dtype's name; for PRNG keys `key`."""
    return "key" if jnp.issubdtype(dtype, jax.dtypes.extended) else str(np.dtype(dtype))


@functools.lru_cache(maxsize=64)
def dtype_of(name: str) -> np.dtype | None:
    """Returns the dtype with a name; None if there is none."""
    known = name in np.sctypeDict or (name.isidentifier() and hasattr(jnp, name))
    try:
        dtype = jnp.dtype(name) if known else None
    except TypeError:
        return None
    # What a manifest names has to be numbers: no Python objects, text, dates or records.
    plain = dtype is not None and not dtype.hasobject and dtype.kind not in "USMm" and dtype.names is None
    return dtype if plain else None


@functools.lru_cache(maxsize=64)
def prng_of(dtype: Any) -> str | None:
    """Returns the name of the PRNG implementation of a key dtype; None for any other dtype."""
    if not jnp.issubdtype(dtype, jax.dtypes.extended):
        return None
    names: list[str] = []

    # JAX reports the implementation of an array of keys alone, so an abstract one is made.
    def note(key: jax.Array) -> jax.Array:
        names.append(str(jax.random.key_impl(key)))
        return jax.random.key_data(key)

    jax.eval_shape(note, jax.ShapeDtypeStruct((), dtype))
    return names[0]


def words_of(array: Any) -> np.ndarray:
    """Returns an array on the host; PRNG keys as their words."""
    return np.asarray(jax.random.key_data(array) if jnp.issubdtype(array.dtype, jax.dtypes.prng_key) else array)
