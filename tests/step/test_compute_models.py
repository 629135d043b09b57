"""Compute dtypes of a ResNet with batch statistics, in evaluation, in parts, and on several devices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType

import statewise as sw
from training_models import Mlp, ResNet, X, Y, close, image_loss, images

HALF = sw.Kinds.standard().replace(params=sw.Kind(nnx.Param, compute="bfloat16"))
OPTIMIZERS = {"params": optax.adam(1e-2)}


def half_loss(model: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    return image_loss(model, x.astype(jnp.bfloat16), y)


def products(text: str) -> list[str]:
    """Returns the lines of a lowered program that multiply matrices or convolve, each with its operand types."""
    return [line for line in text.splitlines() if "stablehlo.dot_general" in line or "stablehlo.convolution" in line]


def dtypes(tree: Any) -> set[str]:
    return {str(leaf.dtype) for leaf in jax.tree.leaves(tree)}


def test_a_resnet_is_trained_as_with_the_dtype_of_flax() -> None:
    """Products in bfloat16; statistics, parameters and moments in float32; losses within the noise of flax's own."""
    seen = set()

    @sw.train_step
    def train(model: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        seen.add((str(model.stem.kernel[...].dtype), str(model.block.norms[0].mean[...].dtype)))
        return half_loss(model, x, y)

    batch, curves, ends = images(0), [], []
    for kinds, dtype in ((HALF, None), (sw.Kinds.standard(), jnp.bfloat16)):
        # With float32 statistics and without a dtype, `nnx.BatchNorm` returns float32.
        model = ResNet(nnx.Rngs(0), dtype=dtype, norm_dtype=jnp.bfloat16)
        state, losses = kinds.plan(model, optimizers=OPTIMIZERS).take(model), []
        lines = products(train.lower(state, *batch).as_text())
        assert len(lines) >= 9
        assert all("bf16" in line for line in lines)
        for _ in range(12):
            state, loss = train(state, *batch)
            losses.append(float(loss))
        curves.append(losses)
        ends.append(state)
    np.testing.assert_allclose(curves[0], curves[1], rtol=0.03)
    assert curves[0][-1] < 0.9 * curves[0][0]
    assert seen == {("bfloat16", "float32"), ("float32", "float32")}
    assert dtypes([ends[0][kind] for kind in ("params", "stats")]) == {"float32"}
    assert dtypes(ends[0]["optimizer"]) == {"float32", "int32"}
    close(ends[0]["stats"], ends[1]["stats"], rtol=0.05)


def test_evaluation_as_with_the_dtype_of_flax_and_a_checkpoint_in_between(tmp_path: Any) -> None:
    images_, labels = images(0)
    x = images_.astype(jnp.bfloat16)
    model, flaxs = (ResNet(nnx.Rngs(0), dtype, jnp.bfloat16) for dtype in (None, jnp.bfloat16))

    @sw.step
    def evaluate(model: Any, x: jax.Array) -> jax.Array:
        model.eval()
        return model(x)

    plan, plain = HALF.plan(model, optimizers=OPTIMIZERS), sw.plan(model, optimizers=OPTIMIZERS)
    train = sw.train_step(half_loss)
    state, _ = train(plan.take(model), images_, labels)
    sw.save(tmp_path / "a", state)
    restored, _ = sw.restore(tmp_path / "a", plain.abstract())
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(restored["params"]), jax.tree.leaves(state["params"]))
    plain.put(restored, flaxs)
    flaxs.eval()
    out = evaluate(state, x)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), np.asarray(flaxs(x), np.float32), rtol=0.03, atol=0.03)
    # A checkpoint without compute dtypes is restored into a plan with them, and trains on alike.
    sw.save(tmp_path / "b", restored)
    again, _ = sw.restore(tmp_path / "b", plan.abstract())
    close(train(again, images_, labels), train(state, images_, labels))


@pytest.mark.parametrize("placement", [sw.Replicated(), sw.Sharded("data"), sw.PerDevice("data")], ids=str)
def test_microbatches_on_eight_devices(placement: Any) -> None:
    """As the whole batch on one device, to the rounding of bfloat16, with the products in bfloat16."""
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    model = nnx.Dict(net=Mlp(nnx.Rngs(0)), seen=nnx.BatchStat(jnp.zeros(8)))
    on_each = isinstance(placement, sw.PerDevice)
    kinds = sw.Kinds(
        params=sw.Kind(
            nnx.Param,
            compute="bfloat16",
            placement=(lambda path, shape: placement if shape[0] == 8 else sw.Replicated()) if not on_each else None,
        ),
        stats=sw.Kind(nnx.BatchStat, placement=placement if on_each else None),
    )

    def fn(model: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        assert model.net.first.kernel[...].dtype == jnp.bfloat16
        assert model.seen[...].dtype == jnp.float32
        model.seen[...] += x.shape[0]
        return ((model.net(x.astype(jnp.bfloat16)) - y) ** 2).mean()

    plan = kinds.plan(model, optimizers={"params": optax.sgd(0.1)})
    x, y = jnp.concatenate([X, -X]), jnp.concatenate([Y, Y])
    plain = sw.Kinds(params=sw.Kind(nnx.Param, compute="bfloat16"), stats=sw.Kind(nnx.BatchStat))
    one, loss = sw.train_step(fn)(plain.plan(model, optimizers={"params": optax.sgd(0.1)}).take(model), x, y)
    rows = jax.NamedSharding(mesh, jax.P("data"))
    step, batch = sw.train_step(fn, microbatches=2), (jax.device_put(x, rows), jax.device_put(y, rows))
    state = plan.take(model, mesh=mesh)
    lines = products(step.lower(state, *batch).as_text())
    assert lines
    assert all("bf16" in line for line in lines)
    after, same = step(state, *batch)
    close((after["params"], same), (one["params"], loss), rtol=2e-2)
    assert dtypes(after["params"]) == {"float32"}
