"""Rules of training: what an optimizer updates although it should not, and what its state holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax.numpy as jnp
from flax import nnx

from statewise._src.common.paths import Leaf
from statewise._src.common.problems import counted
from statewise._src.common.tables import format_bytes
from statewise._src.filters.explain import as_code
from statewise._src.inspect.kind_hints import kind_apart
from statewise._src.inspect.lint.finding import Found, Rules, kind_with
from statewise._src.inspect.lint.subject import Subject
from statewise._src.inspect.lint.training import trainings

__all__ = ["RULES"]

RULES = Rules()

# The collection of such values in flax.linen.fp8_ops, and the type of its variables in NNX.
_OVERWRITE_WITH_GRADIENT = "_overwrite_with_gradient"


@RULES.rule(
    "base-trained-under-lora",
    "nnx.Param means nnx.LoRAParam too: the base drifts away from the one that the adapter is saved for",
)
def base_trained_under_lora(subject: Subject) -> Iterator[Found]:
    """Finds base weights that are trained together with their adapters."""
    adapters = subject.of_type(nnx.LoRAParam)
    base = set(subject.of_type(nnx.Param)) - set(adapters) - subject.averages
    if not adapters or not base:
        return
    # Of several optimizers that train a leaf, the last one is named.
    by_all = {number: training for training in trainings(subject) for number in training.trained if number in base}
    # A new head is often fully trained beside adapters; a weight under an adapter is not.
    under = _under(subject, adapters, base)
    wrong = sorted(by_all if len(by_all) == len(base) else under & set(by_all))
    if wrong:
        training = by_all[wrong[0]]
        yield Found(
            f"{training.label} trains {counted(len(wrong), 'base weight', 'base weights')} beside the adapters.",
            subject.rows(wrong),
            "kinds.plan(model, optimizers={'lora': tx}), where params=sw.Kind(nnx.All(nnx.Param, "
            "nnx.Not(nnx.LoRAParam)), frozen=True)"
            if training.kinds
            else "nnx.Optimizer(model, tx, wrt=nnx.LoRAParam), and sw.value_and_grad(loss, wrt=nnx.LoRAParam)",
        )
    elif subject.declared and not by_all:
        yield from _one_kind(subject, adapters, base)


def _under(subject: Subject, adapters: Sequence[int], base: set[int]) -> set[int]:
    """Returns the base weights that an adapter is added to."""
    paths = subject.paths
    modules = {paths[number][:-1] for number in adapters}
    # In `LoRALinear` the base is beside the module `lora`; in `LoRA` it is in `base_module`.
    return {
        number
        for number in base
        if any(
            paths[number][: len(module) + 1] == (*module, "base_module")
            or (module and module[-1] == "lora" and paths[number][:-1] == module[:-1])
            for module in modules
        )
    }


def _one_kind(subject: Subject, adapters: Sequence[int], base: set[int]) -> Iterator[Found]:
    """Finds kinds without an optimizer so far that contain both adapters and their base."""
    for name in dict.fromkeys(subject.claims[number] for number in adapters):
        mixed = [number for number in sorted(base) if subject.claims[number] == name]
        if name is not None and mixed and not subject.kinds[name].frozen and not subject.kinds[name].rest:
            yield Found(
                f"The kind {name!r} holds the adapters and {counted(len(mixed), 'base weight', 'base weights')}.",
                subject.rows(mixed),
                f"kinds = kinds.replace({name}=sw.Kind(nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam)), frozen=True)) "
                "| sw.Kinds(lora=sw.Kind(nnx.LoRAParam))",
            )


@RULES.rule(
    "cache-without-dependence",
    "after a train step the cache is still that of the old weights, and decoding goes on with it without an error",
)
def cache_without_dependence(subject: Subject) -> Iterator[Found]:
    """Finds caches, in a plan that trains, that do not say which kinds they are made from."""
    updated = {number for training in trainings(subject) for number in training.trained} if subject.plan else set()
    trained = {subject.claims[number] for number in updated}
    sources = tuple(name for name in subject.kinds if name in trained)
    by_kind: dict[str, list[int]] = {}
    for number in subject.of_type(nnx.Cache) if updated else ():
        name = subject.claims[number]
        if name is not None and name not in sources and not subject.kinds[name].depends_on:
            by_kind.setdefault(name, []).append(number)
    for name, numbers in by_kind.items():
        depends_on = f"depends_on={sources!r}"
        yield Found(
            f"The kind {name!r} holds {counted(len(numbers), 'leaf', 'leaves')} of the cache, and depends on nothing "
            f"that is trained.",
            subject.rows(numbers),
            f"kinds = kinds | sw.Kinds(cache=sw.Kind(nnx.Cache, saved=False, restart=jnp.zeros_like, {depends_on}))"
            if subject.kinds[name].rest
            else kind_with(name, depends_on),
        )


@RULES.rule(
    "half-precision-moments",
    "an average that moves by a thousandth does not move in bfloat16; squares of small gradients are 0 in float16",
)
def half_precision_moments(subject: Subject) -> Iterator[Found]:
    """Finds optimizer state in half precision."""
    for training in trainings(subject):
        half = tuple(filter(_is_too_short, training.moments))
        if half:
            yield Found(
                f"{training.label} keeps {counted(len(half), 'array', 'arrays')} of its state in half precision.",
                half,
                "keep the parameters in float32 and compute in bfloat16: nnx.Linear(..., dtype=jnp.bfloat16)\n"
                "or keep only the first moment in bfloat16: optax.adam(..., mu_dtype=jnp.bfloat16)",
            )


def _is_too_short(leaf: Leaf) -> bool:
    """Returns whether a moment is in half precision, except averages that forget quickly, which may be in bfloat16."""
    if leaf.dtype is None or not jnp.issubdtype(leaf.dtype, jnp.floating) or jnp.finfo(leaf.dtype).bits >= 32:
        return False
    # Optax itself offers bfloat16 for these two, as `mu_dtype` and `accumulator_dtype`.
    return leaf.dtype != jnp.bfloat16 or not {"mu", "trace"} & set(map(str, leaf.path))


@RULES.rule(
    "half-precision-parameters",
    "updates smaller than a 256th (bfloat16) or a 2048th (float16) of a weight are lost to rounding",
)
def half_precision_parameters(subject: Subject) -> Iterator[Found]:
    """Finds trained parameters in half precision."""
    for training in trainings(subject):
        floating = filter(subject.is_floating, training.trained)
        half = [number for number in floating if jnp.finfo(subject.dtype(number)).bits < 32]
        if half:
            yield Found(
                f"{training.label} trains {counted(len(half), 'parameter', 'parameters')} in half precision.",
                subject.rows(half),
                "nnx.Linear(..., dtype=jnp.bfloat16, param_dtype=jnp.float32)  # computes in half, keeps in full",
            )


@RULES.rule(
    "rounded-by-a-step",
    "a step stores what it made in the compute dtype: all of a leaf is rounded, and small updates before it are lost",
)
def rounded_by_a_step(subject: Subject) -> Iterator[Found]:
    """Finds steps that write trained parameters which they see in a compute dtype with fewer bits."""
    if subject.plan is None:
        return
    rounded: dict[str, list[int]] = {}
    for number in sorted({number for training in trainings(subject) for number in training.trained}):
        kind = subject.kind(number)
        compute = None if kind is None or not subject.is_floating(number) else kind.compute
        if compute is not None and jnp.finfo(compute).bits < jnp.finfo(subject.dtype(number)).bits:
            rounded.setdefault(str(subject.claims[number]), []).append(number)
    for step in subject.steps if rounded else ():
        for name in step.contract_of(subject.plan, step.name).named:
            if name in rounded:
                yield Found(
                    f"{step.name} writes the kind {name!r}, which it sees in {subject.kinds[name].compute}.",
                    subject.rows(rounded[name]),
                    f"state = state.replace({name}=rule(state[{name!r}]))"
                    f"  # instead of the step, in a jax.jit: there they are {subject.dtype(rounded[name][0])}",
                )


@RULES.rule(
    "optimizer-state-for-frozen",
    "the moments take memory for nothing, and weight decay moves what is declared frozen",
)
def optimizer_state_for_frozen(subject: Subject) -> Iterator[Found]:
    """Finds optimizers that were set up for leaves of frozen kinds."""
    for training in trainings(subject):
        frozen = list(filter(subject.is_frozen, training.trained))
        if frozen:
            # A moment's path ends with that of its parameter.
            tails = [training.trained[number] for number in frozen]
            moments = (leaf for leaf in training.moments if any(leaf.path[-len(tail) :] == tail for tail in tails))
            nbytes = sum(leaf.nbytes for leaf in moments)
            yield Found(
                f"{training.label} is set up for {counted(len(frozen), 'leaf', 'leaves')} that the kinds declare frozen"
                + (f", and holds {format_bytes(nbytes)} for them." if nbytes else "."),
                subject.rows(frozen),
                "nnx.Optimizer(model, tx, wrt=...) with a filter that only matches what is trained\n"
                "or kinds.plan(model, optimizers={...}), which rejects an optimizer of a frozen kind",
            )


@RULES.rule(
    "scale-not-overwritten",
    "their gradient is their next value, which is lost: at the old scale, fp8 rounds small gradients to zero",
)
def scale_not_overwritten(subject: Subject) -> Iterator[Found]:
    """Finds scales and amax histories of fp8 layers whose gradient is not stored."""
    scales = [number for number in _scales(subject) if not subject.is_frozen(number)]
    for training in trainings(subject):
        wrong = [number for number in scales if number in training.trained]
        if wrong and not training.overwrites:
            values = counted(len(wrong), "value that its", "values that their")
            yield Found(
                f"{training.label} trains {values} gradient replaces.", subject.rows(wrong), _stored(subject, wrong)
            )
        scales = [number for number in scales if number not in training.trained]
    if scales and subject.plan and subject.plan.optimizers:
        values = counted(
            len(scales), "value that its gradient replaces has", "values that their gradient replaces have"
        )
        yield Found(f"{values} no optimizer.", subject.rows(scales), _stored(subject, scales))


def _scales(subject: Subject) -> list[int]:
    """Returns the leaves of Flax's collection of such values, and of a class that has its name."""
    names = {cls: cls.__name__.replace("_", "").lower() for cls in set(subject.types)}
    return subject.of_type(*(cls for cls, name in names.items() if name == "overwritewithgradient"))


