"""Mistakes, each on a line that is marked: both type checkers have to find it there, and nothing else."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

import statewise as sw


class Model(nnx.Module):
    """A model."""


@sw.train_step
def train(model: Model, x: jax.Array) -> jax.Array:
    """Returns a loss."""
    return x.mean()


model = Model()
plan = sw.plan(model)
state = plan.take(model)

sw.Kinds(params=nnx.Param)  # wrong: a type is not a kind
plan.put("state", model)  # wrong: text is not a state
sw.save("run/step_1", plan)  # wrong: a plan is not a state
plan.shardings({"data": 4})  # wrong: a dict is not a mesh
state.restart("cache", where="all")  # wrong: text names no slots
plan.init(lambda: model)  # wrong: the mesh is missing
sw.restore("run/step_1", state, onyl="params")  # wrong: a misspelled keyword
sw.save("run/step_1", state, only=3)  # wrong: a number names no kinds
sw.save("run/step_1", state, layout="flat")  # wrong: not one of the two
sw.convert("a.safetensors", "b", to="linnen")  # wrong: not one of the formats
print(sw.audit(train, state, jnp.ones(3)).leafs)  # wrong: no such attribute
train(model, jnp.ones(3))  # wrong: a step takes a state
train(state)  # wrong: the step's argument is missing
loss = train(state, jnp.ones(3)).mean()  # wrong: a train step returns a state as well
sw.Kind(nnx.Param, missing="kept")  # wrong: not one of the three
plan.kinds.replce(params=sw.Kind(nnx.Param))  # wrong: a misspelled method
try:
    sw.preview("run/step_1", state)
except sw.RestoreError as error:
    print(error.mend)  # wrong: it is called hint
