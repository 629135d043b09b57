"""Rules of running statistics: who updates them, in which dtype, and from how large a part of the batch."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import jax.numpy as jnp
from flax import nnx

from statewise._src.common.graphdef import called
from statewise._src.common.paths import Path, format_path
from statewise._src.common.problems import counted
from statewise._src.filters.combinators import Filter
from statewise._src.filters.explain import as_code
from statewise._src.inspect.kind_hints import kind_apart
from statewise._src.inspect.lint.finding import Found, Rules, kind_with
from statewise._src.inspect.lint.subject import Subject

__all__ = ["RULES", "statistics_of"]

RULES = Rules()


def statistics_of(subject: Subject) -> list[int]:
    """Returns the leaves that are running statistics; a class of the user's own that has the name means the same."""
    return subject.of_type(
        *(cls for cls in set(subject.types) if any(base.__name__ == "BatchStat" for base in cls.__mro__))
    )


def _writers(subject: Subject) -> dict[Path, list[int]]:
    """Returns the modules that update running statistics when called, each with its statistics."""
    flags = subject.values_of_attribute("use_running_average")
    params = set(subject.of_type(nnx.Param, nnx.RngState)) if flags else set()
    statistics = {
        path: [number for number in subject.below(path) if number not in params]
        for path, flag in flags.items()
        if flag is False
    }
    return {path: numbers for path, numbers in statistics.items() if numbers}


def _first(modules: Iterable[Path]) -> str:
    """Returns the paths of the first modules, for a message."""
    shown = [*map(format_path, itertools.islice(modules, 4))]
    return ", ".join(shown[:3]) + (" ..." if len(shown) > 3 else "")


@RULES.rule(
    "statistics-written-by-eval",
    "evaluating changes the statistics, by test data, and the output depends on the batch",
)
def statistics_written_by_eval(subject: Subject) -> Iterator[Found]:
    """Finds modules that update statistics in a model whose dropout is switched off."""
    flags = {flag for flag in subject.values_of_attribute("deterministic").values() if isinstance(flag, bool)}
    writers = (
        _writers(subject) if flags == {True} else {}
    )  # without such a flag, nothing says that this model evaluates
    if writers:
        graphdef = subject.graph.graphdef
        view = called("nnx.view", "model", "deterministic=True", "use_running_average=True", graphdef=graphdef)
        yield Found(
            f"Every dropout is switched off, but running statistics are still updated (in {_first(writers)}).",
            subject.rows(sorted(set().union(*writers.values()))),
            f"{called('model.eval', graphdef=graphdef)}  # or {view}",
        )


@RULES.rule(
    "frozen-statistics-in-training",
    "a step that calls the module writes a frozen kind, which is an error; NNX alone would write it",
)
def frozen_statistics_in_training(subject: Subject) -> Iterator[Found]:
    """Finds frozen statistics of modules that update them."""
    frozen = {path: set(filter(subject.is_frozen, numbers)) for path, numbers in _writers(subject).items()}
    first = next((path for path, numbers in frozen.items() if numbers), None)
    if first is not None:
        evaluated = called("model.eval", graphdef=subject.graph.graphdef)
        yield Found(
            "Frozen statistics belong to modules that update them.",
            subject.rows(sorted(set().union(*frozen.values()))),
            f"use_running_average=True, where the module is made ({format_path(first)})"
            f"  # or {evaluated} as a step's first line",
        )


@RULES.rule(
    "compute-dtype-on-statistics",
    "an update smaller than the last bit of the compute dtype is lost: a statistic with momentum 0.99 stops moving",
)
def compute_dtype_on_statistics(subject: Subject) -> Iterator[Found]:
    """Finds kinds whose compute dtype rounds running statistics."""
    rounded: dict[str, list[int]] = {}
    for number in filter(subject.is_floating, statistics_of(subject)):
        kind = subject.kind(number)
        if kind is not None and kind.compute is not None and _bits(kind.compute) < _bits(subject.dtype(number)):
            rounded.setdefault(str(subject.claims[number]), []).append(number)
    for name, numbers in rounded.items():
        yield Found(
            f"Steps see the kind {name!r} in {subject.kinds[name].compute}, and it holds "
            f"{counted(len(numbers), 'leaf', 'leaves')} of running statistics.",
            subject.rows(numbers),
            _without_compute(subject, name, numbers),
        )


def _bits(dtype: object) -> int:
    return int(jnp.finfo(dtype).bits)


def _without_compute(subject: Subject, name: str, numbers: list[int]) -> str:
    """Returns the code that declares the statistics of a kind without its compute dtype."""
    if len(numbers) == subject.claims.count(name):
        return kind_with(name, "compute=None")
    types = sorted({subject.types[number] for number in numbers}, key=lambda cls: cls.__qualname__)
    of: Filter = types[0] if len(types) == 1 else tuple(types)
    own = "stats" if "stats" not in subject.kinds else "statistics"
    return kind_apart(subject.kinds, name, own, as_code(of))[0]


@RULES.rule(
    "microbatches-with-batch-statistics",
    "each part is normalized by its own mean and variance, so the step differs from one on the complete batch",
)
def microbatches_with_batch_statistics(subject: Subject) -> Iterator[Found]:
    """Finds steps that split the batch of a model with modules that normalize by it."""
    split = [step for step in subject.steps if step.training.microbatches > 1]
    writers = _writers(subject) if split else {}
    for step in split if writers else ():
        yield Found(
            f"{step.name} splits its batch into {step.training.microbatches} microbatches, and running statistics are "
            f"updated in each (in {_first(writers)}).",
            subject.rows(sorted(set().union(*writers.values()))),
            "a norm of each example alone: nnx.GroupNorm, nnx.LayerNorm or nnx.RMSNorm\n"
            "or, if a part is large enough to normalize by: ignore='microbatches-with-batch-statistics'",
        )
