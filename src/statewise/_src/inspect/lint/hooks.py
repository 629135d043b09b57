"""Rules of hooks: what a Variable does when its value is read or set, and which writes bypass it.

Inside a step hooks run as they do under `nnx.jit`, since the step's function gets Variables.  A state holds raw arrays,
and so does Optax: what an optimizer writes, `nnx.Optimizer` included, does not go through `on_set_value`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flax import nnx

from statewise._src.common import compat
from statewise._src.common.problems import counted
from statewise._src.filters.explain import as_code
from statewise._src.inspect.lint.finding import Found, Rules
from statewise._src.inspect.lint.subject import Subject
from statewise._src.inspect.lint.training import Training, trainings

__all__ = ["RULES"]

RULES = Rules()


@RULES.rule(
    "hook-not-run",
    "an optimizer writes raw values, so what the hook ensures (a bound, a norm) ends with the first update",
)
def hook_not_run(subject: Subject) -> Iterator[Found]:
    """Finds trained leaves that do something when they are set: by an `on_set_value` hook, or by their class."""
    for training in trainings(subject):
        hooked = {number: how for number in sorted(training.trained) if (how := _when_set(subject, number))}
        if hooked:
            yield Found(
                f"{training.label} writes {counted(len(hooked), 'leaf', 'leaves')} without running "
                f"{'its hook' if len(hooked) == 1 else 'their hooks'}.",
                tuple(subject.row(number, note=how) for number, how in hooked.items()),
                _hint(training, [(subject.types[number], subject.graph.leaves[number]) for number in hooked]),
            )


def _when_set(subject: Subject, number: int) -> str:
    """Returns how a leaf reacts to being set; empty if it does not."""
    leaf, cls = subject.graph.leaves[number], subject.types[number]
    if not compat.is_variable(leaf):
        return ""
    # A hook that the class defines is in the metadata too.
    if leaf.get_metadata("on_set_value", ()):
        return "on_set_value"
    return f"{cls.__name__}.set_value" if getattr(cls, "set_value", None) is not nnx.Variable.set_value else ""


def _hint(training: Training, hooked: list[tuple[type, Any]]) -> str:
    classes = list(dict.fromkeys(cls for cls, _ in hooked))
    # In a step all Variables are plain ones; a hook of the user's takes an array, not a reference.
    read = "[...]" if not training.kinds and any(leaf.ref for _, leaf in hooked) else ""
    of = as_code(classes[0]) if len(classes) == 1 else f"({', '.join(map(as_code, classes))})"
    body = (
        "for _, leaf in nnx.iter_graph(model, graph=True):\n"
        f"    if isinstance(leaf, {of}):\n"
        f"        leaf.set_value(leaf.get_raw_value(){read})"
    )
    if not training.kinds:
        return f"{body}  # after each optimizer.update(model, grads)"
    lines = "".join(f"\n    {line}" for line in body.splitlines())
    writes = repr(training.kinds[0]) if len(training.kinds) == 1 else repr(training.kinds)
    return f"@sw.step(writes={writes})\ndef run_hooks(model):  # after each step: state, _ = run_hooks(state){lines}"
