"""Microbatches: a train step that runs its function on one part of the batch after another.

The function is traced once, for one part.  A loop runs it on every part: gradients, and the loss, are summed in at
least 32 bits; what the function writes is carried from part to part; every other output is stacked.  So the arrays that
the backward pass needs exist for one part at a time.

Part `i` of `n` holds the rows `i * size` to `(i + 1) * size` of each array.  An array that is sharded along its rows
keeps its rows on all devices in every part: it is resharded once, before the loop.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read a NamedTuple's postponed annotations.
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from statewise._src.common import compat
from statewise._src.common.paths import plain_key
from statewise._src.plan.placements import axes_of
from statewise._src.sharding.explicit_axes import as_it_came, explicit_sharding
from statewise._src.step.arguments import with_shape
from statewise._src.step.nonfinite import everywhere
from statewise._src.step.training import Training
from statewise.errors import StructureError

__all__ = ["Batch", "Mean", "PartResult", "mean_of_parts", "split_arguments"]


class Batch(NamedTuple):
    """How the arrays among a step's arguments are split into parts, in their order.

    Attributes:
      parts: the number of parts.
      split: which arrays are split; the others are passed whole.
      shardings: the sharding of the stacked parts of an array; None leaves it to XLA.
    """

    parts: int
    split: tuple[bool, ...]
    shardings: tuple[Any, ...]

    def stacked(self, leaves: Sequence[Any]) -> list[Any]:
        """Returns the arrays that are split, with the parts along a new first axis."""
        return [
            _stacked(leaf, self.parts, sharding)
            for leaf, is_split, sharding in zip(leaves, self.split, self.shardings, strict=True)
            if is_split
        ]

    def merged(self, leaves: Sequence[Any], part: Sequence[Any]) -> list[Any]:
        """Returns the arguments of one part, from all arrays and those of the part."""
        own = iter(part)
        return [next(own) if is_split else leaf for leaf, is_split in zip(leaves, self.split, strict=True)]


def _stacked(leaf: Any, count: int, sharding: Any) -> Any:
    shape = (count, leaf.shape[0] // count, *leaf.shape[1:])
    if sharding is None:
        return jnp.reshape(leaf, shape)
    if _is_explicit(sharding):
        return jax.lax.reshape(leaf, shape, out_sharding=sharding)
    return jax.lax.with_sharding_constraint(jnp.reshape(leaf, shape), sharding)


def _is_explicit(sharding: Any) -> bool:
    return jax.sharding.AxisType.Explicit in sharding.mesh.axis_types


def split_arguments(
    training: Training, args: Any, kwargs: Any, name_of: Callable[[Any], str], step: str
) -> tuple[Any, Any, Batch]:
    """Returns the arguments of one part, by shape and dtype, and how the batch is split; whole arguments unchanged.

    Args:
      training: the options of the step.
      args: its positional arguments.
      kwargs: its keyword arguments.
      name_of: returns an argument's name, given its name or its position.
      step: the step's name.

    Raises:
      StructureError: there is no array to split; the first axis of some does not divide by the number of parts.
    """
    count = training.microbatches
    keyed, structure = jax.tree_util.tree_flatten_with_path((args, kwargs))
    parts, split, shardings = [], [], []
    uneven: dict[str, str] = {}  # each array, with the name of its argument
    for keys, leaf in keyed:
        name, shape = name_of(plain_key(keys[1])), tuple(getattr(leaf, "shape", ()))
        split.append(bool(shape) and name not in training.whole)
        shardings.append(_sharding(leaf, count) if split[-1] else None)
        if not split[-1]:
            parts.append(leaf)
            continue
        if shape[0] % count:
            uneven[f"{name}{jax.tree_util.keystr(keys[2:])} of shape {shape}"] = name
        parts.append(with_shape(leaf, (shape[0] // count, *shape[1:])))
    if not any(split):
        raise StructureError(
            f"{step} runs in {count} microbatches, and no argument is an array that could be split.",
            hint=f"pass the batch as arguments: state, loss = {step}(state, x, y)\nor leave microbatches out",
        )
    if uneven:
        name = next(iter(uneven.values()))
        raise StructureError(
            f"{step} splits its arguments into {count} microbatches, and the first axis does not divide by {count} in "
            f"{'; '.join(uneven)}.",
            hint=f"a batch whose size is a multiple of {count}\nor pass the argument whole: whole_argnames={name!r}",
        )
    args, kwargs = jax.tree.unflatten(structure, parts)
    return args, kwargs, Batch(count, tuple(split), tuple(shardings))


def _sharding(leaf: Any, count: int) -> Any:
    """Returns the sharding of an array's stacked parts: the rows of each part on the devices of the array's rows."""
    sharding = explicit_sharding(leaf) if isinstance(leaf, compat.Tracer) else getattr(leaf, "sharding", None)
    if not isinstance(sharding, jax.NamedSharding) or not sharding.spec or sharding.spec[0] is None:
        return None
    devices = math.prod(sharding.mesh.shape[name] for name in axes_of(sharding.spec[0]))
    if leaf.shape[0] % (count * devices):
        return None if not _is_explicit(sharding) else jax.NamedSharding(sharding.mesh, jax.P())
    return jax.NamedSharding(sharding.mesh, jax.P(None, *sharding.spec))


class Mean(NamedTuple):
    """What a train step knows of its batch after all parts.

    Attributes:
      outputs: the loss, which is the mean over the parts, and the other outputs, stacked where the batch was split.
      written: the arrays that the function wrote, after the last part.
      grads: the mean gradients, by number.
      is_valid: whether the weights are at least zero, and their sum is larger and finite.
    """

    outputs: list[Any]
    written: list[Any]
    grads: dict[int, Any]
    is_valid: Any


class _Sums(NamedTuple):
    """What the loop over the parts carries: sums with the parts' weights, and what the function wrote."""

    loss: Any
    grads: dict[int, Any]
    weight: Any
    is_valid: Any
    written: list[Any]


