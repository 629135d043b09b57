"""Rules of types: what a leaf's type promises, and what the leaf holds."""

from __future__ import annotations

from collections.abc import Iterator

from flax import nnx

from statewise._src.common.problems import counted
from statewise._src.inspect.lint.finding import Found, Rules
from statewise._src.inspect.lint.sowing import never_written, taken_out
from statewise._src.inspect.lint.subject import Subject
from statewise._src.plan.leaf_specs import is_sown

__all__ = ["RULES"]

RULES = Rules()


@RULES.rule(
    "types-of-one-name",
    "a filter by one does not match the other: its leaves are not saved, reset or updated with those",
)
def types_of_one_name(subject: Subject) -> Iterator[Found]:
    """Finds unrelated types with the same name."""
    by_name: dict[str, list[type]] = {}
    for cls in dict.fromkeys(subject.types):
        by_name.setdefault(cls.__name__, []).append(cls)
    for name, classes in by_name.items():
        # A subclass with its base's name is matched by a filter for the base.
        unrelated = [
            cls for cls in classes if any(not (issubclass(cls, other) or issubclass(other, cls)) for other in classes)
        ]
        if not unrelated:
            continue
        # A reader of the name thinks of NNX's own type, or of the first one.
        known = getattr(nnx, name, unrelated[0])
        modules = ", ".join(f"{cls.__module__}.{name}" for cls in unrelated)
        yield Found(
            f"{len(unrelated)} types are called {name}: {modules}.",
            tuple(
                subject.row(number, note=f"of {cls.__module__}")
                for number, cls in enumerate(subject.types)
                if cls in unrelated and cls is not known
            ),
            f"class {name}(nnx.{name}): ...  # a subclass, which nnx.{name} means too; or another name"
            if known is getattr(nnx, name, None)
            else f"one class {name}, imported by both modules; or another name",
        )


@RULES.rule(
    "integer-parameter",
    "nnx.Param is what gets differentiated: nnx.grad refuses it, and an optimizer for params has no gradient",
)
def integer_parameter(subject: Subject) -> Iterator[Found]:
    """Finds parameters of integers, booleans and keys that are not frozen."""
    params = subject.of_type(nnx.Param)
    wrong = [number for number in params if not subject.is_inexact(number) and not subject.is_frozen(number)]
    if wrong:
        yield Found(
            f"{counted(len(wrong), 'nnx.Param is', 'nnx.Params are')} not made of floating-point numbers.",
            subject.rows(wrong),
            f"{subject.target(wrong[0])} = nnx.Variable(...)  # or a kind of its own: sw.Kind(..., frozen=True)",
        )


@RULES.rule("empty-parameter", "it takes part in nothing, and hides a size that was computed wrong")
def empty_parameter(subject: Subject) -> Iterator[Found]:
    """Finds parameters without elements."""
    shapes = {number: getattr(subject.values[number], "shape", ()) for number in subject.of_type(nnx.Param)}
    empty = [number for number, shape in shapes.items() if isinstance(shape, tuple) and 0 in shape]
    if empty:
        yield Found(
            f"{counted(len(empty), 'nnx.Param has', 'nnx.Params have')} no elements.",
            subject.rows(empty),
            "check the sizes that the module was made with: one is 0",
        )


@RULES.rule("sown-values-left", "each call adds to them: every call is traced again, and memory grows")
def sown_values_left(subject: Subject) -> Iterator[Found]:
    """Finds values that an earlier call has sown."""
    left = [
        number
        for number in subject.of_type(nnx.Intermediate)
        if is_sown(subject.types[number]) and subject.values[number] is not None
    ]
    if left:  # those to which no call adds are in `sow-without-capture`
        left = sorted(set(left).difference(never_written(subject)))
    if left:
        yield Found(
            f"{counted(len(left), 'sown value was', 'sown values were')} left in the model.",
            subject.rows(left),
            f"{taken_out(subject, left, 'sown = nnx.pop(model, nnx.Intermediate)', 'after each call')}\n"
            "or @sw.step(capture='intermediates'), which leaves none",
        )
