"""Rules of training: what an optimizer updates that it should not, and what it keeps."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import statewise as sw
from linted import clean, codes, finds

LORA = sw.Kinds(params=sw.Kind(nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam)), frozen=True), lora=sw.Kind(nnx.LoRAParam))
HALF = "keep the parameters in float32 and compute in bfloat16: nnx.Linear(..., dtype=jnp.bfloat16)\n"
HALF += "or keep only the first moment in bfloat16: optax.adam(..., mu_dtype=jnp.bfloat16)"


def adapted() -> nnx.LoRALinear:
    return nnx.LoRALinear(2, 3, lora_rank=1, use_bias=False, rngs=nnx.Rngs(0))


def linear(**options: Any) -> nnx.Linear:
    return nnx.Linear(2, 3, use_bias=False, rngs=nnx.Rngs(0), **options)


def optimizer(model: Any, tx: Any = None, wrt: Any = nnx.Param) -> nnx.Optimizer:
    return nnx.Optimizer(model, optax.adam(1e-3) if tx is None else tx, wrt=wrt)


def moment_type() -> str:
    """Flax's type of a moment that is shaped like a parameter."""
    return "OptArray" if nnx.var_defaults().hijax else "OptVariable"


# --- LoRA ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tx", [optax.adam(1e-3), optax.sgd(0.1)], ids=["with moments", "without"])
def test_an_optimizer_of_params_trains_the_base_of_an_adapter(tx: Any) -> None:
    model = adapted()
    finds(
        "base-trained-under-lora",
        "The nnx.Optimizer at 1 trains 1 base weight beside the adapters.",
        ["0/kernel: Param(2, 3) float32  kind=params"],
        "nnx.Optimizer(model, tx, wrt=nnx.LoRAParam), and sw.value_and_grad(loss, wrt=nnx.LoRAParam)",
        model,
        optimizer(model, tx),
    )
    clean(model, optimizer(model, tx, nnx.LoRAParam))


def test_a_plan_that_trains_the_base_of_an_adapter() -> None:
    finds(
        "base-trained-under-lora",
        "The optimizer of params trains 1 base weight beside the adapters.",
        ["kernel: Param(2, 3) float32  kind=params"],
        "kinds.plan(model, optimizers={'lora': tx}), where params=sw.Kind(nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam)), "
        "frozen=True)",
        sw.plan(adapted(), optimizers={"params": optax.sgd(0.1), "lora": optax.sgd(0.1)}),
    )
    clean(LORA.plan(adapted(), optimizers={"lora": optax.sgd(0.1)}))


def test_kinds_that_cannot_tell_adapters_from_their_base() -> None:
    finds(
        "base-trained-under-lora",
        "The kind 'params' holds the adapters and 1 base weight.",
        ["kernel: Param(2, 3) float32  kind=params"],
        "kinds = kinds.replace(params=sw.Kind(nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam)), frozen=True)) "
        "| sw.Kinds(lora=sw.Kind(nnx.LoRAParam))",
        adapted(),
        kinds=sw.Kinds(params=sw.Kind(nnx.Param)),
    )
    clean(adapted(), kinds=LORA)
    clean(adapted(), kinds=sw.Kinds(params=sw.Kind(nnx.Param, frozen=True)))
    clean(adapted())


def test_a_head_may_be_trained_whole_beside_adapters() -> None:
    model = nnx.Dict(body=adapted(), head=linear())
    clean(model, optimizer(model, wrt=nnx.Any(nnx.LoRAParam, sw.Path("head/**"))))
    assert codes(model, optimizer(model)) == ["base-trained-under-lora"]


def test_the_base_module_of_an_adapter_is_its_base() -> None:
    model = nnx.Dict(
        body=nnx.LoRA(2, 1, 3, base_module=linear(), rngs=nnx.Rngs(0)),
        head=linear(),
    )
    wrt = sw.Path("body/**")
    assert codes(model, optimizer(model, wrt=wrt)) == ["base-trained-under-lora"]


# --- precision -----------------------------------------------------------------------------------------------


def test_moments_in_half_precision_of_an_optimizer() -> None:
    model = linear(param_dtype=jnp.bfloat16)
    finds(
        "half-precision-moments",
        "The nnx.Optimizer at 1 keeps 1 array of its state in half precision.",
        [f"1/opt_state/0/nu/kernel: {moment_type()}(2, 3) bfloat16  kind=optimizer"],
        HALF,
        model,
        optimizer(model),
        ignore=["half-precision-parameters"],
    )


@pytest.mark.parametrize(("dtype", "names"), [("bfloat16", ["nu"]), ("float16", ["mu", "nu"])])
def test_moments_in_half_precision_of_a_plan(dtype: str, names: list[str]) -> None:
    plan = sw.plan(linear(param_dtype=jnp.dtype(dtype)), optimizers={"params": optax.adam(1e-3)})
    arrays = "1 array" if len(names) == 1 else "2 arrays"
    finds(
        "half-precision-moments",
        f"The optimizer of params keeps {arrays} of its state in half precision.",
        [f"optimizer/params/0/{name}/kernel: Array(2, 3) {dtype}  kind=optimizer" for name in names],
        HALF,
        plan,
        ignore=["half-precision-parameters"],
    )


