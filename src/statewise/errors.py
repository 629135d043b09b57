"""Every exception that Statewise raises, and its one category of warnings.

Most damaging failures in state handling are calls that succeed, so Statewise rejects early and completely: an error
collects *every* leaf concerned before it is raised, and its text always has the same three parts, in this order:

1. the fact, in one sentence;
2. the leaves, one a line: path, kind, type, shape and dtype (never an array's values);
3. the hint, as code where possible.

Each part is also an attribute (`message`, `leaves`, `kind`, `hint`), so a program can act on an error without parsing
its text.  Each exception means one thing.  All derive from `StatewiseError`, and from a builtin where a caller would
expect one (in parentheses):

    StatewiseError
    ├── FilterError (TypeError)                    an argument that is not a filter, or fails at a leaf
    ├── DeclarationError (ValueError, KeyError)    a declaration that is invalid, or does not allow a call
    ├── UnclaimedError (ValueError)                leaves that no kind claims
    ├── OverlapError (ValueError)                  leaves that several kinds claim
    ├── StructureError (ValueError)                a model, a state or a function that does not fit its plan
    ├── UndeclaredWriteError (ValueError)          a step that writes a kind without declaring it
    ├── StaleError (ValueError)                    a kind that was made from values that have changed since
    ├── PlacementError (ValueError)                a placement that does not fit its leaf or mesh
    ├── SaveError (OSError)                        a checkpoint that could not be written
    ├── RestoreError (ValueError)                  a checkpoint and a target that do not match
    ├── CorruptedError (ValueError)                a checkpoint that is not what was written
    └── WatchError (AssertionError)                a kind that did not change as expected

    StatewiseWarning (UserWarning)                 a step that runs, but probably does not do what was meant
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

__all__ = [
    "CorruptedError",
    "DeclarationError",
    "FilterError",
    "OverlapError",
    "PlacementError",
    "RestoreError",
    "SaveError",
    "StaleError",
    "StatewiseError",
    "StatewiseWarning",
    "StructureError",
    "UnclaimedError",
    "UndeclaredWriteError",
    "WatchError",
]

_SHOWN = 50


class _Report:
    """The parts of an error or a warning; `StatewiseError` and `StatewiseWarning` document the attributes."""

    def __init__(
        self, message: str, *, leaves: Iterable[Any] = (), kind: str | None = None, hint: str | None = None
    ) -> None:
        self.message = message
        self.leaves = tuple(leaves)
        self.kind = kind
        self.hint = hint
        super().__init__(message)  # type: ignore[call-arg]  # that of the exception

    def __str__(self) -> str:
        lines = [self.message, *(f"  {leaf}" for leaf in self.leaves[:_SHOWN])]
        if len(self.leaves) > _SHOWN:
            lines.append(f"  ... and {len(self.leaves) - _SHOWN} more (all in .leaves)")
        if self.hint:
            first, *rest = self.hint.splitlines()
            lines += [f"  hint: {first}", *(f"        {line}" for line in rest)]
        return "\n".join(lines)

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception is unpickled from its positional arguments, which are the message alone.
        return functools.partial(type(self), leaves=self.leaves, kind=self.kind, hint=self.hint), (self.message,)


class StatewiseError(_Report, Exception):
    """The base of all errors of Statewise.

    Attributes:
      message: the fact, one sentence.
      leaves: the leaves concerned, each with `path`, `kind`, `type`, `shape` and `dtype`.
      kind: the name of the kind concerned, if there is exactly one.
      hint: what to change, as code where possible.

    Example:
      >>> import statewise as sw
      >>> error = sw.StatewiseError("The cache is full.", kind="cache", hint="state.restart('cache')")
      >>> print(error)
      The cache is full.
        hint: state.restart('cache')
      >>> error.kind
      'cache'
    """


class StatewiseWarning(_Report, UserWarning):
    """A step that runs, but probably does not do what was meant; its text has the same parts as an error's.

    Attributes:
      message: the fact, one sentence.
      leaves: the leaves concerned, as in an error.
      kind: the name of the kind concerned, if there is exactly one.
      hint: what to change, as code where possible.

    Example:
      >>> import warnings
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> import statewise as sw
      >>> model = nnx.Dict(hits=nnx.Variable(jnp.array(0)))
      >>> def count(model):
      ...     model.hits[...] += 1
      >>> step = sw.step(lambda model: jax.jit(count)(model), writes="variables")
      >>> with warnings.catch_warnings(record=True) as caught:
      ...     warnings.simplefilter("always")
      ...     _ = step(sw.plan(model).take(model))
      >>> print(caught[0].message.message, caught[0].message.kind)
      <lambda> declares that it writes variables, but never writes it. variables
    """


class FilterError(StatewiseError, TypeError):
    """An argument that is not a filter, such as a number, or a filter that fails at a leaf.

    Example:
      >>> import statewise as sw
      >>> try:
      ...     sw.Path("layers//kernel")
      ... except sw.FilterError as error:
      ...     print(error)
      Path('layers//kernel') has an empty segment.
        hint: sw.Path('layers/kernel')
    """


class DeclarationError(StatewiseError, ValueError, KeyError):
    """A declaration (of kinds, a plan or a step) that is invalid, or that does not allow what a call asks for.

    A bad name, an unknown kind, an optimizer for a frozen kind, a restart of a kind without `restart`.

    Example:
      >>> import statewise as sw
      >>> try:
      ...     sw.Kinds.standard()["gates"]
      ... except sw.DeclarationError as error:
      ...     print(error.message, error.kind)
      There is no kind 'gates'. gates
    """


class UnclaimedError(StatewiseError, ValueError):
    """Leaves that no kind claims.

    Example:
      >>> from flax import nnx
      >>> import statewise as sw
      >>> try:
      ...     sw.Kinds(stats=sw.Kind(nnx.BatchStat)).plan(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
      ... except sw.UnclaimedError as error:
      ...     print(error)
      2 leaves are claimed by no kind.
        bias: Param(3,) float32
        scale: Param(3,) float32
        hint: kinds = kinds | sw.Kinds(param_kind=sw.Kind(sw.Exactly(nnx.Param)))
              or, for all of them at once: kinds = kinds | sw.Kinds(rest=sw.Kind(...))
    """


class OverlapError(StatewiseError, ValueError):
    """Leaves that more than one kind claims.

    Example:
      >>> from flax import nnx
      >>> import statewise as sw
      >>> kinds = sw.Kinds(params=sw.Kind(nnx.Param), lora=sw.Kind(nnx.LoRAParam))
      >>> try:
      ...     kinds.plan(nnx.LoRA(2, 1, 3, rngs=nnx.Rngs(0)))
      ... except sw.OverlapError as error:
      ...     print(error)
      2 leaves are claimed by more than one kind.
        lora_a: LoRAParam(2, 1) float32  (claimed by params and lora)
        lora_b: LoRAParam(1, 3) float32  (claimed by params and lora)
        hint: kinds = kinds.replace(params=sw.Kind(nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))))
    """


class StructureError(StatewiseError, ValueError):
    """Leaves that do not fit: missing, unexpected, of another shape or dtype, donated, or of another plan.

    Example:
      >>> from flax import nnx
      >>> import statewise as sw
      >>> plan = sw.plan(nnx.Linear(2, 3, use_bias=False, rngs=nnx.Rngs(0)))
      >>> try:
      ...     plan.take(nnx.Linear(2, 4, use_bias=False, rngs=nnx.Rngs(0)))
      ... except sw.StructureError as error:
      ...     print(error)
      The model is not what was planned: 1 leaf differs.
        kernel: Param(2, 3) float32  kind=params  (is (2, 4) in the model)
        hint: plan = kinds.plan(model)  # plan the model as it is now
    """


class UndeclaredWriteError(StatewiseError, ValueError):
    """A step that writes a kind without declaring it.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import statewise as sw
      >>> model = nnx.BatchNorm(3, use_bias=False, use_scale=False, rngs=nnx.Rngs(0))
      >>> evaluate = sw.step(lambda model, x: model(x))
      >>> try:
      ...     evaluate(sw.plan(model).take(model), jnp.ones((4, 3)))
      ... except sw.UndeclaredWriteError as error:
      ...     print(error)
      <lambda> writes stats, which it does not declare.
        mean: BatchStat(3,) float32  kind=stats  (written in BatchNorm)
        var: BatchStat(3,) float32  kind=stats  (written in BatchNorm)
        hint: @sw.step(writes=('stats',))
              or, if the function only evaluates: model.eval() as its first line
    """


class StaleError(StatewiseError, ValueError):
    """A step that reads a kind whose `depends_on` have changed since its values were made.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> import statewise as sw
      >>> class Layer(nnx.Module):
      ...     def __init__(self):
      ...         self.scale, self.sum = nnx.Param(jnp.ones(())), nnx.Cache(jnp.zeros(()))
      ...
      ...     def __call__(self, x):
      ...         self.sum[...] += self.scale[...] * x
      ...         return self.sum[...]
      >>> kinds = sw.Kinds(
      ...     params=sw.Kind(nnx.Param),
      ...     cache=sw.Kind(nnx.Cache, saved=False, restart=jnp.zeros_like, depends_on="params"),
      ... )
      >>> decode = sw.step(lambda layer, x: layer(x), writes="cache")
      >>> state, _ = decode(kinds.plan(Layer()).take(Layer()), 1.0)
      >>> state = state.replace(params=jax.tree.map(lambda scale: scale + 1, state["params"]))
      >>> try:
      ...     decode(state, 1.0)
      ... except sw.StaleError as error:
      ...     print(error)
      <lambda> reads cache, which is stale: params has changed since.
        sum: Cache() float32  kind=cache
        hint: state = state.restart('cache')
      >>> state, out = decode(state.restart("cache"), 1.0)
      >>> float(out)
      2.0
    """


class PlacementError(StatewiseError, ValueError):
    """A placement that does not fit its leaf or its mesh.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> import statewise as sw
      >>> kinds = sw.Kinds(params=sw.Kind(nnx.Param, placement=sw.Sharded("data")))
      >>> plan = kinds.plan(nnx.Linear(2, 4, rngs=nnx.Rngs(0)))
      >>> try:
      ...     plan.shardings(jax.sharding.AbstractMesh((4,), ("data",)))
      ... except sw.PlacementError as error:
      ...     print(error.message, error.leaves[0], sep="\\n")
      1 leaf cannot be placed on the mesh (data=4).
      kernel: Param(2, 4) float32  kind=params  (axis 0 of 2 does not divide by (data=4))
    """


class SaveError(StatewiseError, OSError):
    """A checkpoint that could not be written; nothing of it remains.

    Example:
      >>> import tempfile
      >>> from flax import nnx
      >>> import statewise as sw
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> try:
      ...     sw.save(tempfile.gettempdir(), sw.plan(model).take(model))
      ... except sw.SaveError as error:
      ...     print(error.hint)
      another path, or sw.Checkpoints(directory), which keeps a checkpoint for each step
    """


class RestoreError(StatewiseError, ValueError):
    """A checkpoint and a target that do not match.

    Example:
      >>> import statewise as sw
      >>> issubclass(sw.RestoreError, ValueError)
      True
    """


class CorruptedError(StatewiseError, ValueError):
    """A checkpoint on disk that is not what was written.

    Example:
      >>> import statewise as sw
      >>> issubclass(sw.CorruptedError, ValueError)
      True
    """


class WatchError(StatewiseError, AssertionError):
    """Under `sw.watch(..., expect=...)`: an expected kind that did not change, or a frozen one that did.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> import statewise as sw
      >>> model = nnx.Linear(2, 3, use_bias=False, rngs=nnx.Rngs(0))
      >>> @jax.jit
      ... def train(model):
      ...     model.kernel[...] -= 0.1
      >>> try:
      ...     with sw.watch(model, expect="params"):
      ...         train(model)
      ... except sw.WatchError as error:
      ...     print(error)
      Nothing of params changed, although that was expected.
        kernel: Param(2, 3) float32  kind=params  (did not change)
        hint: nnx.jit, or sw.train_step: what a function writes to a model under jax.jit is dropped
              or, watch.compare(model) at the end of the block, if the code returns a new model
    """
