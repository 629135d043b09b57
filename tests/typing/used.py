"""What a user writes: every public name, as `mypy --strict` and `pyright` see it.  Checked, never run."""

from __future__ import annotations

from pathlib import Path as FilePath
from typing import Any, assert_type

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx

import statewise as sw
from statewise.results import (
    Audit,
    Census,
    Checkpointable,
    Compiled,
    Conversion,
    Diff,
    Explanation,
    Finding,
    Findings,
    KindAudit,
    KindCount,
    KindMemory,
    Leaf,
    LeafAudit,
    LeafChange,
    LeafDiff,
    LeafReport,
    LeafRestore,
    Lowered,
    Measured,
    Memory,
    NamesProposal,
    Report,
    RestoreReport,
    RestoreResult,
    Step,
    Watch,
)


class Model(nnx.Module):
    """A layer and a counter."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(2, 3, rngs=rngs)
        self.calls = nnx.Variable(jnp.array(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the layer."""
        return jnp.asarray(self.linear(x))


def make() -> Model:
    """Makes the model."""
    return Model(rngs=nnx.Rngs(0))


# --- declarations ------------------------------------------------------------------------------------------------


def placement(path: tuple[Any, ...], shape: tuple[int, ...]) -> sw.Sharded | sw.Replicated:
    """Chooses a placement."""
    return sw.Sharded("data", ("model", "expert"), None) if len(shape) > 1 else sw.Replicated(memory="pinned_host")


def fresh(array: jax.Array, key: jax.Array) -> jax.Array:
    """Makes a fresh array."""
    return jax.random.normal(key, array.shape, array.dtype)


def is_matrix(path: tuple[Any, ...], leaf: Any) -> bool:
    """A predicate of leaves."""
    return bool(leaf.ndim == 2)


decoder = sw.Path("decoder/**") & nnx.Param | ~sw.Exactly(nnx.Variable, nnx.Param)
kinds = sw.Kinds(
    params=sw.Kind(nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam)), placement=placement),
    lora=sw.Kind(nnx.LoRAParam, frozen=True, saved=False),
    adapters=sw.Kind((sw.Meta("role", "adapter"), sw.Where(is_matrix)), optional=True, missing="keep"),
    decoder=sw.Kind(decoder, placement=sw.FromMetadata([("embed", "data"), ("heads", None)])),
    stats=sw.Kind(nnx.BatchStat, placement=sw.PerDevice("data", resize="mean")),
    cache=sw.Kind(nnx.Cache, saved=False, restart=jnp.zeros_like, batch_axis=0, depends_on=("params", "lora")),
    draft=sw.Kind("draft", restart=jnp.zeros_like, depends_on="params", stale="restart"),
    noise=sw.Kind(nnx.RngState, restart=fresh, missing="error"),
    ema=sw.Kind(sw.EMA, missing="restart"),
    both=sw.Kind([nnx.Cache, nnx.Intermediate]),
    either=sw.Kind(nnx.Cache | nnx.Intermediate),
    frozen=sw.Kind("frozen", compute="bfloat16"),
    rest=sw.Kind(...),
)
changed: sw.Kinds = sw.Kinds.standard().replace(params=sw.Kind(nnx.Param, frozen=True)) | sw.Kinds(x=sw.Kind("x"))
assert_type(changed["params"], sw.Kind)
words: str = changed["params"].handling()
claims_rest: bool = changed["variables"].rest
names: list[str] = list(changed)

# --- plans -------------------------------------------------------------------------------------------------------

model = make()
optimizers = {"params": optax.adam(1e-3)}
joint = {("params", "lora"): optax.sgd(0.1), "frozen": sw.overwrite_with_gradient()}
plan = kinds.plan(model, optimizers=optimizers, averages={"params": [sw.EMA(0.999), sw.EMA(0.9, name="fast")]})
kinds.plan(model, optimizers=joint, averages={"params": sw.EMA(lambda n: 0.9, dtype="float32")})
kinds.plan(policy=model, reference=make(), optimizers={"params": optax.sgd(0.1), ("lora", "rest"): optax.adam(1.0)})
assert_type(sw.plan(model, optimizers=optimizers), sw.Plan)
assert_type(plan.kinds, sw.Kinds)
assert_type(plan.kinds.replace(lora=sw.Kind(nnx.LoRAParam)).plan(model), sw.Plan)
assert_type(plan["params"], tuple[Leaf, ...])
leaf = plan.leaves[0]
print(sw.format_path(leaf.path), leaf.kind, leaf.shape, leaf.dtype, plan.excluded, plan.members, plan.table())
again = sw.plan(model, optimizers=plan.optimizers, averages=plan.averages)

