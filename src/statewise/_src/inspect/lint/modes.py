"""Rules of modes: modules that train where the rest of the program evaluates."""

from __future__ import annotations

from collections.abc import Iterator

from flax import nnx

from statewise._src.common.paths import Leaf, Path, format_path
from statewise._src.inspect.lint.finding import Found, Rule
from statewise._src.inspect.lint.subject import Subject

__all__ = ["RULES"]


def _writers(subject: Subject) -> dict[Path, list[int]]:
    """The modules that update running statistics when they are called, each with its statistics."""
    if not subject.has_attribute("use_running_average"):
        return {}
    training = [path for path, node in subject.nodes if vars(node).get("use_running_average") is False]
    if not training:
        return {}
    params = set(subject.of_type(nnx.Param, nnx.RngState))
    found = {path: [number for number in subject.below(path) if number not in params] for path in training}
    return {path: numbers for path, numbers in found.items() if numbers}


def _rows(subject: Subject, writers: dict[Path, list[int]]) -> tuple[Leaf, ...]:
    numbers = sorted({number for found in writers.values() for number in found})
    return subject.rows(numbers)


def _eval(subject: Subject) -> Iterator[Found]:
    if not subject.has_attribute("deterministic"):
        return
    flags = {flag for _, node in subject.nodes if isinstance(flag := vars(node).get("deterministic"), bool)}
    if flags != {True}:  # no sign that this model is to evaluate
        return
    writers = _writers(subject)
    if writers:
        modules = ", ".join(format_path(path) for path in list(writers)[:3]) + (" ..." if len(writers) > 3 else "")
        yield Found(
            f"Every dropout is switched off, but running statistics are still updated (in {modules}).",
            _rows(subject, writers),
            "model.eval()  # or nnx.view(model, deterministic=True, use_running_average=True)",
        )


def _frozen(subject: Subject) -> Iterator[Found]:
    writers: dict[Path, list[int]] = {}
    for path, numbers in _writers(subject).items():
        frozen = [
            number for number in numbers if (kind := subject.claims[number]) is not None and subject.kinds[kind].frozen
        ]
        if frozen:
            writers[path] = frozen
    if writers:
        first = format_path(next(iter(writers)))
        yield Found(
            "Frozen statistics belong to modules that update them.",
            _rows(subject, writers),
            f"use_running_average=True, where the module is made ({first})  # or model.eval() as a step's first line",
        )


RULES = (
    Rule(
        "statistics-written-by-eval",
        "evaluating moves the statistics, by test data, and the output depends on the batch",
        _eval,
    ),
    Rule(
        "frozen-statistics-in-training",
        "a step that calls the module writes a frozen kind, which is refused; NNX alone would write it",
        _frozen,
    ),
)