# The outputs of one part, the arrays that it wrote, and the gradients by number.
PartResult = tuple[list[Any], list[Any], dict[int, Any]]
# From the arrays that the function writes, as the part finds them, and the part's arguments.
Part = Callable[[Sequence[Any], Sequence[Any]], PartResult]


def mean_of_parts(
    training: Training,
    batch: Batch | None,
    leaves: Sequence[Any],
    written: Sequence[Any],
    wrt: dict[int, Any],
    run: Part,
    dtype: Any,
    axes: tuple[str, ...] = (),
) -> Mean:
    """Runs a function on all parts of a batch, or on the complete batch if it is not split.

    Args:
      training: the options of the step.
      batch: how the arguments are split; None if they are not.
      leaves: the arrays among the arguments.
      written: the arrays that the function writes, as they are before.
      wrt: the arrays that it is differentiated with respect to, by number.
      run: runs one part.
      dtype: the dtype of the loss.
      axes: the mesh axes over whose devices the mean is taken as well.
    """

    def add(sums: _Sums, part: Sequence[Any]) -> tuple[_Sums, list[Any]]:
        own = leaves if batch is None else batch.merged(leaves, part)
        (loss, *others), new, grads = run(sums.written, own)
        weight = jnp.ones((), sums.weight.dtype)
        if training.weighted:
            # At least 32 bits: a bfloat16 cannot count the tokens of a batch.
            weight, others = others[0].astype(sums.weight.dtype), others[1:]

        def share(array: Any, dtype: Any) -> Any:
            product = (weight * array).astype(dtype)
            # The mean of a part without tokens is 0 / 0, and must not count.
            return jnp.where(weight == 0, jnp.zeros_like(product), product) if training.weighted else product

        after = _Sums(
            loss=sums.loss + share(loss.astype(sums.loss.dtype), sums.loss.dtype),
            grads={number: total + share(grads[number], total.dtype) for number, total in sums.grads.items()},
            weight=sums.weight + weight,
            is_valid=sums.is_valid & (weight >= 0),
            written=list(map(_of_same_type, new, sums.written)),
        )
        return after, others

    zero = jnp.zeros((), _wide(dtype))
    zeros = {number: jnp.zeros_like(array, dtype=_wide(array.dtype)) for number, array in wrt.items()}
    sums = _Sums(zero, zeros, zero, jnp.ones((), bool), list(written))
    if batch is None:
        sums, others = add(sums, ())
    else:
        sums, others = jax.lax.scan(add, sums, batch.stacked(leaves))
    loss, grads, weight, is_valid = sums[:4]
    if axes:
        loss, grads, weight = jax.lax.psum((loss, grads, weight), axes)
    is_valid = everywhere(is_valid, axes) & (weight > 0) & jnp.isfinite(weight)
    mean = jnp.where(is_valid, loss / weight, jnp.nan).astype(dtype)
    means = {number: (total / weight.astype(total.dtype)).astype(wrt[number].dtype) for number, total in grads.items()}
    return Mean([mean, *others], sums.written, means, is_valid)


def _of_same_type(new: Any, old: Any) -> Any:
    """Returns a written array with exactly the type of the one before it, as a loop needs it: not weakly typed."""
    if not jnp.issubdtype(old.dtype, jax.dtypes.extended):
        new = jax.lax.convert_element_type(new, old.dtype)
    return as_it_came(new, old)


def _wide(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)
