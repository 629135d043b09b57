"""The values that `update` writes: those passed, as the JAX arrays that the model holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from statewise._src.common.narrowing import check_given
from statewise._src.common.nnx_graph import arrays_of, raw_value, row_of, value_of
from statewise._src.common.paths import Path

__all__ = ["fresh_values"]


def fresh_values(given: Mapping[Path, Any], live: Mapping[Path, Any]) -> Iterator[tuple[Path, Any, Any]]:
    """Yields the path, leaf and new value of each: a NumPy array or a number becomes a JAX array if the model has one.

    Raises:
      StructureError: numbers that casting to the leaf's dtype would lose; all the leaves.
    """
    values = {path: (*arrays_of(raw_value(leaf)), arrays_of(raw_value(live[path]))[0]) for path, leaf in given.items()}
    check_given(
        (row_of(path, live[path]), new, old.dtype)
        for path, (arrays, _, old_arrays) in values.items()
        for new, old in zip(arrays, old_arrays, strict=True)
        if _becomes_jax(new, old)
    )
    for path, (arrays, structure, old_arrays) in values.items():
        fresh = [
            jnp.asarray(new, dtype=old.dtype) if _becomes_jax(new, old) else new
            for new, old in zip(arrays, old_arrays, strict=True)
        ]
        yield path, live[path], value_of(fresh, structure)


def _becomes_jax(new: Any, old: Any) -> bool:
    return isinstance(old, jax.Array) and not isinstance(new, jax.Array)
