"""Arrays into Orbax's tree: the small ones all at once, where this process holds all there is.

Orbax waits for each array on its own, in an event loop: for a thousand small ones, that is nine tenths of the time.
Here TensorStore, which stores Orbax's arrays, is asked for a thousand of them at once, and told to commit them as one.
What stands on disk afterwards is what Orbax writes: each array under its own path, with the specification that Orbax
gives it.  Large arrays, and all where several processes write, are left to Orbax.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read postponed ones of a NamedTuple.

import base64
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

# Arrays up to this many bytes are small: above it Orbax takes no longer.
_SMALL = 1 << 24
# Bytes that are committed together: a commit holds them all, and writes the database's index anew.
_AT_ONCE = 1 << 28
# Where Orbax keeps how each array lay on its devices: JSON, by the URL-safe base64 of the array's name.
_SHARDINGS = "_sharding"

# Starts to write arrays (values, their infos, their arguments); gives what can be waited for.
Serialize = Callable[[Sequence[Any], Sequence[Any], Sequence[Any]], Awaitable[Sequence[Any]]]


def tree_handler(**options: Any) -> ocp.PyTreeCheckpointHandler:
    """Orbax's handler, without compression: weights hardly shrink, and compressing them takes most of the time."""
    return ocp.PyTreeCheckpointHandler(use_compression=False, **options)


def writing_handler() -> ocp.PyTreeCheckpointHandler:
    """The same, to write a tree that has nothing but arrays in it, JAX's and NumPy's."""
    if jax.process_count() > 1:
        return tree_handler()
    handlers = (np.ndarray, _NumpyArrays()), (jax.Array, _Arrays())
    registry = ocp.type_handlers.create_type_handler_registry(*handlers)
    return tree_handler(type_handler_registry=registry)


class _Arrays(ocp.type_handlers.ArrayHandler):
    """Orbax's handler for JAX's arrays; small ones are written together."""

    def __init__(self) -> None:
        super().__init__(enable_write_sharding_file=False)  # it is written here, at once for all arrays

    async def serialize(
        self, values: Sequence[jax.Array], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[Any]:
        """Starts to write arrays, each by the name in its info."""
        shardings = {info.name: value.sharding for info, value in zip(infos, values, strict=True)}

        def finish() -> None:
            _write_shardings(infos[0].parent_dir, shardings)

        return await _begin(super().serialize, values, infos, args, finish)


class _NumpyArrays(ocp.type_handlers.NumpyHandler):
    """Orbax's handler for NumPy's arrays; small ones are written together."""

    async def serialize(
        self, values: Sequence[np.ndarray], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[Any]:
        """Starts to write arrays, each by the name in its info."""
        return await _begin(super().serialize, values, infos, args)


class _Array(NamedTuple):
    """An array on its way: what Orbax knows of it, and what it is on the host."""

    info: Any
    arg: Any
    host: np.ndarray | Pieces

    @property
    def nbytes(self) -> int:
        """Its size."""
        return sum(part.nbytes for _, part in self.parts())

    def parts(self) -> tuple[tuple[tuple[int, ...], np.ndarray], ...]:
        """Where each piece begins along each axis, and the piece; all pieces have one shape."""
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
    # Taken hold of before this returns: a later step may donate them.
    small = [_Array(info, arg, held(value)) for value, info, arg in every if value.nbytes <= _SMALL]
    large = [one for one in every if one[0].nbytes > _SMALL]
    begun = list(await by_orbax(*map(list, zip(*large, strict=True)))) if large else []

    async def write() -> None:
        await infos[0].await_path_creation()  # one for all of them
        for group in grouped(small, lambda array: array.nbytes, _AT_ONCE):
            _write_together(group)
        finish()

    return [*begun, ocp.future.CommitFutureAwaitingContractedSignals(write(), name="statewise-arrays")]


def _write_together(arrays: Sequence[_Array]) -> None:
    """Writes arrays and waits for them; either all of them are in the database afterwards, or none."""
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
    """TensorStore's specification of each array: Orbax's, made once for all arrays that differ in their name alone."""
    made: dict[Any, dict[str, Any]] = {}
    for array in arrays:
        whole, (_, part) = array.host.shape, array.parts()[0]
        key = (whole, part.shape, part.dtype)
        if key not in made:
            made[key] = ocp.type_handlers.get_json_tspec_write(
                array.info,
                use_ocdbt=True,
                global_shape=whole,
                local_shape=part.shape,
                dtype=part.dtype,
                process_index=0,
                arg=array.arg,
            )
        spec = made[key]
        yield spec | {"kvstore": spec["kvstore"] | {"path": array.info.name}}


def _write_shardings(folder: Any, shardings: Mapping[str, jax.sharding.Sharding]) -> None:
    texts = {sharding: _text(sharding) for sharding in dict.fromkeys(shardings.values())}
    found = {name: texts[sharding] for name, sharding in shardings.items()}
    keyed = {base64.urlsafe_b64encode(name.encode()).decode(): text for name, text in found.items() if text}
    (folder / _SHARDINGS).write_text(json.dumps(keyed))


def _text(sharding: jax.sharding.Sharding) -> str | None:
    """A sharding as Orbax writes it; None for one that it has no text for."""
    if isinstance(sharding, jax.sharding.NamedSharding):
        return ocp.metadata.NamedShardingMetadata.from_jax_sharding(sharding).to_serialized_string()
    if isinstance(sharding, jax.sharding.SingleDeviceSharding):
        return ocp.metadata.SingleDeviceShardingMetadata.from_jax_sharding(sharding).to_serialized_string()
    return None
