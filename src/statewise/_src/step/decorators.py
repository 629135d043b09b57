"""The decorators that make steps: `@sw.step` and `@sw.train_step`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, Literal, ParamSpec, SupportsIndex, TypeVar, Unpack, overload

from statewise._src.common import compat
from statewise._src.core.plan import State
from statewise._src.plan.tables import PlanTables
from statewise._src.step.arguments import JitOptions
from statewise._src.step.contract import Contract, describe_options, plain_contract, train_contract
from statewise._src.step.function import check_function, kind_names
from statewise._src.step.measured import Measured
from statewise._src.step.step import Step
from statewise._src.step.training import NonFinite, Training

__all__ = ["step", "train_step"]

P = ParamSpec("P")
R = TypeVar("R")
# A function of the planned objects.  Its type does not say how many it takes, so only the first is left out of P.
_Function = Callable[Concatenate[Any, P], R]


class TrainOptions(JitOptions, total=False):
    """The options of a train step that do not change the type of its result, and those of `jax.jit`."""

    microbatches: SupportsIndex
    whole_argnames: str | Sequence[str]
    nonfinite: NonFinite


Captured = compat.NestedState | dict[str, Any]


# For mypy `()` is a sequence of names too, so these overloads overlap; the first that matches counts.
# Without a function they return the decorator.
@overload
def step(  # type: ignore[overload-overlap]
    fn: _Function[P, R], *, writes: tuple[()] = (), capture: None = None, **jit_options: Unpack[JitOptions]
) -> Step[P, R]: ...
@overload
def step(
    fn: _Function[P, R], *, writes: str | Sequence[str], capture: None = None, **jit_options: Unpack[JitOptions]
) -> Step[P, tuple[State, R]]: ...
@overload
def step(  # type: ignore[overload-overlap]
    fn: _Function[P, R], *, writes: tuple[()] = (), capture: str | Sequence[str], **jit_options: Unpack[JitOptions]
) -> Step[P, tuple[R, Captured]]: ...
@overload
def step(
    fn: _Function[P, R], *, writes: str | Sequence[str], capture: str | Sequence[str], **jit_options: Unpack[JitOptions]
) -> Step[P, tuple[State, tuple[R, Captured]]]: ...
@overload
def step(  # type: ignore[overload-overlap]
    fn: None = None, *, writes: tuple[()] = (), capture: None = None, **jit_options: Unpack[JitOptions]
) -> Callable[[_Function[P, R]], Step[P, R]]: ...
@overload
def step(
    fn: None = None, *, writes: str | Sequence[str], capture: None = None, **jit_options: Unpack[JitOptions]
) -> Callable[[_Function[P, R]], Step[P, tuple[State, R]]]: ...
@overload
def step(  # type: ignore[overload-overlap]
    fn: None = None, *, writes: tuple[()] = (), capture: str | Sequence[str], **jit_options: Unpack[JitOptions]
) -> Callable[[_Function[P, R]], Step[P, tuple[R, Captured]]]: ...
@overload
def step(
    fn: None = None, *, writes: str | Sequence[str], capture: str | Sequence[str], **jit_options: Unpack[JitOptions]
) -> Callable[[_Function[P, R]], Step[P, tuple[State, tuple[R, Captured]]]]: ...
def step(
    fn: Callable[..., Any] | None = None,
    *,
    writes: str | Sequence[str] = (),
    capture: str | Sequence[str] | None = None,
    **jit_options: Unpack[JitOptions],
) -> Any:
    """Makes a function of the planned objects into a compiled step on a state.

    Args:
      fn: the function; it takes the planned objects, rebuilt in every trace, and the other arguments.
      writes: the kinds that it may write: one name, or several.
      capture: the kinds of new leaves to return, sown (`self.sow`) or assigned (`self.loss = Loss(...)`); the output is
        then `(out, captured)`.
      **jit_options: `jax.jit`'s own: `static_argnames`, `donate_argnames`, `out_shardings`, `compiler_options` ...

    Returns:
      a step.  Called as `step(state, *args)` it returns the function's output; if it declares writes,
      `(state, output)`.

    Raises:
      UndeclaredWriteError: the function writes a kind that is not declared; when it is first traced.
      DeclarationError: `writes` names a kind that does not exist or is frozen, or does not name kinds.
      StructureError: the function returns the model; makes, removes or reshapes Variables; writes an object that it did
        not receive, or that is an argument; the state was donated.  At decoration: `fn` is a model, or is
        already wrapped in `jax.jit`.

    Warns:
      StatewiseWarning: a kind in `writes` is never written; a write is lost under a plain `jax.jit` or
        `jax.checkpoint`; once for each trace.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import statewise as sw
      >>> model = nnx.Dict(hits=nnx.Variable(jnp.array(0)))
      >>> state = sw.plan(model).take(model)
      >>> @sw.step(writes="variables")
      ... def count(model, by):
      ...     model.hits[...] += by
      ...     return model.hits[...] * 10
      >>> state, tenfold = count(state, 2)
      >>> int(state["variables"]["hits"]), int(tenfold)
      (2, 20)
    """
    names = kind_names(writes, "writes", "step")
    if fn is None:
        return functools.partial(step, writes=writes, capture=capture, **jit_options)
    check_function(fn, "step")
    options = describe_options(capture=capture, **jit_options)
    return Step(fn, lambda plan, name: plain_contract(plan, name, names, options), "step", capture, jit_options)


@overload
def train_step(
    fn: _Function[P, R],
    *,
    wrt: str | Sequence[str] | None = None,
    writes: str | Sequence[str] | None = None,
    has_aux: bool = False,
    capture: None = None,
    measure: Literal[False] = False,
    **options: Unpack[TrainOptions],
) -> Step[P, tuple[State, R]]: ...
@overload
def train_step(
    fn: _Function[P, R],
    *,
    wrt: str | Sequence[str] | None = None,
    writes: str | Sequence[str] | None = None,
    has_aux: bool = False,
    capture: str | Sequence[str],
    measure: Literal[False] = False,
    **options: Unpack[TrainOptions],
) -> Step[P, tuple[State, tuple[R, Captured]]]: ...
@overload
def train_step(
    fn: None = None,
    *,
    wrt: str | Sequence[str] | None = None,
    writes: str | Sequence[str] | None = None,
    has_aux: bool = False,
    capture: None = None,
    measure: Literal[False] = False,
    **options: Unpack[TrainOptions],
) -> Callable[[_Function[P, R]], Step[P, tuple[State, R]]]: ...
@overload
def train_step(
    fn: None = None,
    *,
    wrt: str | Sequence[str] | None = None,
    writes: str | Sequence[str] | None = None,
    has_aux: bool = False,
    capture: str | Sequence[str],
    measure: Literal[False] = False,
    **options: Unpack[TrainOptions],
) -> Callable[[_Function[P, R]], Step[P, tuple[State, tuple[R, Captured]]]]: ...
@overload
def train_step(
    fn: _Function[P, R],
    *,
    wrt: str | Sequence[str] | None = None,
    writes: str | Sequence[str] | None = None,
    has_aux: Literal[False] = False,
    capture: None = None,
    measure: Literal[True] | str | Sequence[str],
    **options: Unpack[TrainOptions],
) -> Step[P, tuple[State, tuple[R, Measured]]]: ...
@overload
def train_step(
    fn: None = None,
    *,
    wrt: str | Sequence[str] | None = None,
    writes: str | Sequence[str] | None = None,
    has_aux: Literal[False] = False,
    capture: None = None,
    measure: Literal[True] | str | Sequence[str],
    **options: Unpack[TrainOptions],
) -> Callable[[_Function[P, R]], Step[P, tuple[State, tuple[R, Measured]]]]: ...
@overload
def train_step(
    fn: _Function[P, Any],
    *,
    wrt: str | Sequence[str] | None = None,
    writes: str | Sequence[str] | None = None,
    has_aux: bool = False,
    capture: str | Sequence[str] | None = None,
    weighted: bool = False,
    measure: bool | str | Sequence[str] = False,
    **options: Unpack[TrainOptions],
) -> Step[P, tuple[State, Any]]: ...
@overload
def train_step(
    fn: None = None,
    *,
    wrt: str | Sequence[str] | None = None,
    writes: str | Sequence[str] | None = None,
    has_aux: bool = False,
    capture: str | Sequence[str] | None = None,
    weighted: bool = False,
    measure: bool | str | Sequence[str] = False,
    **options: Unpack[TrainOptions],
) -> Callable[[_Function[P, Any]], Step[P, tuple[State, Any]]]: ...
def train_step(
    fn: Callable[..., Any] | None = None,
    *,
    wrt: str | Sequence[str] | None = None,
    writes: str | Sequence[str] | None = None,
    has_aux: bool = False,
    capture: str | Sequence[str] | None = None,
    microbatches: SupportsIndex = 1,
    weighted: bool = False,
    whole_argnames: str | Sequence[str] = (),
    nonfinite: NonFinite = "write",
    measure: bool | str | Sequence[str] = False,
    **jit_options: Unpack[JitOptions],
) -> Any:
    """Makes a loss function of the planned objects into a compiled training step on a state.

    Args:
      fn: the function; it returns the loss, a real scalar, or `(loss, aux)`.
      wrt: the kinds to differentiate and update; by default all that have an optimizer in the plan.
      writes: kinds that the function itself may write, in addition to its defaults: every kind that is neither frozen,
        nor ephemeral (`saved=False`), nor holds `nnx.Param`.  `()` allows none at all.
      has_aux: whether the function returns `(loss, aux)`.
      capture: the kinds of new leaves to return, sown (`self.sow`) or assigned (`self.loss = Loss(...)`); the output is
        then `(out, captured)`.
      microbatches: the number of equal parts that the first axis of every array argument is split into.  The function
        runs on one part after another, so that the backward pass needs memory for one.  Gradients are averaged in
        float32 at least, what the function writes is carried from part to part, and the optimizers run once.  The loss
        is the mean over the parts; aux, and what is captured, get a first axis for the parts.  Arguments without axes
        are passed whole.
      weighted: whether the function returns `(loss, weight)`, or `(loss, weight, aux)`: then loss and gradients are
        means with these weights, such as the number of tokens in each part.  A weight is a real scalar; a part of
        weight 0 does not count.  If one is negative or not finite, or they sum to zero, nothing changes, and the loss
        is `nan`: a weight is known on the device only, so this cannot be an error.
      whole_argnames: the arguments that are passed whole to every part.
      nonfinite: `"skip"` leaves everything but random streams as it was where the loss or a gradient is not finite, or
        where the function writes a number that is not finite over one that is.  The loss that is returned is then not
        finite either.
      measure: what to measure, leaf by leaf: `"params"`, `"grads"`, `"updates"`, `"written"`, several of these, or
        True for all.  The output is then `(loss, measured)` in place of the loss, with a `statewise.results.Measured`:
        norms, largest absolute values, and numbers of elements that are not finite.
      **jit_options: `jax.jit`'s own: `static_argnames`, `donate_argnames`, `out_shardings`, `compiler_options` ...

    Returns:
      a step.  Called as `step(state, *args)` it returns `(state, loss)` or `(state, (loss, aux))`; with `measure`,
      `(state, (loss, measured))` or `(state, ((loss, measured), aux))`.

    Raises:
      UndeclaredWriteError: the function writes a kind that it may not; when it is first traced.
      DeclarationError: a kind in `wrt` has no optimizer, or does not exist; `measure` names something that is not
        measured.
      StructureError: the loss is not a real scalar; no differentiated leaf reaches it; only what the function writes is
        measured, and it writes nothing; and for the same reasons as `step`.

    Warns:
      StatewiseWarning: no leaf of a differentiated kind reaches the loss; and for the same reasons as `step`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> import statewise as sw
      >>> model = nnx.Linear(1, 1, kernel_init=nnx.initializers.ones, rngs=nnx.Rngs(0))
      >>> state = sw.plan(model, optimizers={"params": optax.sgd(0.5)}).take(model)
      >>> @sw.train_step
      ... def train(model, x, y):
      ...     return ((model(x) - y) ** 2).mean()
      >>> state, loss = train(state, jnp.ones((4, 1)), jnp.zeros((4, 1)))
      >>> float(loss), float(state["params"]["kernel"][0, 0])
      (1.0, 0.0)
    """
    of, may_write = (
        None if names is None else kind_names(names, option, "train_step")
        for option, names in (("wrt", wrt), ("writes", writes))
    )
    if fn is None:
        given: dict[str, Any] = {"wrt": wrt, "writes": writes, "has_aux": has_aux, "capture": capture}
        given |= {"microbatches": microbatches, "weighted": weighted}
        given |= {"whole_argnames": whole_argnames, "nonfinite": nonfinite, "measure": measure}
        return functools.partial(train_step, **given, **jit_options)
    check_function(fn, "train_step")
    training = Training.of(fn, microbatches, weighted, whole_argnames, nonfinite, measure)
    options = describe_options(
        capture=capture,
        microbatches=None if training.microbatches == 1 else training.microbatches,
        weighted=weighted,
        whole_argnames=whole_argnames,
        nonfinite=None if nonfinite == "write" else nonfinite,
        measure=measure,
        **jit_options,
    )

    def contract(plan: PlanTables, name: str) -> Contract:
        return train_contract(plan, name, of, may_write, has_aux, options)

    return Step(fn, contract, "train_step", capture, jit_options, training)
