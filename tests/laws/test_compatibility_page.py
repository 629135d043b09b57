"""What docs/compatibility.md says about Flax's switches holds under each of them."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import modes
import statewise as sw
from code_blocks import code_blocks

PAGE = modes.ROOT / "docs" / "compatibility.md"
X = jnp.ones((2, 3))
TX = optax.sgd(0.1)


@pytest.mark.parametrize("mode", modes.CONTEXTS)
def test_the_code_on_the_page_runs_under_each_switch(mode: str) -> None:
    blocks = [code for code, _ in code_blocks(PAGE.read_text(encoding="utf-8"))]
    assert "nnx.eval_shape(Tied, graph=True, graph_updates=True)" in blocks[0]
    scope: dict[str, Any] = {}
    with modes.CONTEXTS[mode]():
        for code in blocks:
            exec(code, scope)
        defaults = nnx.var_defaults()
    assert scope["plan"].leaves[0].aliases
    assert (scope["model"].out.hijax, scope["model"].out.ref) == (defaults.hijax, defaults.ref)


class Tied(nnx.Module):
    def __init__(self) -> None:
        self.kernel = nnx.Param(jnp.ones((3, 3)))
        self.tied = self.kernel

    def __call__(self, x: Any) -> Any:
        return (x @ self.kernel[...] @ self.tied[...]).mean()


@pytest.mark.usefixtures("plain_variables")
def test_an_optimizer_of_flax_and_tied_weights_in_tree_mode() -> None:
    def train(in_graph_mode: bool) -> Any:
        with nnx.set_graph_mode(True):
            model = Tied()
            optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
        state = sw.plan(model, optimizer).take(model, optimizer)

        @sw.step(writes=("params", "optimizer"))
        def by_hand(model: Any, optimizer: Any, x: Any) -> Any:
            grads = sw.grad(lambda model, x: model(x))(model, x)
            with nnx.set_graph_mode(in_graph_mode):
                optimizer.update(model, grads)

        state, _ = by_hand(state, X)
        return state.plan.build(state)[0].kernel[...]

    with nnx.set_graph_mode(False):
        with pytest.raises(ValueError, match="Duplicate Param"):
            nnx.Optimizer(Tied(), TX, wrt=nnx.Param)
        with pytest.raises(ValueError, match="Duplicate Param"):
            train(in_graph_mode=False)
        state = sw.plan(Tied(), optimizers={"params": TX}).take(Tied())
        state, _ = sw.train_step(lambda model, x: model(x))(state, X)
        np.testing.assert_allclose(state["params"]["kernel"], train(in_graph_mode=True), rtol=1e-6)