mesh = jax.make_mesh((8,), ("data",))
abstract_mesh = jax.sharding.AbstractMesh((8,), ("data",))
state = plan.take(model, mesh=mesh, copy=False, pack=("params", "stats"))
state = plan.take(model=model, pack=True)
state = plan.init(make, mesh)
state = plan.init(lambda: make(), mesh)
plan.put(state, model, copy=True)
plan.put(state, model=model)
built = plan.build(state)
assert_type(plan.abstract(), sw.State)
assert_type(plan.abstract(abstract_mesh), sw.State)
assert_type(plan.shardings(mesh), sw.State)
assert_type(plan.axes(stats=0, params=None, cache=lambda path, shape: 1), sw.State)
ensemble = plan.stacked(4, over="data", params=None, stats=1)
assert_type(ensemble.stack([state, state]), sw.State)
assert_type(plan.stack(state for _ in range(4)), sw.State)

# --- states ------------------------------------------------------------------------------------------------------

assert_type(state.plan, sw.Plan)
kernel = state["params"]["linear"]["kernel"]
print(kernel.shape, "params" in state, len(state), list(state), list(state.keys()))
state = state.replace(stats=jax.tree.map(jnp.zeros_like, state["stats"]))
state = state.restart()
state = state.restart("cache", "noise", where=jnp.array([True, False]), key=jax.random.key(0))
state = state.restart("cache", where=[0, 3])
state = state.restart("cache", where=np.array([0, 3]))
state = state.with_averages("ema")
state = state.reduce_devices("stats", how="first").reduce_devices(how=lambda array: array.max(axis=0))
state = state.cast(params="bfloat16", stats=jnp.float32)
state = ensemble.stack([state]).member(-1)
shapes = jax.tree.map(jnp.shape, state)

# --- steps -------------------------------------------------------------------------------------------------------


@sw.train_step
def train(model: Model, x: jax.Array, *, scale: float = 1.0) -> jax.Array:
    """Returns the loss."""
    return (model(x) ** 2).mean() * scale