def _stored(subject: Subject, numbers: Sequence[int]) -> str:
    """Returns the code that stores the gradients of leaves: with a kind of their own, if they have none."""
    name, cls = str(subject.claims[numbers[0]]), subject.types[numbers[0]]
    is_flaxs = cls.__name__ == _OVERWRITE_WITH_GRADIENT
    of = f"nnx.variable_type_from_name({cls.__name__!r}, allow_register=True)" if is_flaxs else as_code(cls)
    is_alone = subject.claims.count(name) == len(numbers) and not subject.kinds[name].rest
    declaration, own = ("", name) if is_alone else kind_apart(subject.kinds, name, "fp8", of)
    lines = [declaration] if declaration else []
    stored = f"{own!r}: sw.overwrite_with_gradient()"
    lines.append(f"kinds.plan(model, optimizers={{'params': tx, {stored}}})")
    return "\n".join(lines)


@RULES.rule("optimizer-of-another-model", "the update fails, or leaves out what was added since")
def optimizer_of_another_model(subject: Subject) -> Iterator[Found]:
    """Finds moments of leaves that the model does not have."""
    for training in trainings(subject):
        if training.orphans:
            moments = counted(len(training.orphans), "moment", "moments")
            yield Found(
                f"{training.label} holds {moments} for leaves that the model does not have.",
                training.orphans,
                "make the optimizer after the last change of the model: nnx.Optimizer(model, tx, wrt=nnx.Param)",
            )