def test_a_state_that_was_cast_has_the_moments_that_it_has() -> None:
    model = linear()
    state = sw.plan(model, optimizers={"params": optax.adam(1e-3)}).take(model)
    clean(state)
    assert codes(state.cast(optimizer="bfloat16")) == ["half-precision-moments"]


def test_the_first_moment_may_be_short() -> None:
    clean(sw.plan(linear(), optimizers={"params": optax.adam(1e-3, mu_dtype=jnp.bfloat16)}))
    clean(sw.plan(linear(), optimizers={"params": optax.sgd(0.1, momentum=0.9, accumulator_dtype=jnp.bfloat16)}))


def test_parameters_in_half_precision_that_are_trained() -> None:
    model = linear(param_dtype=jnp.bfloat16)
    finds(
        "half-precision-parameters",
        "The nnx.Optimizer at 1 trains 1 parameter in half precision.",
        ["0/kernel: Param(2, 3) bfloat16  kind=params"],
        "nnx.Linear(..., dtype=jnp.bfloat16, param_dtype=jnp.float32)  # computes in half, keeps in full",
        model,
        optimizer(model, optax.sgd(0.1)),
    )
    clean(model)
    clean(linear(), optimizer(linear(), optax.sgd(0.1)))


@pytest.mark.parametrize("decorator", [sw.step, sw.train_step])
def test_a_step_that_rounds_what_an_optimizer_trains(decorator: Any) -> None:
    def clip(model: Any) -> Any:
        model.kernel[...] = jnp.clip(model.kernel[...], -1, 1)
        return model.kernel[...].sum()

    def plan_of(compute: Any, **optimizers: Any) -> sw.Plan:
        return sw.Kinds(params=sw.Kind(nnx.Param, compute=compute)).plan(linear(), optimizers=optimizers)

    rounding, sgd = decorator(clip, writes="params"), optax.sgd(0.1)
    finds(
        "rounded-by-a-step",
        "clip writes the kind 'params', which it sees in bfloat16.",
        ["kernel: Param(2, 3) float32  kind=params"],
        "state = state.replace(params=rule(state['params']))"
        "  # instead of the step, in a jax.jit: there they are float32",
        plan_of("bfloat16", params=sgd),
        steps=rounding,
    )
    clean(plan_of("bfloat16", params=sgd), steps=[sw.step(clip), sw.train_step(clip)])
    clean(plan_of("bfloat16"), steps=rounding)
    clean(plan_of("float32", params=sgd), steps=rounding)
    clean(linear(), steps=rounding)


# --- what an optimizer holds ---------------------------------------------------------------------------------


def parts() -> nnx.Dict:
    return nnx.Dict(base=linear(), head=nnx.Linear(3, 1, use_bias=False, rngs=nnx.Rngs(1)))


FROZEN_BASE = sw.Kinds(
    base=sw.Kind(nnx.Param & sw.Path("base/**"), frozen=True),
    head=sw.Kind(nnx.Param & sw.Path("head/**")),
    optimizer=sw.Kind(nnx.OptState),
)


@pytest.mark.parametrize(("tx", "held"), [(optax.adam(1e-3), ", and holds 48 B for them."), (optax.sgd(0.1), ".")])
def test_an_optimizer_for_frozen_leaves(tx: Any, held: str) -> None:
    model = parts()
    finds(
        "optimizer-state-for-frozen",
        f"The nnx.Optimizer at 1 is set up for 1 leaf that the kinds declare frozen{held}",
        ["0/base/kernel: Param(2, 3) float32  kind=base"],
        "nnx.Optimizer(model, tx, wrt=...) with a filter that only matches what is trained\n"
        "or kinds.plan(model, optimizers={...}), which rejects an optimizer of a frozen kind",
        model,
        optimizer(model, tx),
        kinds=FROZEN_BASE,
    )
    clean(model, optimizer(model, tx, sw.Path("head/**")), kinds=FROZEN_BASE)


def test_an_optimizer_that_masks_the_frozen_leaves_is_fine(container: type) -> None:
    model = parts()
    mask = container({"base": {"kernel": False}, "head": {"kernel": True}})
    clean(model, optimizer(model, optax.masked(optax.adam(1e-3), mask)), kinds=FROZEN_BASE)


@pytest.mark.usefixtures("hijax")
def test_each_optimizer_is_matched_with_its_own_model() -> None:
    generator, critic = nnx.Dict(g=linear()), nnx.Dict(d=linear())
    kinds = FROZEN_BASE.replace(
        base=sw.Kind(nnx.Param & sw.Path("g/**"), frozen=True), head=sw.Kind(nnx.Param & sw.Path("d/**"))
    )
    clean(generator, critic, optimizer(critic), kinds=kinds)
    clean(generator, critic, optimizer(critic, optax.sgd(0.1)), kinds=kinds)
    assert codes(generator, critic, optimizer(generator), kinds=kinds) == ["optimizer-state-for-frozen"]


