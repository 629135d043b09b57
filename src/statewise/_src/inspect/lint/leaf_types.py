"""Rules of types: what a leaf's type promises, and what it holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from flax import nnx

from statewise._src.common.problems import counted
from statewise._src.inspect.lint.finding import Found, Rule
from statewise._src.inspect.lint.subject import Subject
from statewise._src.plan.leaf_specs import is_sown

__all__ = ["RULES"]


def _one_name(subject: Subject) -> Iterator[Found]:
    by_name: dict[str, list[type]] = {}
    for cls in dict.fromkeys(subject.types):
        by_name.setdefault(cls.__name__, []).append(cls)
    for name, classes in by_name.items():
        strangers = [
            cls for cls in classes if any(not (issubclass(cls, other) or issubclass(other, cls)) for other in classes)
        ]
        if not strangers:
            continue
        # The one that is NNX's own, or came first, is what the name is taken for.
        known = getattr(nnx, name, strangers[0])
        odd = [cls for cls in strangers if cls is not known]
        yield Found(
            f"{len(strangers)} types are called {name}: {', '.join(f'{cls.__module__}.{name}' for cls in strangers)}.",
            tuple(
                subject.row(number, note=f"of {cls.__module__}")
                for number, cls in enumerate(subject.types)
                if cls in odd
            ),
            f"class {name}(nnx.{name}): ...  # a subclass, which nnx.{name} means too; or another name"
            if known is getattr(nnx, name, None)
            else f"one class {name}, imported by both modules; or another name",
        )


def _integers(subject: Subject) -> Iterator[Found]:
    wrong = [
        number
        for number in subject.of_type(nnx.Param)
        if (dtype := subject.dtype(number)) is not None
        and not jnp.issubdtype(dtype, jnp.inexact)
        and not _frozen(subject, number)
    ]
    if wrong:
        params = counted(len(wrong), "nnx.Param is", "nnx.Params are")
        yield Found(
            f"{params} not made of floating-point numbers.",
            subject.rows(wrong),
            f"{subject.target(wrong[0])} = nnx.Variable(...)  # or a kind of its own: sw.Kind(..., frozen=True)",
        )


def _frozen(subject: Subject, number: int) -> bool:
    kind = subject.claims[number]
    return kind is not None and subject.kinds[kind].frozen


def _empty(subject: Subject) -> Iterator[Found]:
    empty = [number for number in subject.of_type(nnx.Param) if 0 in _shape(subject.values[number])]
    if empty:
        params = counted(len(empty), "nnx.Param has", "nnx.Params have")
        yield Found(
            f"{params} no elements.", subject.rows(empty), "check the sizes that the module was made with: one is 0"
        )


def _shape(value: Any) -> tuple[int, ...]:
    shape = getattr(value, "shape", ())
    return shape if isinstance(shape, tuple) else ()


def _sown(subject: Subject) -> Iterator[Found]:
    left = [
        number
        for number in subject.of_type(nnx.Intermediate)
        if is_sown(subject.types[number]) and subject.values[number] is not None
    ]
    if left:
        values = counted(len(left), "sown value was", "sown values were")
        yield Found(
            f"{values} left in the model.",
            subject.rows(left),
            "sown = nnx.pop(model, nnx.Intermediate)  # after each call\n"
            "or @sw.step(capture='intermediates'), which leaves none",
        )


RULES = (
    Rule(
        "types-of-one-name",
        "a filter by the one passes the other by: its leaves are not saved, reset or updated with those",
        _one_name,
    ),
    Rule(
        "integer-parameter",
        "nnx.Param is what gets differentiated: nnx.grad refuses it, and an optimizer for params has no gradient",
        _integers,
    ),
    Rule("empty-parameter", "it takes part in nothing, and hides a size that was computed wrong", _empty),
    Rule(
        "sown-values-left",
        "each call adds to them: every call is traced again, and memory grows",
        _sown,
    ),
)
