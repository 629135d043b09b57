"""Ahead-of-time steps: lowered for one signature, then compiled."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import jax

from statewise._src.core.plan import State
from statewise._src.core.plan_difference import in_form_of
from statewise._src.step.dispatch import CompiledStep
from statewise._src.step.function import called_as
from statewise.errors import StructureError

__all__ = ["Compiled", "Lowered", "no_state"]


R_co = TypeVar("R_co", covariant=True)


class Lowered(Generic[R_co]):
    """A step lowered for one signature, ahead of time; made by `Step.lower`.

    Everything that `jax.stages.Lowered` offers is available here too (`as_text`, `cost_analysis` ...).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> import statewise as sw
      >>> plan = sw.plan(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
      >>> @sw.step
      ... def forward(model, x):
      ...     return model(x)
      >>> compiled = forward.lower(plan.abstract(), jax.ShapeDtypeStruct((4, 2), jnp.float32)).compile()
      >>> compiled(plan.take(nnx.Linear(2, 3, rngs=nnx.Rngs(0))), jnp.ones((4, 2))).shape
      (4, 3)
    """

    def __init__(self, entry: CompiledStep, lowered: jax.stages.Lowered) -> None:
        self._entry = entry
        self._lowered = lowered

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lowered, name)

    def compile(self, *args: Any, **kwargs: Any) -> Compiled[R_co]:
        """Compiles the step; takes the arguments of `jax.stages.Lowered.compile`."""
        return Compiled(self._entry, self._lowered.compile(*args, **kwargs))


class Compiled(Generic[R_co]):
    """A step compiled for one signature: called like the step; made by `Lowered.compile`.

    Everything that `jax.stages.Compiled` offers is available here too (`memory_analysis`, `as_text` ...).

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import statewise as sw
      >>> plan = sw.plan(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
      >>> @sw.step
      ... def forward(model, x):
      ...     return model(x)
      >>> forward.lower(plan.abstract(), jnp.ones((4, 2))).compile()
      <sw.results.Compiled forward>
    """

    def __init__(self, entry: CompiledStep, compiled: jax.stages.Compiled) -> None:
        self._entry = entry
        self._compiled = compiled

    def __repr__(self) -> str:
        return f"<sw.results.Compiled {self._entry.name}>"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._compiled, name)

    def __call__(self, state: State, /, *args: object, **kwargs: object) -> R_co:
        """Runs the compiled step on a state of the plan that it was compiled for."""
        if type(state) is not State:
            raise no_state(self._entry.name, state)
        if state.tables is not self._entry.plan:
            state = in_form_of(self._entry.plan, state)
        if state.tables is not self._entry.plan:
            raise StructureError(
                f"{self._entry.name} was compiled for a plan other than this state's.",
                hint=f"{called_as(self._entry.name)}.lower(state, ...).compile()",
            )
        return self._entry.run(state, args, kwargs, self._compiled)


def no_state(name: str, given: object) -> StructureError:
    """Returns the error for a step that is called with something other than a state."""
    return StructureError(
        f"{name} is a step: its first argument is a state, not {type(given).__name__}.",
        hint=f"state = plan.take(model)\n{called_as(name)}(state, ...)",
    )
