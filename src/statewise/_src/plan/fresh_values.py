"""Fresh values: what a kind's `restart` receives, and how it is called.

A restart is a function of one array and, if its signature has parameters of these names, of `key=` and `path=`.

- Without `key` it receives the array as it is, with the batch axis: `jnp.zeros_like`.
- With `key` it receives one slot at a time, without the batch axis: an initializer that depends on the shape (its
  fan-in) would otherwise take the slots for one more dimension of the weight.  The key of each slot is the given key
  with the leaf's path and the slot's number folded in.  Positions are not: the values of a leaf do not depend on what
  else is planned, nor on which other slots are restarted in the same call.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read a NamedTuple's postponed annotations.
import functools
import hashlib
import inspect
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from statewise._src.common.narrowing import as_jax
from statewise._src.common.paths import Leaf, Path
from statewise._src.common.problems import Problems
from statewise.errors import DeclarationError, StatewiseError

__all__ = ["Takes", "check_kept", "check_key", "check_restart", "fresh_value", "fresh_values", "keys_of", "takes"]


class Takes(NamedTuple):
    """The parameters that a restart has besides the array.

    Attributes:
      key: whether it takes a PRNG key.
      path: whether it takes the leaf's path.
    """

    key: bool
    path: bool


@functools.lru_cache(maxsize=1024)
def takes(restart: Any) -> Takes:
    """Returns what a restart takes besides the array: nothing for None, and for a function without a signature."""
    signature = _signature(restart)
    if signature is None:
        return Takes(False, False)
    # Names that a partial has bound are not passed again.  The first parameter is the array, whatever its name.
    bound = frozenset(restart.keywords) if isinstance(restart, functools.partial) else frozenset()
    names = {
        name
        for index, (name, parameter) in enumerate(signature.parameters.items())
        if parameter.kind is parameter.KEYWORD_ONLY or (index and parameter.kind is parameter.POSITIONAL_OR_KEYWORD)
    } - bound
    return Takes("key" in names, "path" in names)


def _signature(restart: Any) -> inspect.Signature | None:
    try:
        return inspect.signature(restart) if callable(restart) else None
    except (ValueError, TypeError):  # a function that is written in C has none
        return None


def check_restart(restart: Any, kind: str) -> None:
    """Checks that a restart is a function of one array, and of key and path if it takes them.

    Args:
      restart: what was declared.
      kind: the filter of its kind, as code.

    Raises:
      DeclarationError: it is not, or cannot be hashed; for an initializer of `jax.nn` the hint shows how.
    """
    if not callable(restart):
        raise DeclarationError(
            f"restart={restart!r} is not a function of one array.", hint=f"sw.Kind({kind}, restart=jnp.zeros_like)"
        )
    if not isinstance(restart, Hashable):
        raise DeclarationError(
            f"restart={type(restart).__name__}(...) cannot be hashed, as every part of a declaration must be.",
            hint=f"sw.Kind({kind}, restart=lambda array: ...)",
        )
    signature = _signature(restart)
    if signature is None:
        return
    wants = takes(restart)
    try:
        signature.bind(None, **{name: None for name in wants._fields if getattr(wants, name)})
    except TypeError as error:
        name = getattr(restart, "__name__", type(restart).__name__)
        if list(signature.parameters)[:2] == ["key", "shape"]:  # as jax.nn.initializers make them
            function = name if name.isidentifier() else "init"
            hint = f"sw.Kind({kind}, restart=lambda array, key: {function}(key, array.shape, array.dtype))"
            message = f"restart={name} is an initializer, of (key, shape, dtype), not a function of one array."
        else:
            hint = f"sw.Kind({kind}, restart=lambda array, key, path: ...)  # key, path: where needed"
            message = f"restart={name} cannot be called with one array, and key= and path= by name: {error}."
        raise DeclarationError(message, hint=hint) from None


def check_key(key: Any) -> Any:
    """Returns the key that restarts draw from.

    Raises:
      DeclarationError: it is not one PRNG key.
    """
    # The type is checked first: an nnx.Rngs claims to have any attribute.
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


def check_kept(problems: Problems, error: type[StatewiseError]) -> None:
    """Checks that fresh values have the shapes and dtypes of those that they replace.

    Args:
      problems: the leaves that `add_change` found; none if all is well.
      error: the class of the error.
    """
    kinds = ", ".join(dict.fromkeys(repr(leaf.kind) for leaf in problems.leaves))
    problems.raise_as(
        error,
        f"The restart of kind {kinds} changes shapes or dtypes.",
        "restart=jnp.zeros_like, or any function that keeps shape and dtype",
    )


def fresh_values(
    restart: Callable[..., Any],
    arrays: Sequence[Any],
    leaves: Sequence[Leaf],
    keys: Any,
    axis: int | None,
    each: bool,
    lost: list[Leaf],
) -> list[Any]:
    """Returns fresh values of arrays that have one type.

    With keys, one loop draws all of them if the restart does not depend on the path.  XLA takes about a second to
    compile the random numbers of one key, and would do it again for each array.

    Args:
      restart: the kind's function.
      arrays: the current values.
      leaves: their leaves.
      keys: for each array a row of keys, one for each slot, those of the first device first; None if it takes none.
      axis: the axis of the slots; None if an array is one slot.
      each: whether there is a leading axis, with one value for each device.
      lost: gets the leaves for which the restart returns numbers that JAX's dtypes do not have.
    """
    if keys is None:
        return [
            fresh_value(restart, array, leaf.path, each, functools.partial(as_jax, leaf, lost=lost))
            for array, leaf in zip(arrays, leaves, strict=True)
        ]
    if len(arrays) > 1 and not takes(restart).path:
        narrowed: list[Leaf] = []
        as_array = functools.partial(as_jax, leaves[0], lost=narrowed)

        def draw(given: tuple[Any, Any]) -> Any:
            array, keys = given
            return _drawn_value(restart, array, leaves[0].path, keys, axis, each, as_array)

        together = jax.lax.map(draw, (jnp.stack(arrays), keys))
        if not narrowed:  # otherwise each leaf is reported
            return list(together)
    return [
        _drawn_value(restart, array, leaf.path, own, axis, each, functools.partial(as_jax, leaf, lost=lost))
        for array, leaf, own in zip(arrays, leaves, keys, strict=True)
    ]


def fresh_value(restart: Callable[..., Any], array: Any, path: Path, each: bool, as_array: Callable[[Any], Any]) -> Any:
    """Returns a fresh value of one array, from a restart that takes no key.

    Args:
      restart: the kind's function.
      array: the current value.
      path: the path of its leaf.
      each: whether there is a leading axis, with one value for each device.
      as_array: converts the function's result to a JAX array.
    """
    function = _with_path(restart, path)

    def on_device(array: Any) -> Any:
        return as_array(function(array))

    return (jax.vmap(on_device) if each else on_device)(array)


def _with_path(restart: Callable[..., Any], path: Path) -> Callable[..., Any]:
    return functools.partial(restart, path=path) if takes(restart).path else restart


def _drawn_value(
    restart: Callable[..., Any],
    array: Any,
    path: Path,
    keys: Any,
    axis: int | None,
    each: bool,
    as_array: Callable[[Any], Any],
) -> Any:
    """Returns a fresh value of one array, slot by slot, from a restart that takes a key.

    Args:
      restart: the kind's function.
      array: the current value.
      path: the path of its leaf.
      keys: the array's keys, one for each slot, those of the first device first.
      axis: the axis of the slots; None if the array is one slot.
      each: whether there is a leading axis, with one value for each device.
      as_array: converts the function's result to a JAX array.
    """
    function = _with_path(restart, path)

    def on_slot(array: Any, key: Any) -> Any:
        return as_array(function(array, key=key))

    def on_device(array: Any, keys: Any) -> Any:
        if axis is None:
            return on_slot(array, keys[0])
        fresh = jax.vmap(on_slot, (axis % array.ndim, 0))(array, _sharded_like(array, axis % array.ndim, keys))
        # A result of another rank is an error that the caller reports; it may not have this axis at all.
        return jnp.moveaxis(fresh, 0, axis) if fresh.ndim == array.ndim else fresh

    if not each:
        return on_device(array, keys)
    return jax.vmap(on_device)(array, _sharded_like(array, 0, keys.reshape(array.shape[0], -1, *keys.shape[1:])))


def _sharded_like(array: Any, axis: int, keys: Any) -> Any:
    """Shards keys as an axis of an array is sharded: `jax.vmap` requires that if mesh axes are explicit."""
    sharding = getattr(jax.typeof(array), "sharding", None)
    if not isinstance(sharding, jax.NamedSharding) or axis >= len(sharding.spec) or sharding.spec[axis] is None:
        return keys
    return jax.reshard(keys, jax.NamedSharding(sharding.mesh, jax.P(sharding.spec[axis])))


def keys_of(key: Any, paths: Sequence[Path], slots: int) -> Any:
    """Returns a key for each array and slot: the given key with the array's path and the slot's number folded in.

    Args:
      key: the given key, typed or raw (uint32); the returned keys are of the same sort.
      paths: the path of each array.
      slots: the largest number of slots.
    """
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    base = key if typed else jax.random.wrap_key_data(jnp.asarray(key))
    # All folds in one vmap: hundreds of separate ones would take minutes to compile.  But an implementation that draws
    # for a batch from its first key (unsafe_rbg) would fold in the rest of the batch; there the folds are a loop.
    each: Any = jax.lax.map if "urbg" in str(base.dtype) else lambda fold, over: jax.vmap(fold)(over)

    def of_path(words: Any) -> Any:
        # Two words: of 20,000 leaves, two would have the same 32-bit word in one plan out of twenty.
        own = jax.random.fold_in(jax.random.fold_in(base, words[0]), words[1])
        return each(lambda number: jax.random.fold_in(own, number), jnp.arange(slots, dtype=jnp.uint32))

    keys = each(of_path, np.array([_words_of(path) for path in paths], np.uint32).reshape(-1, 2))
    return keys if typed else jax.random.key_data(keys)


def _words_of(path: Path) -> tuple[int, int]:
    """Returns a path's hash, which is the same in every process, as two words of 32 bits."""
    # With the type of each key: position 0 in a list and an attribute named "0" are different keys.
    text = "".join(f"{type(key).__name__}:{len(str(key))}:{key}/" for key in path)
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
