"""Writing arrays to Orbax's tree: the small ones all together, if this process has all of them.

Orbax waits for each array on its own, in an event loop: for a thousand small ones, that is nine tenths of the time.
Here TensorStore, which stores Orbax's arrays, gets a thousand of them at the same time, and commits them as one.  What
is on disk afterwards is what Orbax writes: each array under its own path, with Orbax's specification.  Large arrays are
left to Orbax, and all arrays if several processes write.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read postponed ones of a NamedTuple.

import base64
import functools
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from statewise._src.checkpoint.format.checksums import Pieces, held
from statewise._src.checkpoint.orbax.batching import grouped

__all__ = ["tree_handler", "writing_handler"]

# Arrays up to this many bytes are small: for larger ones Orbax takes no longer.
_SMALL = 1 << 24
# The number of bytes committed together: a commit holds them all, and rewrites the database's index.
_AT_ONCE = 1 << 28
# Orbax's file with the shardings of the arrays: JSON, by the URL-safe base64 of the array's name.
_SHARDINGS = "_sharding"

# Starts to write arrays (values, their infos, their arguments); returns futures to wait for.
Serialize = Callable[[Sequence[Any], Sequence[Any], Sequence[Any]], Awaitable[Sequence[Any]]]


def tree_handler(**options: Any) -> ocp.PyTreeCheckpointHandler:
    """Makes Orbax's handler, without compression: weights hardly shrink, and it takes most of the time."""
    return ocp.PyTreeCheckpointHandler(use_compression=False, **options)


def writing_handler() -> ocp.PyTreeCheckpointHandler:
    """Makes the same for writing a tree that contains only JAX's and NumPy's arrays."""
    if jax.process_count() > 1:
        return tree_handler()
    handlers = (np.ndarray, _NumpyArrays()), (jax.Array, _Arrays())
    registry = ocp.type_handlers.create_type_handler_registry(*handlers)
    return tree_handler(type_handler_registry=registry)


class _Arrays(ocp.type_handlers.ArrayHandler):
    """Orbax's handler for JAX's arrays; small ones are written together."""

    def __init__(self) -> None:
        super().__init__(enable_write_sharding_file=False)  # `finish` writes it for all arrays together

    async def serialize(
        self, values: Sequence[jax.Array], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[Any]:
        """Starts to write arrays, each by the name in its info."""
        shardings = {info.name: value.sharding for info, value in zip(infos, values, strict=True)}
        finish = functools.partial(_write_shardings, infos[0].parent_dir, shardings)
        return await _begin(super().serialize, values, infos, args, finish)


class _NumpyArrays(ocp.type_handlers.NumpyHandler):
    """Orbax's handler for NumPy's arrays; small ones are written together."""

    async def serialize(
        self, values: Sequence[np.ndarray], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[Any]:
        """Starts to write arrays, each by the name in its info."""
        return await _begin(super().serialize, values, infos, args)


class _Array(NamedTuple):
    """An array to be written: Orbax's information about it, and its values on the host."""

    info: Any
    arg: Any
    host: np.ndarray | Pieces

    @property
    def nbytes(self) -> int:
        """Returns its size in bytes."""
        return sum(part.nbytes for _, part in self.parts())

    def parts(self) -> tuple[tuple[tuple[int, ...], np.ndarray], ...]:
        """Returns for each piece its first index along each axis, and the piece; all pieces have one shape."""
        return self.host.parts if isinstance(self.host, Pieces) else (((0,) * self.host.ndim, self.host),)


async def _begin(
    by_orbax: Serialize,
    values: Sequence[Any],
    infos: Sequence[Any],
    args: Sequence[Any] | None,
    finish: Callable[[], None] = lambda: None,
) -> Sequence[Any]:
    """Starts to write arrays: small ones together, in a thread that also calls `finish`, the others by Orbax."""
    every = list(zip(values, infos, args or [ocp.SaveArgs()] * len(values), strict=True))
    # Their values are taken before this returns, because a later step may donate the arrays.
    small = [_Array(info, arg, held(value)) for value, info, arg in every if value.nbytes <= _SMALL]
    large = [triple for triple in every if triple[0].nbytes > _SMALL]
    started = list(await by_orbax(*map(list, zip(*large, strict=True)))) if large else []

    async def write() -> None:
        await infos[0].await_path_creation()  # all of them have one directory
        for group in grouped(small, lambda array: array.nbytes, _AT_ONCE):
            _write_together(group)
        finish()

    return [*started, ocp.future.CommitFutureAwaitingContractedSignals(write(), name="statewise-arrays")]


def _write_together(arrays: Sequence[_Array]) -> None:
    """Writes arrays and waits for them; afterwards either all of them are in the database, or none."""
    transaction = ts.Transaction(atomic=True)
    opening = [
        ts.open(spec, create=True, open=True, context=array.info.ts_context, transaction=transaction)
        for array, spec in zip(arrays, _specs(arrays), strict=True)
    ]
    writing = []
    for array, future in zip(arrays, opening, strict=True):
        store = future.result()
        for start, part in array.parts():
            place = tuple(slice(first, first + size) for first, size in zip(start, part.shape, strict=True))
            writing.append(store[place].write(part, can_reference_source_data_indefinitely=True))
    for written in writing:
        written.result()
    transaction.commit_sync()


def _specs(arrays: Sequence[_Array]) -> Iterator[dict[str, Any]]:
    """Yields the specification of each array: Orbax's, made once for arrays that differ only in their names."""
    specs: dict[Any, dict[str, Any]] = {}
    for array in arrays:
        shape, (_, part) = array.host.shape, array.parts()[0]
        key = (shape, part.shape, part.dtype)
        if key not in specs:
            specs[key] = ocp.type_handlers.get_json_tspec_write(
                array.info,
                use_ocdbt=True,
                global_shape=shape,
                local_shape=part.shape,
                dtype=part.dtype,
                process_index=0,
                arg=array.arg,
            )
        spec = specs[key]
        yield spec | {"kvstore": spec["kvstore"] | {"path": array.info.name}}


def _write_shardings(folder: Any, shardings: Mapping[str, jax.sharding.Sharding]) -> None:
    # Many arrays have few shardings: each is written as text once.
    texts = {sharding: _text(sharding) for sharding in dict.fromkeys(shardings.values())}
    names = {base64.urlsafe_b64encode(name.encode()).decode(): texts[shardings[name]] for name in shardings}
    (folder / _SHARDINGS).write_text(json.dumps({name: text for name, text in names.items() if text}))


def _text(sharding: jax.sharding.Sharding) -> str | None:
    """Returns a sharding as Orbax writes it; None for one that Orbax has no text for."""
    if isinstance(sharding, jax.sharding.NamedSharding):
        return ocp.metadata.NamedShardingMetadata.from_jax_sharding(sharding).to_serialized_string()
    if isinstance(sharding, jax.sharding.SingleDeviceSharding):
        return ocp.metadata.SingleDeviceShardingMetadata.from_jax_sharding(sharding).to_serialized_string()
    return None
