"""`finds` and `clean`: what lint says of a model, compared in full."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import statewise as sw


def finds(code: str, message: str, leaves: Sequence[str], hint: str, *objects: Any, **options: Any) -> None:
    """Asserts that this is the one finding: its fact, every leaf's line and the hint; and that it can be ignored."""
    ignore = options.pop("ignore", ())
    findings = sw.lint(*objects, **options, ignore=ignore)
    assert [found.code for found in findings] == [code]
    found = findings[0]
    assert found.message == message
    assert [str(leaf) for leaf in found.leaves] == list(leaves)
    assert found.hint == hint
    assert str(found).startswith(f"{code}: {message}")
    assert "\n" not in str(found)
    assert sw.lint(*objects, **options, ignore=(code, *ignore)) == []


def clean(*objects: Any, **options: Any) -> None:
    """Asserts that there is nothing to be found."""
    assert list(map(str, sw.lint(*objects, **options))) == []


def codes(*objects: Any, **options: Any) -> list[str]:
    """The codes of what is found."""
    return [found.code for found in sw.lint(*objects, **options)]