@sw.train_step(wrt="params", writes=("stats",), has_aux=True, static_argnames="deep")
def train_more(model: Model, x: jax.Array, deep: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the loss, and more."""
    return model(x).mean(), {"x": x}


@sw.train_step(microbatches=8, nonfinite="skip", whole_argnames="table")
def train_in_parts(model: Model, x: jax.Array, table: jax.Array) -> jax.Array:
    """Returns the loss."""
    return (model(x) * table).mean()


@sw.train_step(measure=True)
def train_measured(model: Model, x: jax.Array) -> jax.Array:
    """Returns the loss."""
    return model(x).mean()


@sw.train_step(measure=("grads", "updates"), nonfinite="skip", has_aux=True)
def train_measured_more(model: Model, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the loss, and more."""
    return model(x).mean(), x


@sw.train_step(weighted=True, microbatches=8)
def train_weighted(model: Model, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the loss and the weight."""
    return model(x).mean(), x.sum()


@sw.step
def forward(model: Model, x: jax.Array) -> jax.Array:
    """Applies the model."""
    return model(x)


@sw.step(writes="variables", donate_argnames=("x",))
def count(model: Model, x: jax.Array) -> int:
    """Counts."""
    return 1


@sw.step(capture="intermediates")
def sown(model: Model, x: jax.Array) -> jax.Array:
    """Sows."""
    return model(x)


@sw.step
def both(model: Model, other: Model, x: jax.Array) -> jax.Array:
    """Takes two objects, which its signature shows, and how many a plan has it does not."""
    return model(x) + other(x)


@sw.step
def loose(model: Model, x: Any) -> jax.Array:
    """Takes anything."""
    return model(x)


x = jnp.ones((4, 2))
assert_type(train(state, x, scale=2.0), tuple[sw.State, jax.Array])
assert_type(train_more(state, x, True), tuple[sw.State, tuple[jax.Array, dict[str, jax.Array]]])
assert_type(train_measured(state, x), tuple[sw.State, tuple[jax.Array, Measured]])
measured = train_measured(state, x)[1][1]
print(measured.to_dict(depth=2)["grad_norm/params/linear"], measured.nonfinite, measured.table(0), measured.to_json(1))
((loss, measured), aux) = train_measured_more(state, x)[1]
assert_type(forward(state, x), jax.Array)
assert_type(sw.step(train.fn)(state, 3), Any)
assert_type(count(state, x), tuple[sw.State, int])
assert_type(both(state, x), jax.Array)
out, captured = sown(state, x)
print(out.shape, captured["h"])
state, loss = train(state, x)
forward_again: Step[..., jax.Array] = forward
looser = loose(state, x)
lowered: Lowered[jax.Array] = forward.lower(plan.abstract(), jax.eval_shape(lambda: x))
compiled: Compiled[jax.Array] = lowered.compile()
assert_type(compiled(state, x), jax.Array)
doubled = sw.step(lambda model, x: model(x) * x**2)(state, x)
vectorized = jax.vmap(forward, in_axes=(ensemble.axes(), None))(state, x)


def loss_of(model: Model, x: jax.Array) -> jax.Array:
    """Returns the loss of a model."""
    return model(x).mean()


def loss_and_aux(model: Model, x: jax.Array) -> tuple[jax.Array, int]:
    """Returns the loss, and more."""
    return model(x).mean(), 3


value, grads = sw.value_and_grad(loss_of, wrt=sw.Path("linear/**"))(model, x)
assert_type(value, jax.Array)
(value, three), grads = sw.value_and_grad(loss_and_aux, has_aux=True)(model, x)
assert_type(three, int)
only_grads, three = sw.grad(loss_and_aux, has_aux=True)(model, x)
print(only_grads["linear"])


def layer(layer: Model, x: jax.Array) -> jax.Array:
    """Runs one layer."""
    return layer(x)


assert_type(sw.scan_layers(layer, model, x, shared=nnx.BatchStat, reverse=True, unroll=2), jax.Array)
assert_type(sw.scan_layers(forward, state, x, shared="stats"), tuple[sw.State, jax.Array])

# --- looking -----------------------------------------------------------------------------------------------------

selected = sw.select(model, nnx.Param)
print(selected["linear"], len(selected))
assert_type(sw.count(model, nnx.Param), int)
assert_type(sw.count(model, nnx.Param, "tag"), tuple[int, ...])
explanation: Explanation = sw.explain(model, ~sw.Path("bias"))
print(explanation.matched, explanation.by, explanation.table(), explanation.to_json())
graphdef, parts = sw.split(model, kinds)
merged: Model = sw.merge(graphdef, parts)
sw.update(model, {"linear": {"bias": jnp.ones(3)}})
sw.update(model, sw.select(model, nnx.Param))

census: Census = sw.census((model, make()), kinds)
counted: KindCount = census["params"]
total: KindCount = census.total
print(counted.leaves, total.dtypes, census.to_dict())
memory: Memory = sw.memory(plan, {"data": 4, "model": 2}, gradients=False)
sw.memory(state, mesh)
per_kind: tuple[KindMemory, ...] = memory.kinds
print(memory.total, memory.largest, per_kind[0].per_device)
audit: Audit = sw.audit(train, plan.abstract(), x, scale=2.0)
sw.audit(loss_of, model, x)
leaf_audits: tuple[LeafAudit, ...] = audit.leaves
kind_audits: dict[str, KindAudit] = audit.counts
print(audit.undeclared, audit.error, audit.by_leaf("params"), leaf_audits[0].written, kind_audits["params"].read)
findings: Findings = sw.lint(model, kinds=kinds, ignore="tied-weights", decode_length=8)
findings = sw.lint(plan, ignore=["tied-weights"])
findings = sw.lint(policy=model, reference=model)
findings = sw.lint(plan, steps=train)
findings = sw.lint(plan, steps=[train])
finding: Finding = findings[0]
print(finding.code, finding.hint, finding.leaves)

with sw.watch(model, kinds, expect="params") as block:
    train(state, x)
    block.compare(model)
watch: Watch = sw.watch(policy=model, reference=model, expect=("params",))
changes: dict[str, tuple[LeafChange, ...]] = watch.changed
print(changes["params"][0].path, watch.unchanged, watch.violations, watch.table())

report: Report = sw.report(model, "run/step_1", kinds=kinds, mesh={"data": 4})
sw.report(plan, mesh=abstract_mesh).write("report.html")
leaf_reports: tuple[LeafReport, ...] = report.leaves
print(report.to_html(), report.to_json())

# --- checkpoints -------------------------------------------------------------------------------------------------

sw.save("run/base", state)
sw.save(FilePath("run/step_1"), state, only=("lora", "optimizer"), base="run/base", layout="packed")
restored, restore_report = sw.restore("run/step_1", plan.abstract(), only="params", cast=True, members=[0, None])
assert_type(restored, sw.State)
assert_type(restore_report, RestoreReport)
leaf_restores: tuple[LeafRestore, ...] = restore_report.leaves
print(restore_report.ok, restore_report.problems, leaf_restores[0].outcome)
assert_type(sw.preview("run/step_1", state, members=3), RestoreReport)
assert_type(sw.inspect(FilePath("run/step_1")), Census)
difference: Diff = sw.diff("run/step_1", model, kinds=kinds)
sw.diff(plan, state)
leaf_diffs: tuple[LeafDiff, ...] = difference.leaves
print(bool(difference), difference.value, difference.not_saved, leaf_diffs[0].why)
conversion: Conversion = sw.convert(
    "model.safetensors", "run/ours", target=plan.abstract(), rename={"a": "b", "c": None}
)
tree = sw.convert({"params": {"kernel": x}}, None, to="linen", rename=lambda name: name.lower(), dry_run=True).tree
print(conversion.matched, conversion.unexpected)
fused = sw.Name(["q.{i}", "k.{i}"], "(n h) d -> d n h", h=4, join=0, sizes=[4, 8])
elsewhere = sw.Names({"a": "b", "c/{i}": fused, "d": None})
assert_type(elsewhere["a"], sw.Name | None)
assert_type(elsewhere.check(plan, "model"), RestoreReport)
assert_type(elsewhere.check(plan, ["a.safetensors", "b.safetensors"]), RestoreReport)
assert_type(elsewhere.infer(plan, "model"), NamesProposal)
assert_type(sw.Names.infer(plan, "model"), NamesProposal)
assert_type(sw.restore(FilePath("model"), plan.abstract(), names=elsewhere | elsewhere)[0], sw.State)
read_back = sw.Names.from_dict(elsewhere.to_dict())
sw.convert(state, "published", names=read_back, max_shard_bytes=2**30, extra_files=["config.json"])
item: Checkpointable = sw.checkpointable(state, only="params", layout="named", members=0)
moved = sw.transfer(state, sw.plan(model), kinds=["params"], cast=jnp.bfloat16, mesh=mesh)
moved = sw.transfer(state, moved, kinds="params", cast=True, names=elsewhere)
assert_type(sw.merge_lora(state), sw.State)

options = ocp.CheckpointManagerOptions(max_to_keep=3)
with sw.Checkpoints("run", max_to_keep=3, every=10, layout="packed", asynchronous=False) as checkpoints:
    saved: bool = checkpoints.save(1, state, metrics={"loss": 0.5})
    checkpoints.save(np.int64(2), state, force=True)
    result: RestoreResult = checkpoints.restore(plan.abstract(), step=1, only=["params"], extra="metrics", members=0)
    state, restore_report, step, extra = checkpoints.restore(state)
    print(checkpoints.preview(state, only="params").ok, checkpoints.inspect(), checkpoints.inspect(3)["params"])
    print(checkpoints.steps, checkpoints.latest, checkpoints.path(1), checkpoints.directory, checkpoints.manager)
    checkpoints.wait(lambda done, of: print(done / of))
    for number in checkpoints:
        print(number + len(checkpoints))
more = sw.Checkpoints(FilePath("run"), options=options)
more.close()

# --- errors ------------------------------------------------------------------------------------------------------

try:
    sw.restore("run/step_1", state)
except (sw.RestoreError, sw.CorruptedError, sw.SaveError, sw.WatchError, sw.UndeclaredWriteError) as error:
    hint: str | None = error.hint
    print(error.message, error.kind, hint, [one.path for one in error.leaves])
except (sw.DeclarationError, sw.FilterError, sw.OverlapError, sw.UnclaimedError, sw.PlacementError) as error:
    print(error)
except (sw.StructureError, sw.StaleError) as error:
    print(error.kind)
except sw.StatewiseError as error:
    raise sw.StatewiseError("Nothing fits.", kind="params", hint="another model") from error
warning = sw.StatewiseWarning("Nothing is written.", kind="params")
sw.testing.assert_no_retrace(train, state, x)
with sw.testing.count_traces(train) as traces:
    print(traces.count)
