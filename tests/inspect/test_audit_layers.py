"""`audit` on layers as Flax ships them: what each reads and writes is known, and is compared with a real call."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import statewise as sw

X = jax.random.normal(jax.random.key(0), (2, 5, 4))


def paths(rows: tuple[sw.results.LeafAudit, ...], flag: str) -> set[str]:
    return {sw.format_path(row.path) for row in rows if getattr(row, flag)}


def changed_by(step: Any, state: sw.State, *args: Any) -> set[str]:
    """The leaves that a real call changes in value."""
    with sw.watch(state) as seen:
        out = step(jax.tree.map(jnp.copy, state), *args)
        seen.compare(out[0])
    return {sw.format_path(change.path) for changes in seen.changed.values() for change in changes}


LAYERS: dict[str, Any] = {
    "BatchNorm": lambda: nnx.BatchNorm(4, rngs=nnx.Rngs(0)),
    "BatchNorm, evaluating": lambda: nnx.BatchNorm(4, use_running_average=True, rngs=nnx.Rngs(0)),
    "Dropout": lambda: nnx.Dropout(0.5, rngs=nnx.Rngs(0)),
    "SpectralNorm": lambda: nnx.SpectralNorm(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1)),
    "GRU": lambda: nnx.RNN(nnx.GRUCell(4, 3, rngs=nnx.Rngs(0))),
    "GroupNorm": lambda: nnx.GroupNorm(4, num_groups=2, rngs=nnx.Rngs(0)),
    "LoRA": lambda: nnx.LoRALinear(4, 3, lora_rank=2, rngs=nnx.Rngs(0)),
}
ALL = tuple(sw.Kinds.standard())


@pytest.mark.filterwarnings("ignore:.* but never writes it:statewise.StatewiseWarning")  # each may write any kind
@pytest.mark.parametrize("name", LAYERS)
def test_what_is_written_is_what_a_call_changes(name: str) -> None:
    model = nnx.Dict(layer=LAYERS[name]())
    state = sw.plan(model).take(model)
    step = sw.step(lambda model, x: model.layer(x), writes=ALL)
    audit = sw.audit(step, state, X)
    assert paths(audit.leaves, "written") == changed_by(step, state, X)


def test_a_decode_step_writes_its_cache_and_reads_its_weights() -> None:
    layer = nnx.MultiHeadAttention(2, 4, decode=True, rngs=nnx.Rngs(0))
    layer.init_cache((2, 5, 4))
    model = nnx.Dict(attend=layer)
    state = sw.plan(model).take(model)
    decode = sw.step(lambda model, x: model.attend(x), writes="cache")
    token = X[:, :1]
    audit = sw.audit(decode, state, token)
    cache = {"attend/cache_index", "attend/cached_key", "attend/cached_value"}
    assert paths(audit.leaves, "written") == paths(audit.ephemeral_writes, "written_but_not_saved") == cache
    assert changed_by(decode, state, token) == cache
    assert {path.split("/")[1] for path in paths(audit["params"], "read")} == {"query", "key", "value", "out"}
    assert paths(audit["params"], "written") == set()
    assert all(row.restarts and not row.saved for row in audit["cache"])


def test_a_frozen_base_is_read_and_neither_differentiated_nor_written() -> None:
    kinds = sw.Kinds(
        base=sw.Kind(nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam)), frozen=True),
        lora=sw.Kind(nnx.LoRAParam),
        rest=sw.Kind(...),
    )
    model = nnx.Dict(layer=LAYERS["LoRA"]())
    plan = kinds.plan(model, optimizers={"lora": optax.adam(1e-2)})

    def loss_of(model: Any, x: jax.Array) -> jax.Array:
        return (model.layer(x) ** 2).mean()

    step = sw.train_step(loss_of)
    audit = sw.audit(step, plan.abstract(), jax.ShapeDtypeStruct(X.shape, X.dtype))
    base = audit.counts["base"]
    assert (base.leaves, base.read, base.written, base.differentiated, base.donated) == (2, 2, 0, 0, 0)
    lora = audit.counts["lora"]
    assert (lora.leaves, lora.read, lora.written, lora.differentiated, lora.zero_gradient) == (2, 2, 2, 2, 0)
    # The second factor starts with zeros, so that the first has no gradient yet; but it is none that is always zero.
    grads = sw.grad(loss_of, wrt=nnx.LoRAParam)(model, X)
    assert [bool(np.any(np.asarray(leaf))) for leaf in jax.tree.leaves(grads)].count(False) == 1


def test_a_backbone_behind_a_stopped_gradient_is_untrained() -> None:
    model = nnx.Dict(backbone=nnx.Linear(4, 4, rngs=nnx.Rngs(0)), head=nnx.Linear(4, 2, rngs=nnx.Rngs(1)))
    plan = sw.plan(model, optimizers={"params": optax.adamw(1e-2)})

    def loss_of(model: Any, x: jax.Array) -> jax.Array:
        return (model.head(jax.lax.stop_gradient(model.backbone(x))) ** 2).mean()

    step = sw.train_step(loss_of)
    audit = sw.audit(step, plan.abstract(), X)
    assert paths(audit.untrained, "zero_gradient") == {"backbone/bias", "backbone/kernel"}
    # Weight decay moves it all the same: it is not untouched, it is eaten away.
    assert "backbone/kernel" in changed_by(step, plan.take(model), X)


def test_layers_stacked_by_vmap_and_run_by_scan_are_seen_through() -> None:
    class Stack(nnx.Module):
        def __init__(self) -> None:
            make = nnx.vmap(lambda rngs: nnx.BatchNorm(4, rngs=rngs), in_axes=0, out_axes=0)
            self.layers = make(nnx.Rngs(0).split(3))

        def __call__(self, x: jax.Array) -> jax.Array:
            return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)

    model = Stack()
    plan = sw.plan(model, optimizers={"params": optax.sgd(0.1)})
    step = sw.train_step(lambda model, x: (model(x) ** 2).mean())
    audit = sw.audit(step, plan.abstract(), X)
    assert paths(audit["stats"], "written") == {"layers/mean", "layers/var"}
    assert paths(audit["params"], "zero_gradient") == set()
    assert changed_by(step, plan.take(model), X) >= {"layers/mean", "layers/var"}


def test_a_step_on_each_device_is_audited(devices: list[jax.Device]) -> None:
    mesh = jax.make_mesh((8,), ("data",))
    model = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    kinds = sw.Kinds.standard().replace(stats=sw.Kind(nnx.BatchStat, placement=sw.PerDevice("data")))
    state = kinds.plan(model, optimizers={"params": optax.sgd(0.1)}).take(model, mesh=mesh)

    def loss_of(model: Any, x: jax.Array) -> jax.Array:
        weight = jax.lax.axis_index("data") / 7
        return (model(x) ** 2).mean() * weight + 0.0 * model.layers[0].bias[...].sum()

    audit = sw.audit(sw.train_step(loss_of), state, jax.ShapeDtypeStruct((16, 4), jnp.float32))
    assert {kind: (count.written, count.zero_gradient) for kind, count in audit.counts.items() if count.leaves} == {
        "params": (4, 0),
        "stats": (2, 0),
    }