def test_an_optimizer_inside_a_trainer_is_found() -> None:
    model = adapted()
    trainer = nnx.Dict(model=model, tx=optimizer(model))
    assert [str(found) for found in sw.lint(trainer)] == [
        "base-trained-under-lora: The nnx.Optimizer at tx trains 1 base weight beside the adapters. (model/kernel)"
    ]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_optimizer_that_holds_its_model() -> None:
    model = adapted()
    (found,) = sw.lint(nnx.ModelAndOptimizer(model, optax.adam(1e-3)))
    assert str(found) == (
        "base-trained-under-lora: The nnx.Optimizer trains 1 base weight beside the adapters. (model/kernel)"
    )
    plain = linear()
    clean(nnx.ModelAndOptimizer(plain, optax.adam(1e-3)))
    assert codes(nnx.ModelAndOptimizer(plain, optax.adam(1e-3)), plain) == ["tied-weights"]
    assert codes(plain, nnx.ModelAndOptimizer(plain, optax.adam(1e-3))) == ["tied-weights"]


@pytest.mark.usefixtures("hijax")
def test_moments_of_leaves_that_are_gone() -> None:
    model = nnx.Dict(old=linear())
    tx = optimizer(model)
    model.new = linear()
    del model.old
    finds(
        "optimizer-of-another-model",
        "The nnx.Optimizer at 1 holds 2 moments for leaves that the model does not have.",
        [
            f"1/opt_state/0/mu/old/kernel: {moment_type()}(2, 3) float32  kind=optimizer",
            f"1/opt_state/0/nu/old/kernel: {moment_type()}(2, 3) float32  kind=optimizer",
        ],
        "make the optimizer after the last change of the model: nnx.Optimizer(model, tx, wrt=nnx.Param)",
        model,
        tx,
    )
    clean(model, optimizer(model))
    clean(optimizer(model))


@pytest.mark.parametrize(
    "tx",
    [
        optax.adamw(1e-3),
        optax.sgd(0.1, momentum=0.9),
        optax.adafactor(1e-3, min_dim_size_to_factor=2),
        optax.chain(optax.clip_by_global_norm(1.0), optax.lion(1e-3)),
        optax.MultiSteps(optax.adam(1e-3), 2).gradient_transformation(),
        optax.inject_hyperparams(optax.adam)(learning_rate=1e-3),
        optax.rmsprop(1e-3),
    ],
    ids=["adamw", "momentum", "adafactor", "lion", "multisteps", "hyperparams", "rmsprop"],
)
def test_the_optimizers_of_optax_are_fine(tx: Any) -> None:
    model = parts()
    clean(model, optimizer(model, tx))
    clean(sw.plan(model, optimizers={"params": tx}))


# --- averages ------------------------------------------------------------------------------------------------


def test_an_average_of_integers_and_keys() -> None:
    model = nnx.Dict(w=nnx.Param(jnp.ones(2)), drop=nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
    finds(
        "ema-over-non-floats",
        "An nnx.EMA averages 2 leaves that are not floating-point.",
        [
            "1/params/drop/rngs/count: RngCount() uint32  kind=rng",
            "1/params/drop/rngs/key: RngKey() key<fry>  kind=rng",
        ],
        "nnx.EMA(model, decay, only=nnx.Param)",
        model,
        nnx.EMA(model, decay=0.9),
    )
    clean(model, nnx.EMA(model, decay=0.9, only=nnx.Param))


def test_copies_of_an_average_among_what_is_trained() -> None:
    model = linear()
    ema = nnx.EMA(model, decay=0.9)
    plan = functools.partial(sw.Kinds.plan, optimizers={"params": optax.sgd(0.1)})
    finds(
        "trained-averages",
        "The optimizer of params trains 1 copy that an nnx.EMA keeps.",
        ["1/params/kernel: Param(2, 3) float32  kind=params"],
        "kinds = kinds.replace(params=sw.Kind(nnx.All(nnx.Param, nnx.Not(sw.Path('params/**'))))) "
        "| sw.Kinds(ema=sw.Kind(nnx.Param & sw.Path('params/**')))",
        plan(sw.Kinds.standard(), model, ema),
    )
    clean(sw.plan(model, ema))
    clean(model, ema, optimizer(model))


def test_the_hint_of_trained_averages_works() -> None:
    model = linear()
    objects = (model, nnx.EMA(model, decay=0.9))
    kinds = sw.Kinds(params=sw.Kind(nnx.Param))
    (found,) = sw.lint(kinds.plan(*objects, optimizers={"params": optax.sgd(0.1)}))
    scope = {"kinds": kinds, "sw": sw, "nnx": nnx}
    exec(found.hint, scope)
    clean(scope["kinds"].plan(*objects, optimizers={"params": optax.sgd(0.1)}))
