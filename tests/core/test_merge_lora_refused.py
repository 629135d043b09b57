"""Adapters that cannot be folded: every one is named, and nothing changes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import statewise as sw
from refusals import refused

ONES = nnx.initializers.ones
LINEAR = "adapters of nnx.Linear alone; fold any other by hand: kernel + lora_a @ lora_b"
IN_THE_WAY = "{} in the way of merging the adapters. Nothing was merged."


class Held(nnx.Module):
    def __init__(self, **parts: Any) -> None:
        for name, part in parts.items():
            setattr(self, name, part)


def adapter(base: Any = None, **options: Any) -> nnx.LoRA:
    return nnx.LoRA(3, 2, 4, base_module=base, rngs=nnx.Rngs(0), **options)


def plain() -> nnx.Linear:
    return nnx.Linear(3, 4, rngs=nnx.Rngs(0))


def merge(model: Any) -> sw.State:
    return sw.merge_lora(sw.plan(model).take(model))


def test_no_state() -> None:
    hint = "sw.merge_lora(sw.plan(model).take(model))"
    with refused(sw.errors.StructureError, "sw.merge_lora takes a state, not LoRA.", hint=hint):
        sw.merge_lora(adapter(plain()))  # type: ignore[arg-type]


def test_no_adapters() -> None:
    message = "There are no adapters to merge: no nnx.LoRA and no nnx.LoRALinear is in the model."
    hint = "the state is of the plain model already, or the adapters are of a class of your own"
    with refused(sw.errors.StructureError, message, hint=hint):
        merge(plain())


def test_adapters_without_a_base() -> None:
    leaves = ["alone/lora_a: LoRAParam(3, 2) float32  kind=lora  (is of an nnx.LoRA without a base_module)"]
    hint = "nnx.LoRA(..., base_module=linear), or nnx.LoRALinear, so that it is known what it is added to"
    with refused(sw.errors.StructureError, IN_THE_WAY.format("1 leaf is"), leaves=leaves, kind="lora", hint=hint):
        merge(Held(alone=adapter(), fine=adapter(plain())))


class Scaled(nnx.LoRA):
    def __call__(self, x: Any) -> Any:
        return self.base_module(x) + 2 * (x @ self.lora_a @ self.lora_b)


class Other(nnx.LoRALinear):
    pass


class Own(nnx.Module):
    def __init__(self) -> None:
        self.kernel = nnx.Param(jnp.ones((3, 4)))
        self.left, self.right = nnx.LoRAParam(jnp.ones((3, 2))), nnx.LoRAParam(jnp.ones((2, 4)))


class Squared(nnx.Linear):
    def __call__(self, x: Any) -> Any:  # type: ignore[override]
        return super().__call__(x) ** 2


def test_what_is_not_of_flax_is_listed_at_once() -> None:
    model = Held(
        conv=adapter(nnx.Conv(3, 4, 1, rngs=nnx.Rngs(0))),
        heads=adapter(nnx.LinearGeneral(3, (2, 2), rngs=nnx.Rngs(0))),
        other=Other(3, 4, lora_rank=2, rngs=nnx.Rngs(0)),
        scaled=Scaled(3, 2, 4, base_module=plain(), rngs=nnx.Rngs(0)),
        squared=adapter(Squared(3, 4, rngs=nnx.Rngs(0))),
    )
    leaves = [
        "conv/lora_a: LoRAParam(3, 2) float32  kind=lora  (is added to Conv, which is not an nnx.Linear)",
        "heads/lora_a: LoRAParam(3, 2) float32  kind=lora  (is added to LinearGeneral, which is not an nnx.Linear)",
        "other/kernel: Param(3, 4) float32  kind=params  (is of Other, which is not Flax's own nnx.LoRALinear)",
        "scaled/lora_a: LoRAParam(3, 2) float32  kind=lora  (is of Scaled, which computes something else)",
        "squared/lora_a: LoRAParam(3, 2) float32  kind=lora  (is added to Squared, which is not an nnx.Linear)",
    ]
    state = sw.plan(model).take(model)
    with pytest.raises(sw.errors.StructureError) as caught:
        sw.merge_lora(state)
    assert sorted(str(leaf) for leaf in caught.value.leaves) == leaves
    assert caught.value.message == IN_THE_WAY.format("5 leaves are")
    assert caught.value.hint == LINEAR
    assert sw.plan(model).build(state) is not None  # nothing was donated


def test_parameters_of_adapters_elsewhere() -> None:
    note = "is not the lora_a or lora_b of an nnx.LoRA or nnx.LoRALinear that is merged"
    leaves = [
        f"own/left: LoRAParam(3, 2) float32  kind=lora  ({note})",
        f"own/right: LoRAParam(2, 4) float32  kind=lora  ({note})",
    ]
    with refused(sw.errors.StructureError, IN_THE_WAY.format("2 leaves are"), leaves=leaves, kind="lora", hint=LINEAR):
        merge(Held(own=Own(), fine=adapter(plain())))


def test_a_kernel_that_is_also_used_without_the_adapter() -> None:
    base, tied = plain(), plain()
    tied.kernel = base.kernel
    note = "is used with the adapter in one place, and without it in another"
    leaves = [f"adapted/base_module/kernel: Param(3, 4) float32  kind=params  ({note})"]
    for model in (Held(adapted=adapter(base), tied=tied), Held(adapted=adapter(base), direct=base)):
        with refused(
            sw.errors.StructureError,
            IN_THE_WAY.format("1 leaf is"),
            leaves=leaves,
            kind="params",
            hint="untie the kernel in the model, so that the merged one has a place of its own",
        ):
            merge(model)
    base.kernel = nnx.Param(jnp.array(base.kernel[...]))  # the hint
    assert len(merge(Held(adapted=adapter(base), tied=tied)).plan["params"]) == 4


def test_a_function_that_may_change_the_matrices() -> None:
    def doubled(arrays: Any, dtype: Any = None) -> Any:
        return arrays[0], arrays[1], 2 * arrays[2]

    note = "has a promote_dtype of its own, which may change more than dtypes"
    inner = nnx.LoRALinear(3, 4, lora_rank=2, lora_promote_dtype=doubled, rngs=nnx.Rngs(0))
    with refused(
        sw.errors.StructureError,
        IN_THE_WAY.format("2 leaves are"),
        leaves=[
            f"inner/lora/lora_a: LoRAParam(3, 2) float32  kind=lora  ({note})",
            f"outer/lora_a: LoRAParam(3, 2) float32  kind=lora  ({note})",
        ],
        kind="lora",
        hint=LINEAR,
    ):
        merge(Held(inner=inner, outer=adapter(plain(), promote_dtype=doubled)))


@pytest.mark.parametrize(
    ("option", "base"),
    [
        ("promote_dtype", nnx.Linear(3, 4, promote_dtype=lambda arrays, dtype=None: arrays, rngs=nnx.Rngs(0))),
        ("dot_general", nnx.Linear(3, 4, dot_general=lambda *args, **kw: 2.0, rngs=nnx.Rngs(0))),
        ("dot_general_cls", nnx.LinearGeneral(3, 4, dot_general_cls=lambda: None, rngs=nnx.Rngs(0))),
    ],
)
def test_a_layer_that_may_not_compute_the_product(option: str, base: Any) -> None:
    note = f"is of a layer with a {option} of its own, which may compute something other than the product"
    leaves = [f"layer/base_module/kernel: Param(3, 4) float32  kind=params  ({note})"]
    with refused(sw.errors.StructureError, IN_THE_WAY.format("1 leaf is"), leaves=leaves, kind="params", hint=LINEAR):
        merge(Held(layer=adapter(base)))


def test_a_product_of_its_own_under_the_adapter_of_flax() -> None:
    model = nnx.LoRALinear(3, 4, lora_rank=2, dot_general=lambda *args, **kw: 2.0, rngs=nnx.Rngs(0))
    note = "is of a layer with a dot_general of its own, which may compute something other than the product"
    leaves = [f"kernel: Param(3, 4) float32  kind=params  ({note})"]
    with refused(sw.errors.StructureError, IN_THE_WAY.format("1 leaf is"), leaves=leaves, kind="params", hint=LINEAR):
        merge(model)


def test_an_adapter_of_a_function() -> None:
    leaves = ["lora_a: LoRAParam(3, 2) float32  kind=lora  (is added to function, which is not an nnx.Linear)"]
    with refused(sw.errors.StructureError, IN_THE_WAY.format("1 leaf is"), leaves=leaves, kind="lora", hint=LINEAR):
        merge(adapter(lambda x: x))


def test_kinds_that_do_not_fit_the_plain_model() -> None:
    model = Held(layer=adapter(plain()))
    kinds = sw.Kinds(base=sw.Kind(sw.Path("**/base_module/*"), frozen=True), rest=sw.Kind(...))
    state = kinds.plan(model).take(model)
    with pytest.raises(sw.DeclarationError) as caught:
        sw.merge_lora(state)
    assert caught.value.message.startswith("The kinds do not fit the model without adapters. ")
    assert caught.value.hint == (
        "sw.merge_lora(sw.transfer(state, kinds.plan(model)))  # with kinds that fit both models"
    )
    kinds = sw.Kinds.standard()
    assert sw.merge_lora(sw.transfer(state, kinds.plan(model))).plan is kinds.plan(Held(layer=plain()))  # the hint


def test_what_would_be_lost() -> None:
    adapted = adapter(plain())
    adapted.extra = nnx.Variable(jnp.ones(()))
    note = "would be lost: it belongs to an adapter, and is neither lora_a nor lora_b"
    with refused(
        sw.errors.StructureError,
        IN_THE_WAY.format("1 leaf is"),
        leaves=[f"layer/extra: Variable() float32  kind=variables  ({note})"],
        kind="variables",
        hint="take it out of the nnx.LoRA",
    ):
        merge(Held(layer=adapted))


def test_shapes_and_dtypes_without_a_sum() -> None:
    integers = plain()
    integers.kernel = nnx.Param(jnp.ones((3, 4), jnp.int8))
    stacked = plain()
    stacked.kernel = nnx.Param(jnp.ones((3, 7, 4)))
    leaves = [
        "complex/base_module/kernel: Param(3, 4) float32  kind=params  (is float32, and its adapter complex64)",
        "integers/base_module/kernel: Param(3, 4) int8  kind=params  (is int8, to which no product is added)",
        "stacked/base_module/kernel: Param(3, 7, 4) float32  kind=params  "
        "(is (3, 7, 4), and its adapter (3, 2) and (2, 4))",
    ]
    with refused(
        sw.errors.StructureError,
        IN_THE_WAY.format("3 leaves are"),
        leaves=leaves,
        kind="params",
        hint="a kernel of the adapter's dtype\ndequantize it first\nlayers that are stacked along the first axis",
    ):
        merge(
            Held(
                complex=adapter(plain(), param_dtype=jnp.complex64),
                integers=adapter(integers),
                stacked=adapter(stacked),
            )
        )


def test_an_optimizer_inside_an_object() -> None:
    layer = adapter(plain())
    model = Held(layer=layer, optimizer=nnx.Optimizer(layer, optax.sgd(0.1), wrt=nnx.LoRAParam))
    note = "belongs to an nnx.Optimizer inside an object, which is made for the adapters"
    with refused(
        sw.errors.StructureError,
        IN_THE_WAY.format("1 leaf is"),
        leaves=[f"optimizer/step: OptState() uint32  kind=optimizer  ({note})"],
        kind="optimizer",
        hint="plan it beside the model: kinds.plan(model, optimizer)",
    ):
        merge(model)


def test_ensembles_and_values_per_device() -> None:
    model = adapter(plain(), b_initializer=ONES)
    plan = sw.plan(model)
    state = plan.stacked(2).stack([plan.take(model)] * 2)
    with refused(
        sw.errors.StructureError,
        "The adapters of an ensemble are merged member by member.",
        hint="merged = [sw.merge_lora(state.member(number)) for number in range(state.plan.members)]\n"
        "merged[0].plan.stacked(len(merged)).stack(merged)",
    ):
        sw.merge_lora(state)
    merged = [sw.merge_lora(state.member(number)) for number in range(state.plan.members or 0)]  # the hint
    stacked = merged[0].plan.stacked(len(merged)).stack(merged)
    assert stacked["params"]["kernel"].shape == (2, 3, 4)

    kinds = sw.Kinds.standard().replace(lora=sw.Kind(nnx.LoRAParam, placement=sw.PerDevice("data")))
    state = kinds.plan(model).take(model, mesh=jax.make_mesh((2,), ("data",), devices=jax.devices()[:2]))
    note = "has a value for each device"
    with refused(
        sw.errors.StructureError,
        "2 leaves have no single value to merge.",
        leaves=[
            f"lora_a: LoRAParam(3, 2) float32  kind=lora  ({note})",
            f"lora_b: LoRAParam(2, 4) float32  kind=lora  ({note})",
        ],
        kind="lora",
        hint="sw.merge_lora(state.reduce_devices('lora', how='mean'))  # or how='first'",
    ):
        sw.merge_lora(state)
    sw.merge_lora(state.reduce_devices("lora", how="mean"))  # the hint


def test_a_sum_that_the_kernel_cannot_represent() -> None:
    base = nnx.Linear(3, 4, use_bias=False, param_dtype=jnp.float16, rngs=nnx.Rngs(0))
    model = adapter(base, a_initializer=ONES, b_initializer=nnx.initializers.constant(1e5))
    state = sw.plan(model).take(model)
    note = "the sum has numbers that float16 cannot represent"
    with refused(
        sw.errors.StructureError,
        "1 leaf cannot hold what their adapters add. Nothing was merged.",
        leaves=[f"base_module/kernel: Param(3, 4) float16  kind=params  ({note})"],
        kind="params",
        hint="sw.merge_lora(state.cast(params='float32'))",
    ):
        sw.merge_lora(state)
    assert sw.merge_lora(state.cast(params="float32"))["params"]["kernel"].dtype == jnp.float32  # the hint


def test_states_without_values() -> None:
    model = adapter(plain())
    state = sw.plan(model).take(model)
    jax.tree.leaves(state)[0].delete()
    with pytest.raises(sw.errors.StructureError, match="was donated"):
        sw.merge_lora(state)
    states = jax.tree.map(lambda array: jnp.stack([array, array]), sw.plan(model).take(model))
    with pytest.raises(sw.errors.StructureError, match="do not have the shapes"):
        sw.merge_lora(states)