@RULES.rule(
    "ema-over-non-floats",
    "an average of integers is truncated to an integer at each update and stays the same; one of keys fails",
)
def ema_over_non_floats(subject: Subject) -> Iterator[Found]:
    """Finds averages of integers, booleans and keys."""
    wrong = [number for number in sorted(subject.averages) if not subject.is_inexact(number)]
    if wrong:
        yield Found(
            f"An nnx.EMA averages {counted(len(wrong), 'leaf that is', 'leaves that are')} not floating-point.",
            subject.rows(wrong),
            "nnx.EMA(model, decay, only=nnx.Param)",
        )


@RULES.rule(
    "trained-averages", "the copies are Params too: the optimizer moves them, and they are not averages any more"
)
def trained_averages(subject: Subject) -> Iterator[Found]:
    """Finds the copies of an `nnx.EMA` among the leaves that are trained."""
    for training in trainings(subject):
        wrong = sorted(subject.averages.intersection(training.trained))
        if wrong:
            yield Found(
                f"{training.label} trains {counted(len(wrong), 'copy', 'copies')} that an nnx.EMA keeps.",
                subject.rows(wrong),
                "kinds = kinds.replace(params=sw.Kind(nnx.All(nnx.Param, nnx.Not(sw.Path('params/**'))))) "
                "| sw.Kinds(ema=sw.Kind(nnx.Param & sw.Path('params/**')))",
            )
