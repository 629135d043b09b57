"""Checkpoints and targets that disagree, and what a restore then has to say, without reading an array."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import pytest

import statewise as sw
from checkpoint_models import contents
from refusals import refused
from statewise._src.checkpoint.format import load as reading
from strategies import Node

CAST = "sw.restore(path, target, cast=True)"
RECAST = "plan the model with the dtype that was saved, restore, and convert it yourself"
SIZES = "build the model with the sizes that it was saved with"
STRUCTURE = "give the Variable a value of the saved structure"
TIE = "tie the same leaves in the model before planning it, as they were when it was saved"
UNTIE = "untie the leaves in the model before planning it, as they were when it was saved"
ONES = jnp.ones((2, 3))


def state_of(kinds: sw.Kinds | None = None, optimizers: Any = None, **leaves: Any) -> sw.State:
    model = Node(**leaves)
    return (kinds or sw.Kinds.standard()).plan(model, optimizers=optimizers).take(model)


def keep(kind: str) -> str:
    declared = f"dataclasses.replace(plan.kinds[{kind!r}], missing='keep')"
    return f"to keep the target's values, declare it: kinds = plan.kinds.replace({kind}={declared})"


def without(*kinds: str) -> str:
    code = f"; or ask for the kinds you want: sw.restore(path, target, only={kinds!r})" if kinds else ""
    return f"plan what was saved, optimizers included{code}"


@contextlib.contextmanager
def nothing_read() -> Iterator[None]:
    """Any array that is read fails the test."""

    def read_stored(*_: Any) -> None:
        raise AssertionError("an array was read")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "read_stored", read_stored)
        yield


def check_refused(
    path: pathlib.Path, saved: sw.State, target: sw.State, *lines: str, hint: str, **options: Any
) -> sw.results.RestoreReport:
    """A restore lists exactly these leaves and hints, a preview the same; the target stays as it is."""
    if not path.exists():
        sw.save(path, saved)
    before = contents(target)
    differ = "1 leaf differs" if len(lines) == 1 else f"{len(lines)} leaves differ"
    message = f"{path} does not fit the target: {differ}. Nothing was read or changed."
    with nothing_read():
        with refused(sw.RestoreError, message, leaves=lines, hint=hint):
            sw.restore(path, target, **options)
        report = sw.preview(path, target, **options)
    assert not report.ok
    assert [str(leaf) for leaf in report.problems] == list(lines)
    assert "\n".join(report.hints) == hint
    assert contents(target) == before
    return report
