"""Fresh values: what a kind's `restart` takes, and how it is called.

A restart is a function of one array, and, where its signature has parameters of these names, of `key=` and `path=`.

- Without `key` it sees the array as it is, batch axis and all: `jnp.zeros_like`.
- With `key` it sees one slot at a time, without the batch axis: an initializer that reckons with the shape (its fan-in)
  would otherwise take the slots for one more dimension of the weight.  Each slot's key is the given one with the leaf's
  path and the slot's number folded in.  No position is: what is planned beside a leaf does not change its numbers, nor
  do the other slots that are restarted with one.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read postponed ones of a NamedTuple.
import functools
import hashlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from statewise._src.common.paths import Path
from statewise.errors import DeclarationError

__all__ = ["Takes", "check_key", "check_restart", "drawn_value", "fresh_value", "keys_of", "takes"]


class Takes(NamedTuple):
    """What a restart takes beside the array.

    Attributes:
      key: whether it takes a PRNG key.
      path: whether it takes the leaf's path.
    """

    key: bool
    path: bool


@functools.lru_cache(maxsize=1024)
def takes(restart: Any) -> Takes:
    """What a restart takes beside the array; of None, and of a function without a signature, nothing."""
    signature = _signature(restart)
    if signature is None:
        return Takes(False, False)
    # What a partial has bound is not asked for again.  The first parameter is the array, whatever its name.
    bound = frozenset(restart.keywords) if isinstance(restart, functools.partial) else frozenset()
    named = {
        name
        for at, (name, parameter) in enumerate(signature.parameters.items())
        if parameter.kind is parameter.KEYWORD_ONLY or (at > 0 and parameter.kind is parameter.POSITIONAL_OR_KEYWORD)
    } - bound
    return Takes("key" in named, "path" in named)


def _signature(restart: Any) -> inspect.Signature | None:
    try:
        return inspect.signature(restart) if callable(restart) else None
    except (ValueError, TypeError):  # written in C: it has none
        return None


def check_restart(restart: Any, kind: str) -> None:
    """Raises where a function cannot be called with one array, and with key and path if it takes them.

    Args:
      restart: the function.
      kind: the filter of its kind, as code.

    Raises:
      DeclarationError: it cannot; the initializers of `jax.nn` are told how to.
    """
    signature = _signature(restart)
    if signature is None:
        return
    wants = takes(restart)
    try:
        signature.bind(None, **{name: None for name in wants._fields if getattr(wants, name)})
    except TypeError as error:
        name = getattr(restart, "__name__", type(restart).__name__)
        parameters = list(signature.parameters)
        if parameters[:2] == ["key", "shape"]:  # as jax.nn.initializers make them
            made, hint = (
                f"lambda array, key: {name if name.isidentifier() else 'init'}(key, array.shape, array.dtype)",
                "",
            )
            message = f"restart={name} is an initializer, of (key, shape, dtype), not a function of one array."
        else:
            made, hint = "lambda array, key, path: ...", "  # key, path: where needed"
            message = f"restart={name} cannot be called with one array, and key= and path= by name: {error}."
        raise DeclarationError(message, hint=f"sw.Kind({kind}, restart={made}){hint}") from None


def check_key(key: Any) -> Any:
    """The key that restarts draw from, or an error for anything that is not one PRNG key.

    Raises:
      DeclarationError: something else than a key, or several.
    """
    # Asked of its type first: an nnx.Rngs has any attribute that one asks it for.
    is_array = isinstance(key, jax.Array | np.ndarray)
    if is_array and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ():
        return key
    if is_array and key.dtype == jnp.uint32 and key.shape == jax.eval_shape(lambda: jax.random.PRNGKey(0)).shape:
        return key
    given = f"{key.dtype}{list(key.shape)}" if is_array else type(key).__name__
    raise DeclarationError(
        f"key= must be one PRNG key, from which each leaf and each slot gets its own, not {given}.",
        hint="key=jax.random.key(0)",
    )


def fresh_value(
    restart: Callable[..., Any],
    array: Any,
    path: Path,
    each: bool = False,
    as_array: Callable[[Any], Any] = jnp.asarray,
) -> Any:
    """A fresh value of one array, by a restart that takes no key.

    Args:
      restart: the kind's function.
      array: the value of now.
      path: the path of its leaf.
      each: whether there is a leading axis, one value for each device.
      as_array: makes an array of JAX of what the function gives.
    """
    function = _told(restart, path)

    def made(array: Any) -> Any:
        return as_array(function(array))

    return (jax.vmap(made) if each else made)(array)


def _told(restart: Callable[..., Any], path: Path) -> Callable[..., Any]:
    return functools.partial(restart, path=path) if takes(restart).path else restart


def drawn_value(
    restart: Callable[..., Any],
    array: Any,
    path: Path,
    keys: Any,
    axis: int | None = None,
    each: bool = False,
    as_array: Callable[[Any], Any] = jnp.asarray,
) -> Any:
    """A fresh value of one array, by a restart that takes a key: slot by slot.

    Args:
      restart: the kind's function.
      array: the value of now.
      path: the path of its leaf.
      keys: the array's keys, one for each slot, those of the first device first.
      axis: the axis of the slots; None where the array is one.
      each: whether there is a leading axis, one value for each device.
      as_array: makes an array of JAX of what the function gives.
    """
    function = _told(restart, path)

    def on_slot(array: Any, key: Any) -> Any:
        return as_array(function(array, key=key))

    def on_device(array: Any, keys: Any) -> Any:
        if axis is None:
            return on_slot(array, keys[0])
        made = jax.vmap(on_slot, (axis % array.ndim, 0))(array, _laid_along(keys, array, axis % array.ndim))
        # Of another rank it is refused anyway, and has perhaps no such axis.
        return jnp.moveaxis(made, 0, axis) if made.ndim == array.ndim else made

    if not each:
        return on_device(array, keys)
    return jax.vmap(on_device)(array, _laid_along(keys.reshape(array.shape[0], -1, *keys.shape[1:]), array, 0))


def _laid_along(keys: Any, array: Any, axis: int) -> Any:
    """Keys split over the devices as an axis of an array is: `jax.vmap` asks for it where mesh axes are explicit."""
    sharding = getattr(jax.typeof(array), "sharding", None)
    spec = sharding.spec if isinstance(sharding, jax.NamedSharding) else ()
    if axis >= len(spec) or spec[axis] is None:
        return keys
    assert isinstance(sharding, jax.NamedSharding)
    return jax.reshard(keys, jax.NamedSharding(sharding.mesh, jax.P(spec[axis])))


def keys_of(key: Any, paths: Sequence[Path], slots: int) -> Any:
    """A key for each array and slot: the given one, with the array's path and the slot's number folded in.

    Args:
      key: the given one, typed or of the old make; those that come back are like it.
      paths: the path of each array.
      slots: the largest number of slots.
    """
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    base = key if typed else jax.random.wrap_key_data(jnp.asarray(key))
    # All at once: hundreds of single folds would take minutes to compile.  Where JAX draws for a batch from its first
    # key (unsafe_rbg), a fold would depend on what it is batched with: there it is one after the other.
    each: Any = jax.lax.map if "urbg" in str(base.dtype) else lambda fold, over: jax.vmap(fold)(over)

    def of_path(words: Any) -> Any:
        # Two words: by one of 32 bits, two of 20,000 leaves would have the same in one plan of twenty.
        own = jax.random.fold_in(jax.random.fold_in(base, words[0]), words[1])
        return each(lambda number: jax.random.fold_in(own, number), jnp.arange(slots, dtype=jnp.uint32))

    made = each(of_path, np.array([_words_of(path) for path in paths], np.uint32).reshape(-1, 2))
    return made if typed else jax.random.key_data(made)


def _words_of(path: Path) -> tuple[int, int]:
    # By type as well: the key 0 of a list and the attribute "0" are two.
    spelled = "".join(f"{type(key).__name__}:{len(str(key))}:{key}/" for key in path)
    digest = hashlib.blake2b(spelled.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
