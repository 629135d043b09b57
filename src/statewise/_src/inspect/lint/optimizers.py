"""Rules of training: what an optimizer updates that it should not, and what it keeps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax.numpy as jnp
from flax import nnx

from statewise._src.common.paths import Leaf
from statewise._src.common.problems import counted
from statewise._src.common.tables import format_bytes
from statewise._src.inspect.lint.finding import Found, Rule
from statewise._src.inspect.lint.subject import Subject
from statewise._src.inspect.lint.training import Training, trainings

__all__ = ["RULES"]


def _base(subject: Subject) -> Iterator[Found]:
    adapters = subject.of_type(nnx.LoRAParam)
    base = set(subject.of_type(nnx.Param)) - set(adapters) - subject.averages
    if not adapters or not base:
        return
    by_all = {number: training for training in trainings(subject) for number in training.trained if number in base}
    # A new head is often trained whole, beside adapters; what stands under an adapter is not.
    under = _under(subject, adapters, base)
    wrong = sorted(by_all if len(by_all) == len(base) else under & set(by_all))
    if wrong:
        training = by_all[wrong[0]]
        leaves = counted(len(wrong), "base weight", "base weights")
        yield Found(
            f"{training.label} trains {leaves} beside the adapters.", subject.rows(wrong), _train_adapters(training)
        )
    elif subject.declared and not by_all:
        yield from _one_kind(subject, adapters, base)


def _under(subject: Subject, adapters: Sequence[int], base: set[int]) -> set[int]:
    """The base weights that an adapter is added to: of `LoRALinear` beside `lora`, of `LoRA` in `base_module`."""
    paths = subject.found.paths
    modules = {paths[number][:-1] for number in adapters}
    return {
        number
        for number in base
        if any(
            paths[number][: len(module) + 1] == (*module, "base_module")
            or (module and module[-1] == "lora" and paths[number][:-1] == module[:-1])
            for module in modules
        )
    }


def _train_adapters(training: Training) -> str:
    if not training.kinds:
        return "nnx.Optimizer(model, tx, wrt=nnx.LoRAParam), and sw.value_and_grad(loss, wrt=nnx.LoRAParam)"
    return (
        "kinds.plan(model, optimizers={'lora': tx}), where params=sw.Kind(nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam)), "
        "frozen=True)"
    )


def _one_kind(subject: Subject, adapters: Sequence[int], base: set[int]) -> Iterator[Found]:
    """Kinds without an optimizer yet, in which adapters cannot be told from their base."""
    for kind in dict.fromkeys(subject.claims[number] for number in adapters):
        mixed = [number for number in sorted(base) if subject.claims[number] == kind]
        if kind is not None and mixed and not subject.kinds[kind].frozen and not subject.kinds[kind].rest:
            yield Found(
                f"The kind {kind!r} holds the adapters and {len(mixed)} base weights.",
                subject.rows(mixed),
                f"kinds = kinds.replace({kind}=sw.Kind(nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam)), frozen=True)) "
                "| sw.Kinds(lora=sw.Kind(nnx.LoRAParam))",
            )


def _half_moments(subject: Subject) -> Iterator[Found]:
    for training in trainings(subject):
        half = [leaf for leaf in training.moments if _too_short(leaf)]
        if half:
            arrays = counted(len(half), "array", "arrays")
            yield Found(
                f"{training.label} keeps {arrays} of its state in half precision.",
                tuple(half),
                "keep the parameters in float32 and compute in bfloat16: nnx.Linear(..., dtype=jnp.bfloat16)\n"
                "or keep the first moment alone in bfloat16: optax.adam(..., mu_dtype=jnp.bfloat16)",
            )


def _too_short(leaf: Leaf) -> bool:
    """Half precision, but for averages that forget quickly, which Optax offers to keep in bfloat16."""
    if leaf.dtype is None or not jnp.issubdtype(leaf.dtype, jnp.floating) or jnp.finfo(leaf.dtype).bits >= 32:
        return False
    return leaf.dtype != jnp.bfloat16 or not {"mu", "trace"} & set(map(str, leaf.path))


def _half_parameters(subject: Subject) -> Iterator[Found]:
    for training in trainings(subject):
        half = [
            number
            for number in training.trained
            if subject.floating(number) and jnp.finfo(subject.dtype(number)).bits < 32
        ]
        if half:
            params = counted(len(half), "parameter", "parameters")
            yield Found(
                f"{training.label} trains {params} in half precision.",
                subject.rows(half),
                "nnx.Linear(..., dtype=jnp.bfloat16, param_dtype=jnp.float32)  # computes in half, keeps in full",
            )


def _frozen(subject: Subject) -> Iterator[Found]:
    for training in trainings(subject):
        frozen = [
            number
            for number in training.trained
            if (kind := subject.claims[number]) is not None and subject.kinds[kind].frozen
        ]
        if frozen:
            tails = [training.trained[number] for number in frozen]
            held = sum(
                leaf.nbytes for leaf in training.moments if any(leaf.path[-len(tail) :] == tail for tail in tails)
            )
            leaves = counted(len(frozen), "leaf", "leaves")
            yield Found(
                f"{training.label} is set up for {leaves} that the kinds declare frozen"
                + (f", and holds {format_bytes(held)} for them." if held else "."),
                subject.rows(frozen),
                "nnx.Optimizer(model, tx, wrt=...) with a filter of what is trained\n"
                "or kinds.plan(model, optimizers={...}), where an optimizer of a frozen kind is refused",
            )


def _orphans(subject: Subject) -> Iterator[Found]:
    for training in trainings(subject):
        if training.orphans:
            moments = counted(len(training.orphans), "moment", "moments")
            yield Found(
                f"{training.label} holds {moments} for leaves that the model does not have.",
                training.orphans,
                "make the optimizer after the last change of the model: nnx.Optimizer(model, tx, wrt=nnx.Param)",
            )


def _averaged(subject: Subject) -> Iterator[Found]:
    wrong = [
        number
        for number in sorted(subject.averages)
        if (dtype := subject.dtype(number)) is not None and not jnp.issubdtype(dtype, jnp.inexact)
    ]
    if wrong:
        leaves = counted(len(wrong), "leaf", "leaves")
        yield Found(
            f"An nnx.EMA averages {leaves} that no average is of.",
            subject.rows(wrong),
            "nnx.EMA(model, decay, only=nnx.Param)",
        )


def _trained_averages(subject: Subject) -> Iterator[Found]:
    for training in trainings(subject):
        wrong = sorted(subject.averages.intersection(training.trained))
        if wrong:
            leaves = counted(len(wrong), "copy", "copies")
            yield Found(
                f"{training.label} trains {leaves} that an nnx.EMA keeps.",
                subject.rows(wrong),
                "kinds = kinds.replace(params=sw.Kind(nnx.All(nnx.Param, nnx.Not(sw.Path('params/**'))))) "
                "| sw.Kinds(ema=sw.Kind(nnx.Param & sw.Path('params/**')))",
            )


RULES = (
    Rule(
        "base-trained-under-lora",
        "nnx.Param means nnx.LoRAParam too: the base drifts away from the one that the adapter is saved for",
        _base,
    ),
    Rule(
        "half-precision-moments",
        "an average that moves by a thousandth stands still in bfloat16; squares of small gradients are 0 in float16",
        _half_moments,
    ),
    Rule(
        "half-precision-parameters",
        "updates smaller than a 256th (bfloat16) or a 2048th (float16) of a weight are lost to rounding",
        _half_parameters,
    ),
    Rule(
        "optimizer-state-for-frozen",
        "the moments take memory for nothing, and weight decay moves what is declared frozen",
        _frozen,
    ),
    Rule(
        "optimizer-of-another-model",
        "the update fails, or leaves out what was added since",
        _orphans,
    ),
    Rule(
        "ema-over-non-floats",
        "an average of integers is cut to an integer at each update and stands still; one of keys fails",
        _averaged,
    ),
    Rule(
        "trained-averages",
        "the copies are Params too: the optimizer moves them, and they are no average any more",
        _trained_averages,
    ),
)
